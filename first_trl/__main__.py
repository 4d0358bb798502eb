"""The command line: `first-trl run RECIPE`, or one stage at a time.

    first-trl demo                      the whole method on a generated task, in minutes on a CPU
    first-trl run RECIPE                every stage in order; finished ones are skipped
    first-trl plan RECIPE               what it will cost and what is wrong with it; loads no weights
    first-trl show RECIPE               the recipe as it runs: `extends` and variables resolved, defaults included
    first-trl report RECIPE             where the report of a run is
    first-trl predict STUDENT           answers with their confidence, abstaining below the fitted threshold
    first-trl merge RECIPE              a whole model out of a student's adapter, measured again
    first-trl cache COMMAND PATH        inspect, verify or push a finished cache

The stages, each a command too, `first-trl STAGE RECIPE`:

    sft         fine-tune the teacher on the labels
    cache       run the teacher once and keep its most probable tokens
    calibrate   find on validation what makes the teacher's confidence true
    distill     train the students
    evaluate    measure every arm and control, and write the report
    push        publish a student with its card; --dry_run rehearses

Each stage is a process of its own, under `accelerate launch` where --config_file names a configuration, so that memory
is given back between stages. This module starts processes and imports nothing heavy.
"""

import argparse
import importlib
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from .constants import STAGES
from .errors import FirstTrlError
from .failures import AGAIN, memory_advice
from .interrupts import INTERRUPTED, exit_status, raise_on_sigterm, run_child
from .log import POSITION, RunLog, libraries_into, recording, status

# Commands that read their own arguments: module, function.
OTHERS = {
    "plan": ("checks", "main"),
    "show": ("schema", "show_main"),
    "schema": ("schema", "schema_main"),
    "predict": ("prediction", "main"),
    "merge": ("stages.merge", "main"),
}
CACHE_COMMANDS = ("inspect", "verify", "push")
NEXT = "Next: `first-trl demo` to see it work, or put your files into recipes/reviews.yaml and `first-trl run` it."


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    raise_on_sigterm()
    try:
        return _dispatch(argv)
    except KeyboardInterrupt as error:
        status(INTERRUPTED if argv[:1] in (["run"], ["demo"]) else "interrupted")
        return exit_status(error)
    except FirstTrlError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read this has left, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nothing is left to be flushed at the end
        return 141


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else ""
    if command == "cache" and argv[1:2] and argv[1] in CACHE_COMMANDS:
        return _run_alone("cache_tools", "main", argv[1:])
    if command in OTHERS:
        return _run_alone(*OTHERS[command], argv[1:])
    if not argv:
        print(f"{__doc__.partition('Each stage is')[0]}{NEXT}")
        return 2
    options, rest = _parser().parse_known_args(argv)
    if command in STAGES:
        return run_stage(command, rest, options.config_file)
    if command == "report":
        return _print_report(options.recipe, rest)
    if command == "demo":
        from .demo import prepare_demo

        path = Path(options.output_dir) / "demo" / "log.txt"
        with recording(path, quiet=options.quiet, title="first-trl demo") as log, libraries_into(log):
            options.recipe = str(prepare_demo(Path(options.output_dir)))
    return run_recipe(options, rest)


def _run_alone(module: str, name: str, arguments: list[str]) -> int:
    """A command outside any run: what other libraries warn of has no log to go to, and their errors are shown."""
    command = getattr(importlib.import_module(f".{module}", __package__), name)
    light = module in ("checks", "schema") or "-h" in arguments or "--help" in arguments or not arguments
    with nullcontext() if light else libraries_into(RunLog(os.devnull)):  # which imports those libraries
        return command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl",
        description=__doc__.partition("Each stage is")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="all stages of a recipe, in order", allow_abbrev=False)
    run.add_argument("recipe", help="the experiment's YAML file")
    run.add_argument("--stages", help="only these, such as calibrate,distill,evaluate")
    demo = commands.add_parser("demo", help="the whole method on a generated task, on a CPU", allow_abbrev=False)
    demo.add_argument("--output_dir", default="runs", help="where the run folder goes (default: runs)")
    demo.set_defaults(stages=None)
    for command in (run, demo):
        command.add_argument("--quiet", action="store_true", help="print errors alone; the run's log.txt has the rest")
        command.add_argument("--overwrite", action="store_true", help="replace the work of another recipe's run")
        command.add_argument(
            "--skip_checks", action="store_true", help="start without looking through data and models"
        )
    report = commands.add_parser("report", help="where the report of a run is", allow_abbrev=False)
    report.add_argument("recipe", help="the experiment's YAML file, or its run folder")
    stages = [commands.add_parser(stage, add_help=False, allow_abbrev=False) for stage in STAGES]
    for command in (run, demo, *stages):
        command.add_argument("--config_file", help="an accelerate configuration, such as configs/multi_gpu.yaml")
    return parser


def launch(stage: str, arguments: list[str], config_file: str | None, position: str = "") -> int:
    """Run one stage: under `accelerate launch` with a configuration, else as one process; returns its exit status."""
    if config_file and not Path(config_file).is_file():
        raise FirstTrlError(f"There is no {config_file}; give an accelerate configuration, such as configs/cpu.yaml.")
    module = f"first_trl.stages.{stage}"
    command = [sys.executable, "-m", module, *arguments]
    if config_file:
        launcher = "from first_trl.interrupts import accelerate_launch; accelerate_launch()"
        command = [sys.executable, "-c", launcher, f"--config_file={config_file}", "--quiet", "-m", module, *arguments]
    # A stage sends the warnings of other libraries to the run's log; here those of the launcher are meant.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "ACCELERATE_MIXED_PRECISION": "no"}
    code = run_child(command, {**quiet, **os.environ, POSITION: position})
    if code in (130, 143):
        status(INTERRUPTED)
    return code


def run_stage(stage: str, arguments: list[str], config_file: str | None) -> int:
    """One stage by itself, after the checks that concern it."""
    from .checks import passed
    from .stages.command import parse_stage

    recipe, options = parse_stage(stage, arguments)
    if stage != "push" and not options.skip_checks and not passed(recipe, [stage], config_file, options.quiet):
        return 2
    return launch(stage, arguments, config_file)


def run_recipe(options: argparse.Namespace, overrides: list[str]) -> int:
    """Every stage of a recipe in order, each in its own process, skipping what is current."""
    from .recipe import load_recipe
    from .run import is_current, jobs_of

    recipe, started = load_recipe(options.recipe, overrides), time.monotonic()
    wanted = options.stages.split(",") if options.stages else [stage for stage in STAGES if stage != "push"]
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        raise FirstTrlError(f"Unknown stage {unknown[0]!r} in --stages; choose from {', '.join(STAGES)}.")
    jobs = [
        job for stage in STAGES if stage in wanted for job in jobs_of(recipe, stage) or [stage] * (stage == "push")
    ]
    if not options.skip_checks and not all(job != "push" and is_current(recipe, job) for job in jobs):
        from .checks import passed

        if not passed(recipe, wanted, options.config_file, options.quiet):
            return 2
    flags = [f"--{name}" for name in ("quiet", "overwrite", "skip_checks") if getattr(options, name)]
    path = recipe.run_folder / "log.txt"
    for number, job in enumerate(jobs, start=1):
        if job != "push" and is_current(recipe, job):
            with recording(path, quiet=options.quiet):
                status(f"{number}/{len(jobs)} {job}: up to date, nothing to do")
            continue
        stage, _, student = job.partition(".")
        arguments = [options.recipe, *(["--arm", student] if student else []), *flags, *overrides]
        size = path.stat().st_size if path.is_file() else 0
        if code := launch(stage, arguments, options.config_file, f"{number}/{len(jobs)}"):
            _explain_end(path, size, job, code)
            return code
    report = recipe.run_folder / "report"
    if "evaluate" in wanted:
        print(_result(report))
    with recording(path, quiet=options.quiet):
        where = f"; the report is {report / 'index.html'}" if "evaluate" in wanted else ""
        status(f"done in {time.monotonic() - started:.0f} s{where}")
    return 0


def _result(report: Path) -> str:
    """The tables of the report's first view, and its answers in words; the page has the rest."""
    first, *tables = (report / "table.md").read_text(encoding="utf-8").split("\n### ")
    view = tables[0].partition("\n")[0].rpartition(", ")[2]
    shown = [table for table in tables if table.partition("\n")[0].endswith(view)]
    answers = (report / "summary.md").read_text(encoding="utf-8").partition("\n**")[0]
    return "\n### ".join([first, *shown]) + "\n" + answers


def _explain_end(path: Path, size: int, job: str, code: int) -> None:
    """Say how a stage has ended that has not said so itself; the log had `size` bytes before."""
    if code in (130, 143):
        return
    said = path.read_bytes()[size:] if path.is_file() else b""
    with recording(path):
        if code == 137:
            advice = memory_advice(job.partition(".")[0])
            status(f"{job} was killed, probably for lack of memory: {advice}; {AGAIN}")
        elif f"{job.partition('.')[0]} failed".encode() not in said:
            status(f"{job} ended with status {code} and no message; {path} may have one")
        else:
            status(f"{job} failed (exit status {code}); run the same command again to continue from here")


def _print_report(recipe: str, overrides: list[str]) -> int:
    from .recipe import load_recipe

    folder = Path(recipe) if Path(recipe).is_dir() else load_recipe(recipe, overrides).run_folder
    page = folder / "report" / "index.html"
    if not page.is_file():
        raise FirstTrlError(f"There is no report in {folder} yet; `first-trl run {recipe}` writes {page}.")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

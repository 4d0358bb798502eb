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
from .failures import AGAIN, explain, memory_advice
from .interrupts import INTERRUPTED, exit_status, raise_on_sigterm, run_child
from .log import POSITION, RunLog, libraries_into, recording, status
from .redaction import redacted

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
    except Exception as error:  # of a command that is no stage
        if (known := explain(error, argv[0])) is None:
            raise
        print(redacted(f"[first-trl] {argv[0]} failed: {known}"), file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(f"{__doc__.partition('Each stage is')[0]}{NEXT}")
        return 2
    command, *rest = argv
    if command == "cache" and rest and rest[0] in CACHE_COMMANDS:
        return _run_alone("cache_tools", "main", rest)
    if command in OTHERS:
        return _run_alone(*OTHERS[command], rest)
    if command in STAGES:
        return run_stage(command, rest)
    options, overrides = _parser().parse_known_args(argv)
    return options.call(options, overrides)


def _run_alone(module: str, name: str, arguments: list[str]) -> int:
    """A command outside any run: what other libraries warn of has no log to go to, and their errors are shown."""
    command = getattr(importlib.import_module(f".{module}", __package__), name)
    heavy = module not in ("checks", "schema") or any(word.partition("=")[0] == "--row" for word in arguments)
    light = not heavy or "-h" in arguments or "--help" in arguments or not arguments
    with nullcontext() if light else libraries_into(RunLog(os.devnull)):  # which imports those libraries
        return command(arguments)


def _parser() -> argparse.ArgumentParser:
    """Of the commands that are no stage and have no parser of their own; it names the others."""
    from .stages.command import add_run_options

    text, raw = __doc__.partition("Each stage is")[0], argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="first-trl", description=text, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run, demo, report = (commands.add_parser(name, allow_abbrev=False) for name in ("run", "demo", "report"))
    run.set_defaults(call=run_recipe)
    run.add_argument("recipe", help="the experiment's YAML file")
    run.add_argument("--stages", help="only these, such as calibrate,distill,evaluate")
    demo.set_defaults(call=run_demo)
    demo.add_argument("--output_dir", default="runs", help="where the run folder goes (default: runs)")
    for whole in (run, demo):
        add_run_options(whole)
    report.set_defaults(call=print_report)
    report.add_argument("recipe", help="the experiment's YAML file, or its run folder")
    for name in (*STAGES, *OTHERS):
        commands.add_parser(name)
    return parser


def launch(stage: str, arguments: list[str], config_file: str | None, position: str = "") -> int:
    """Run one stage: under `accelerate launch` with a configuration, else as one process; returns its exit status."""
    if config_file and not Path(config_file).is_file():
        raise FirstTrlError(f"There is no {config_file}; give an accelerate configuration, such as configs/cpu.yaml.")
    command = ["-m", f"first_trl.stages.{stage}", *arguments]
    if config_file:
        launcher = "from first_trl.interrupts import accelerate_launch; accelerate_launch()"
        command = ["-c", launcher, f"--config_file={config_file}", "--quiet", *command]
    # A stage sends the warnings of other libraries to the run's log; here those of the launcher are meant.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "ACCELERATE_MIXED_PRECISION": "no"}
    code = run_child([sys.executable, *command], {**quiet, **os.environ, POSITION: position})
    if code in (130, 143):
        status(INTERRUPTED)
    return code


def run_stage(stage: str, arguments: list[str]) -> int:
    """One stage by itself, after the checks that concern it."""
    from .checks import passed
    from .stages.command import parse_stage

    recipe, options = parse_stage(stage, arguments)
    checked = stage == "push" or options.skip_checks
    if not checked and not passed(recipe, [stage], options.config_file, options.quiet):
        return 2
    return launch(stage, arguments, options.config_file)


def run_demo(options: argparse.Namespace, overrides: list[str]) -> int:
    from .checks import folder_problems
    from .demo import prepare_demo

    folder = Path(options.output_dir)
    if problems := list(folder_problems(folder / "demo")):
        raise FirstTrlError("\n".join(problems))
    with (
        recording(folder / "demo" / "log.txt", quiet=options.quiet, title="first-trl demo") as log,
        libraries_into(log),
    ):
        options.recipe, options.stages = str(prepare_demo(folder)), None
    return run_recipe(options, overrides)


def run_recipe(options: argparse.Namespace, overrides: list[str]) -> int:
    """Every stage of a recipe in order, each in its own process, skipping what is current."""
    from .checks import passed
    from .recipe import load_recipe
    from .run import Run

    recipe, started = load_recipe(options.recipe, overrides), time.monotonic()
    wanted = options.stages.split(",") if options.stages else [stage for stage in STAGES if stage != "push"]
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        raise FirstTrlError(f"Unknown stage {unknown[0]!r} in --stages; choose from {', '.join(STAGES)}.")
    jobs = [job.name for job in Run(recipe).jobs.values() if job.stage in wanted] + ["push"] * ("push" in wanted)

    def is_current(job: str) -> bool:
        return job != "push" and Run(recipe).stale(job) is None

    if not (options.skip_checks or all(map(is_current, jobs))):
        if not passed(recipe, wanted, options.config_file, options.quiet):
            return 2
    flags = [f"--{name}" for name in ("quiet", "overwrite", "skip_checks") if getattr(options, name)]
    log, report = recipe.run_folder / "log.txt", recipe.run_folder / "report"
    for number, job in enumerate(jobs, start=1):
        if is_current(job):
            with recording(log, quiet=options.quiet):
                status(f"{number}/{len(jobs)} {job}: up to date, nothing to do")
            continue
        stage, _, student = job.partition(".")
        arguments = [options.recipe, *(["--arm", student] if student else []), *flags, *overrides]
        before = log.stat().st_size if log.is_file() else 0
        if code := launch(stage, arguments, options.config_file, f"{number}/{len(jobs)}"):
            _explain_end(log, before, job, code)
            return code
    where = ""
    if "evaluate" in wanted:
        print(_result(report))
        where = f"; the report is {report / 'index.html'}"
    with recording(log, quiet=options.quiet):
        status(f"done in {time.monotonic() - started:.0f} s{where}")
    return 0


def _result(report: Path) -> str:
    """The tables of the report's first view, and its answers in words; the page has the rest."""
    first, *tables = (report / "table.md").read_text(encoding="utf-8").split("\n### ")
    view = tables[0].partition("\n")[0].rpartition(", ")[2]
    shown = [table for table in tables if table.partition("\n")[0].endswith(view)]
    answers = (report / "summary.md").read_text(encoding="utf-8").partition("\n**")[0]
    return "\n### ".join([first, *shown]) + "\n" + answers


def _explain_end(log: Path, before: int, job: str, code: int) -> None:
    """Say how a stage has ended that has not said so itself; the log had so many bytes `before`."""
    stage, said = job.partition(".")[0], log.read_bytes()[before:] if log.is_file() else b""
    with recording(log):
        if code == 137:
            status(f"{job} was killed, probably for lack of memory: {memory_advice(stage)}; {AGAIN}")
        elif f"{stage} failed".encode() in said:
            status(f"{job} failed (exit status {code}); run the same command again to continue from here")
        elif code not in (130, 143):
            status(f"{job} ended with status {code} and no message; {log} may have one")


def print_report(options: argparse.Namespace, overrides: list[str]) -> int:
    from .recipe import load_recipe

    recipe = options.recipe
    folder = Path(recipe) if Path(recipe).is_dir() else load_recipe(recipe, overrides).run_folder
    page = folder / "report" / "index.html"
    if not page.is_file():
        raise FirstTrlError(f"There is no report in {folder} yet; `first-trl run {recipe}` writes {page}.")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `first-trl run RECIPE`, or one stage at a time.

    first-trl demo                      the whole method on a generated task, in minutes on a CPU
    first-trl run RECIPE                every stage in order; finished ones are skipped
    first-trl plan RECIPE               what it will cost and what is wrong with it; loads no weights
    first-trl STAGE RECIPE              one of sft, cache, calibrate, distill, evaluate, push
    first-trl predict ADAPTER           answers with their confidence, abstaining below the fitted threshold
    first-trl cache COMMAND PATH        inspect, verify or push a finished cache

Each stage is its own process under `accelerate launch`, so memory is given back between stages and the same recipe
runs under any accelerate configuration. This module starts processes and imports nothing heavy.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import cache_tools
from .failures import memory_advice
from .log import RunLog, libraries_into, recording, status
from .recipe import STAGES, Recipe
from .run import is_current, jobs_of

SINGLE_PROCESS = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if argv[:1] == ["cache"] and argv[1:2] and argv[1] in cache_tools.COMMANDS:
        return _alone(cache_tools.main, argv[1:])
    if argv[:1] == ["predict"]:
        from .prediction import main as predict

        return _alone(predict, argv[1:])
    if argv[:1] == ["merge"]:
        from .merging import main as merge

        return _alone(merge, argv[1:])
    if argv[:1] == ["show"] or argv[:1] == ["schema"]:
        from .schema import schema_main, show_main

        return (show_main if argv[0] == "show" else schema_main)(argv[1:])
    if argv[:1] == ["plan"]:
        from .checks import main as plan

        return plan(argv[1:])
    if argv and argv[0] in STAGES:
        config_file, rest = _take_option(argv[1:], "--config_file")
        return launch(argv[0], rest, config_file)
    options, overrides = parser.parse_known_args(argv)
    if options.command == "demo":
        from .demo import prepare_demo

        path = Path(options.output_dir) / "demo" / "log.txt"
        with recording(path, quiet=options.quiet, title="first-trl demo") as log, libraries_into(log):
            recipe = prepare_demo(Path(options.output_dir))
        return run_pipeline(str(recipe), None, None, overrides, options.quiet)
    if options.command == "run":
        return run_pipeline(options.recipe, options.config_file, options.stages, overrides, options.quiet)
    parser.print_help()
    return 2


def _alone(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """A command outside any run: what other libraries warn of has no log to go to, and their errors are shown."""
    if "-h" in arguments or "--help" in arguments or not arguments:
        return command(arguments)  # answers at once, without importing those libraries
    with libraries_into(RunLog(os.devnull)):
        return command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl",
        description=__doc__.split("\n\n")[0],
        epilog=f"Stages: {', '.join(STAGES)}.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="all stages of a recipe, in order", allow_abbrev=False)
    run.add_argument("recipe", help="the experiment's YAML file")
    run.add_argument("--config_file", help="an accelerate configuration, such as configs/multi_gpu.yaml")
    run.add_argument("--stages", help="only these, such as calibrate,distill,evaluate")
    demo = commands.add_parser("demo", help="the whole method on a generated task, on a CPU", allow_abbrev=False)
    demo.add_argument("--output_dir", default="runs", help="where the run folder goes (default: runs)")
    for command in (run, demo):
        command.add_argument("--quiet", action="store_true", help="print errors alone; the run's log.txt has the rest")
    commands.add_parser("predict", help="answers of a student: `first-trl predict --help`", add_help=False)
    commands.add_parser("merge", help="a whole model out of a student's adapter, measured again", add_help=False)
    commands.add_parser("plan", help="costs and problems of a recipe, without loading weights", add_help=False)
    commands.add_parser("show", help="the recipe as it runs, everything resolved", add_help=False)
    commands.add_parser("schema", help="what a recipe may hold, for editors: a JSON schema", add_help=False)
    for stage in STAGES:
        commands.add_parser(stage, help=f"the stage {stage}: `first-trl {stage} RECIPE --help`", add_help=False)
    return parser


def _take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `name VALUE` or `name=VALUE` out of an argument list."""
    for i, argument in enumerate(argv):
        if argument == name and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return None, argv


def launch(stage: str, arguments: list[str], config_file: str | None) -> int:
    """Run one stage under `accelerate launch`; one process unless a configuration says otherwise."""
    if config_file and not Path(config_file).is_file():
        print(
            f"There is no {config_file}; give an accelerate configuration, such as configs/cpu.yaml.", file=sys.stderr
        )
        return 2
    launcher = [f"--config_file={config_file}"] if config_file else list(SINGLE_PROCESS)
    launcher += ["--quiet"]  # the stage has said what is wrong: no traceback of the launcher on top
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", f"first_trl.stages.{stage}"]
    return subprocess.run([*command, *arguments], env=_environment()).returncode


def _environment() -> dict[str, str]:
    """Quieter third parties. A stage sends their warnings to the run's log; here it is the launcher that is meant."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return {**quiet, **os.environ}


def run_pipeline(
    recipe_path: str, config_file: str | None, stages: str | None, overrides: list[str], quiet: bool = False
) -> int:
    """Every stage of a recipe in order, each in its own process, skipping what is current."""
    from .recipe import RecipeError, load_recipe

    try:
        recipe = load_recipe(recipe_path, overrides)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    wanted = stages.split(",") if stages else [stage for stage in STAGES if stage != "push"]
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown:
        print(f"Unknown stage {unknown[0]!r} in --stages; choose from {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    from .checks import passed

    if not passed(recipe, wanted, config_file, quiet):
        return 2
    arguments = [recipe_path, *["--quiet"] * quiet, *overrides]
    started = time.monotonic()
    for stage in (stage for stage in STAGES if stage in wanted):
        for job in jobs_of(recipe, stage) or [stage] * (stage == "push"):
            code = _run_job(recipe, stage, job, arguments, config_file, quiet)
            if code != 0:
                return code
    with recording(recipe.run_folder / "log.txt", quiet=quiet):
        _print_result(recipe, time.monotonic() - started)
    return 0


def _run_job(recipe: Recipe, stage: str, job: str, arguments: list[str], config_file: str | None, quiet: bool) -> int:
    """One job in a process of its own; returns its exit status."""
    path = recipe.run_folder / "log.txt"
    if job != "push" and is_current(recipe, job):
        with recording(path, quiet=quiet):
            status(f"{job}: up to date, nothing to do")
        return 0
    size = path.stat().st_size if path.is_file() else 0
    arm = ["--arm", job.removeprefix("distill.")] if stage == "distill" else []
    code = launch(stage, [*arguments[:1], *arm, *arguments[1:]], config_file)
    if code == 0:
        return 0
    said = path.read_bytes()[size:] if path.is_file() else b""
    with recording(path):
        if said and f"{stage} failed".encode() not in said:
            status(f"{job} ended without a word, as a system ends what takes too much memory: {memory_advice(stage)}")
        status(f"{job} failed (exit status {code}); run the same command again to continue from here")
    return code


def _print_result(recipe: Recipe, seconds: float) -> None:
    report = recipe.run_folder / "report"
    for name in ("table.md", "summary.md"):
        if (report / name).is_file():
            print((report / name).read_text(encoding="utf-8"))
    status(f"done in {seconds:.0f} s; the report is {report / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())

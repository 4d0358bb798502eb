"""What every stage's command does around its job: read the recipe, keep a log, and fail in one line.

A stage's `main` takes the recipe and the options; [`stage_command`] makes it the command that `accelerate launch`
starts. What the stage does is in the stage.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable

from ..failures import explain
from ..interrupts import INTERRUPTED, exit_status, follow_parent, raise_on_sigterm
from ..log import RunLog, is_main_process, libraries_into, recording, status
from ..recipe import Recipe, RecipeError, load_recipe
from ..redaction import redacted


def parse_stage(stage: str, argv: list[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe and the options of `python -m first_trl.stages.STAGE RECIPE [--key value ...]`."""
    parser = argparse.ArgumentParser(
        prog=f"first-trl {stage}",
        allow_abbrev=False,
        epilog="Any setting of the recipe can be overridden: --key value for this stage's own, --section.key value.",
    )
    parser.add_argument("recipe", help="the experiment's YAML file")
    if stage == "distill":
        parser.add_argument("--arm", help="train this arm only, or one of its seeds: first/seed-1")
    if stage == "push":
        parser.add_argument("--dry_run", action="store_true", help="write the folder to upload, and upload nothing")
    add_run_options(parser)
    options, overrides = parser.parse_known_args(argv)
    try:
        recipe = load_recipe(options.recipe, overrides, stage=stage)
    except RecipeError as error:
        raise SystemExit(str(error) if is_main_process() else 1) from None
    if getattr(options, "arm", None) and options.arm not in [*recipe.arms, *recipe.students]:
        parser.error(f"unknown arm {options.arm!r}; the recipe has {', '.join(recipe.arms)}")
    return recipe, options


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that `run` and every stage have; a stage that was launched has no use for the first."""
    parser.add_argument("--config_file", help="an accelerate configuration, such as configs/multi_gpu.yaml")
    parser.add_argument("--quiet", action="store_true", help="print errors alone; the run's log.txt has the rest")
    parser.add_argument("--overwrite", action="store_true", help="replace what another recipe of this name has made")
    parser.add_argument("--skip_checks", action="store_true", help="start without looking through data and models")


def stage_command(stage: str) -> Callable:
    """Make `main(recipe, options)` a command `main(argv=None)`, whose failures are one line and exit status 1."""

    def decorate(work: Callable[[Recipe, argparse.Namespace], None]) -> Callable[[list[str] | None], None]:
        @functools.wraps(work)
        def main(argv: list[str] | None = None) -> None:
            followed = follow_parent()
            raise_on_sigterm()
            recipe, options = parse_stage(stage, argv)
            title = f"first-trl {stage} {' '.join(sys.argv[1:] if argv is None else argv)}"
            try:
                with recording(recipe.run_folder / "log.txt", quiet=options.quiet, title=title) as log:
                    _attempt(functools.partial(work, recipe, options), stage, log, followed)
            except OSError as error:  # of the log's folder
                message = f"{recipe.run_folder} cannot be written ({error.strerror}); correct name or output_dir"
                raise SystemExit(f"[first-trl] {stage} failed: {message}") from None

        return main

    return decorate


def _attempt(work: Callable[[], None], stage: str, log: RunLog, followed: bool) -> None:
    """Do the work; a failure is one line for the user, with its traceback in the log."""
    try:
        with libraries_into(log):
            work()
    except KeyboardInterrupt as error:
        log.add_traceback(error)
        log.add(f"[first-trl] {stage} interrupted")
        if followed:  # the parent says so; threads that wait for a server do not hold this process up
            os._exit(exit_status(error))
        status(INTERRUPTED)
        raise SystemExit(exit_status(error)) from None
    except Exception as error:
        log.add_traceback(error)
        process = "" if is_main_process() else f" in process {os.environ['RANK']}"
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
        message = explain(error, stage) or f"{text} (unexpected; traceback in {log.path})"
        line = redacted(f"[first-trl] {stage} failed{process}: {message}")
        log.add(line)
        raise SystemExit(line) from None

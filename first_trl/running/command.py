"""What every stage's command does around its work: read the recipe, keep a log, and fail in one line.

A stage's `main` takes the recipe and the options; [`stage_command`] makes it the command that `accelerate launch`
starts. What the stage does is in the stage.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable

from ..pipeline import parse_stage
from ..recipe.loading import Recipe
from .failures import explain
from .log import RunLog, libraries_into, recording
from .redaction import redacted


def stage_command(stage: str) -> Callable:
    """Make `main(recipe, options)` a command `main(argv=None)`, whose failures are one line and exit status 1."""

    def decorate(work: Callable[[Recipe, argparse.Namespace], None]) -> Callable[[list[str] | None], None]:
        @functools.wraps(work)
        def main(argv: list[str] | None = None) -> None:
            recipe, options = parse_stage(stage, argv)
            path = recipe.run_folder / "log.txt"
            title = f"first-trl {stage} {' '.join(sys.argv[1:] if argv is None else argv)}"
            with recording(path, quiet=options.quiet, title=title) as log:
                try:
                    with libraries_into(log):
                        work(recipe, options)
                except (Exception, KeyboardInterrupt) as error:
                    raise SystemExit(failure(error, stage, log)) from None

        return main

    return decorate


def failure(error: BaseException, stage: str, log: RunLog) -> str | int:
    """What the user is told of an error, whose traceback goes to the log; an exit status where they stopped it."""
    log.add_traceback(error)
    if isinstance(error, KeyboardInterrupt):
        return 130
    known = explain(error, stage)
    process = f" in process {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
    text = " ".join(str(error).split())
    told = known or f"{type(error).__name__}{': ' if text else ''}{text[:300]} (unexpected; traceback in {log.path})"
    line = redacted(f"[first-trl] {stage} failed{process}: {told}")
    log.add(line)
    return line

"""What a run prints, kept in `runs/<name>/log.txt`, and what other libraries print, kept there alone.

While [`recording`] is on, everything that goes to the screen goes to the log too, with the time and without tokens.
Warnings of other libraries go to the log alone: a user of a recipe can rarely act on them. Ours are shown. Nothing is
decided here about errors (`first_trl.failures`) or about what is worth saying.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from .redaction import redacted

PACKAGE = Path(__file__).parent
# Each hangs a handler of its own on its own logger when it is imported.
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "torch")


def status(line: str) -> None:
    """One line for the user, from the main process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[first-trl] {line}", file=sys.stderr, flush=True)


class RunLog:
    """A file that lines are added to; several processes may add to it at the same time."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, text: str) -> None:
        """Add lines, each with the time, tokens taken out. A disk that is full does not stop the work for its log."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp} {redacted(line)}\n" for line in text.splitlines() if line.strip())
        try:
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.write(lines)
        except OSError as error:
            print(f"[first-trl] {self.path} cannot be written: {error.strerror}", file=sys.__stderr__)

    def add_traceback(self, error: BaseException) -> None:
        self.add("".join(traceback.format_exception(error)))


class _Tee:
    """A stream that also writes what remains on a screen, line by line, to a log."""

    def __init__(self, screen, log: RunLog, quiet: bool):
        self.screen, self.log, self.quiet, self.line = screen, log, quiet, ""

    def write(self, text: str) -> int:
        if not self.quiet:
            self.screen.write(text)
        *ended, self.line = (self.line + text).split("\n")
        for line in ended:
            self.log.add(_what_remains(line))
        self.line = _what_remains(self.line)
        return len(text)

    def flush(self) -> None:
        self.screen.flush()

    def __getattr__(self, name: str):
        return getattr(self.screen, name)


def _what_remains(line: str) -> str:
    """A line without what its carriage returns wipe out: the last state of a progress bar."""
    return line[line.rfind("\r", 0, -1) + 1 :]


class _LogHandler(logging.Handler):
    """Records of loggers into the log; on the screen only errors, and what this package has to say."""

    def __init__(self, log: RunLog, screen):
        super().__init__(logging.WARNING)
        self.log, self.screen = log, screen

    def emit(self, record: logging.LogRecord) -> None:
        message = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}"
        ours = record.name.startswith("first_trl")
        if ours or record.levelno >= logging.ERROR:
            print(f"[first-trl] {message if not ours else record.getMessage()}", file=self.screen, flush=True)
        self.log.add(message)
        if record.exc_info and record.exc_info[1] is not None:
            self.log.add_traceback(record.exc_info[1])


@contextmanager
def recording(path: str | Path, *, quiet: bool = False, title: str = "") -> Iterator[RunLog]:
    """Keep what this process prints in a log as well.

    Args:
        path: the log, added to.
        quiet: print nothing but errors and warnings of this package; the log has everything.
        title: first line of this recording, in the log alone.
    """
    log = RunLog(path)
    if os.environ.get("RANK", "0") != "0":
        yield log  # the main process records; the others add what made them fail
        return
    if title:
        log.add(f"--- {title}")
    out, err = _Tee(sys.stdout, log, quiet), _Tee(sys.stderr, log, quiet)
    with redirect_stdout(out), redirect_stderr(err):
        yield log


@contextmanager
def libraries_into(log: RunLog) -> Iterator[None]:
    """Send the warnings and log records of other libraries to a log; imports those in [`LIBRARIES`]."""
    screen = getattr(sys.stderr, "screen", sys.stderr)

    def keep(message, category, filename, lineno, file=None, line=None):
        if Path(filename).is_relative_to(PACKAGE):
            print(f"[first-trl] {message}", file=screen, flush=True)
        log.add(f"{category.__name__}: {filename}:{lineno}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = keep
        for name in LIBRARIES:
            __import__(name)
        from transformers.utils.logging import disable_progress_bar, enable_progress_bar

        disable_progress_bar()  # of seconds of loading and saving weights; training has its own
        handler = _LogHandler(log, screen)
        loggers = [logging.getLogger(), *map(logging.getLogger, LIBRARIES)]
        before = [logger.handlers[:] for logger in loggers]
        for logger in loggers:
            logger.handlers[:] = [handler]
        try:
            yield
        finally:
            enable_progress_bar()
            for logger, handlers in zip(loggers, before, strict=True):
                logger.handlers[:] = handlers

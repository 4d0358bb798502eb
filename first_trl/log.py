"""What a run tells its user, on the screen and in `runs/<name>/log.txt`; what libraries print goes to the log alone.

`status` is one line and [`Progress`] a bar (a line every half minute where there is no terminal), both from the main
process. While [`recording`] is on, all else that is printed goes to the log, with the time and without secrets.
"""

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from tqdm import tqdm

from .redaction import redacted

POSITION = "FIRST_TRL_POSITION"  # environment: the place of this stage's job in the run, such as 3/7
EVERY = 30.0  # seconds between two lines of progress without a terminal
# Each adds a handler of its own to its own logger when it is imported.
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "torch")

_log: "RunLog | None" = None  # of this process, while `recording` is on


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def screen():
    """Where the user reads: stderr, whatever is recorded."""
    return _log.screen if _log else sys.stderr


def status(line: str) -> None:
    """One line for the user, from the main process only."""
    if is_main_process():
        show(f"[first-trl] {line}", quiet=_log is not None and _log.quiet)


def show(line: str, quiet: bool = False) -> None:
    """One line on the screen, above a bar that is being drawn, and in the log; control characters as `?`."""
    if _log:
        _log.add(line)
    if not quiet:
        tqdm.write("".join(letter if letter.isprintable() else "?" for letter in line), file=screen())


class Progress(tqdm):
    """How far a stage is: a bar on a terminal, else a status line every half minute."""

    monitor_interval = 0  # no thread

    def __init__(self, title: str, total: float | None = None, unit: str = "steps"):
        self.drawn = is_main_process() and screen().isatty() and not (_log and _log.quiet)
        lines = "{desc}: {n_fmt} of {total_fmt}{unit}{postfix}; {remaining} left"
        options = {} if self.drawn else {"mininterval": EVERY, "delay": EVERY, "bar_format": lines}
        title, scale = f"{os.environ.get(POSITION, '')} {title}".strip(), unit == "tokens"
        options |= {"unit_scale": scale, "dynamic_ncols": True, "leave": False, "miniters": 1, "smoothing": 0}
        file = screen() if self.drawn else io.StringIO()  # what is not drawn needs not be moved by `show`
        super().__init__(desc=title, total=total, unit=f" {unit}", file=file, **options)

    def update(self, n: float | None = 1, note: str = "") -> bool | None:
        """Count `n` more units; `note` is shown beside them, such as the loss."""
        if note:
            self.set_postfix_str(note, refresh=False)
        return super().update(n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if self.drawn:
            return super().display(msg, pos)
        if msg is None:  # an empty one erases a bar
            status(str(self))
        return False


class RunLog(logging.Handler):
    """A file that lines are added to; several processes may add to it at the same time.

    As a handler it shows errors, and what this package has to say, on the screen too.
    """

    def __init__(self, path: str | Path, quiet: bool = False):
        super().__init__(logging.WARNING)
        self.path, self.quiet, self.screen, self._refused = Path(path), quiet, screen(), False
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, text: str) -> None:
        """Add lines, each with the time, secrets taken out. A full disk does not stop the job for its log."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp} {redacted(line)}\n" for line in text.splitlines() if line.strip())
        try:
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.write(lines)
        except OSError as error:
            if not self._refused:  # once, however many lines there are
                self._refused = True
                print(f"[first-trl] {self.path} cannot be written: {error.strerror}", file=sys.__stderr__)

    def add_traceback(self, error: BaseException) -> None:
        self.add("".join(traceback.format_exception(error)))

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("first_trl"):
            show(f"[first-trl] {record.getMessage()}")
        else:
            message = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}"
            show(f"[first-trl] {message}") if record.levelno >= logging.ERROR else self.add(message)
        if record.exc_info and record.exc_info[1] is not None:
            self.add_traceback(record.exc_info[1])


class _Lines(io.TextIOBase):
    """A stream whose lines go to a log, each as a carriage return left it: the last state of a progress bar."""

    def __init__(self, log: RunLog, stream):
        self.log, self.stream, self.line = log, stream, ""

    def write(self, text: str) -> int:
        *ended, last = (self.line + text).split("\n")
        for line in ended:
            self.log.add(_last_state(line))
        self.line = _last_state(last)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def _last_state(line: str) -> str:
    return line[line.rfind("\r", 0, -1) + 1 :]


@contextmanager
def recording(path: str | Path, *, quiet: bool = False, title: str = "") -> Iterator[RunLog]:
    """Send what this process prints to a log, and its status lines both there and to the screen.

    Args:
        quiet: show nothing but errors and warnings of this package; the log has everything.
        title: first line of this recording, in the log alone.
    """
    global _log
    before, log = _log, RunLog(path, quiet)
    if title and is_main_process():
        log.add(f"--- {title}")
    try:
        with redirect_stdout(_Lines(log, sys.stdout)), redirect_stderr(_Lines(log, sys.stderr)):
            _log = log
            yield log
    finally:
        _log = before


@contextmanager
def libraries_into(log: RunLog) -> Iterator[None]:
    """Send the warnings and log records of other libraries to a log; imports those in [`LIBRARIES`]."""
    for name in LIBRARIES:
        __import__(name)
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    loggers = [logging.getLogger(), *map(logging.getLogger, LIBRARIES)]
    before = [logger.handlers[:] for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        disable_progress_bar()  # of seconds of loading and saving weights; training has its own
        for logger in loggers:
            logger.handlers[:] = [log]
        try:
            yield
        finally:
            enable_progress_bar()
            logging.captureWarnings(False)
            for logger, handlers in zip(loggers, before, strict=True):
                logger.handlers[:] = handlers

"""What a run tells its user, on the screen and in `runs/<name>/log.txt`; what libraries print goes to the log alone.

`status` is one line and [`Progress`] a bar (a line every half minute where there is no terminal), both from the main
process. While [`recording`] is on, all else that is printed goes to the log, with the time and without secrets.
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
POSITION = "FIRST_TRL_POSITION"  # environment: the place of this stage's job in the run, such as 3/7
EVERY = 30.0  # seconds between two lines of progress without a terminal
# Each hangs a handler of its own on its own logger when it is imported.
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "torch")


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def screen():
    """Where the user reads: stderr, whatever is recorded."""
    return getattr(sys.stderr, "screen", sys.stderr)


def status(line: str) -> None:
    """One line for the user, from the main process only."""
    if is_main_process():
        show(f"[first-trl] {line}", quiet=getattr(sys.stderr, "quiet", False))


def show(line: str, quiet: bool = False) -> None:
    """One line on the screen, above a bar that is being drawn, and in the log; control characters as `?`."""
    if log := getattr(sys.stderr, "log", None):
        log.add(line)
    if not quiet:
        line = "".join(character if character.isprintable() else "?" for character in line)  # no escapes of others
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=screen())
        else:
            print(line, file=screen(), flush=True)


class Progress:
    """How far a stage is: a bar on a terminal, else a line every half minute.

    Args:
        title: of the job.
        total: how many units it has; None where that is not known yet.
        unit: what is counted.
    """

    def __init__(self, title: str, total: float | None = None, unit: str = "steps"):
        position = os.environ.get(POSITION, "")
        self.title, self.unit, self.total = f"{position} {title}".strip(), unit, total
        self.n, self.note, self._started = 0.0, "", time.monotonic()
        self._said, self._bar = self._started, None
        if is_main_process() and not getattr(sys.stderr, "quiet", False) and screen().isatty():
            from tqdm import tqdm

            options = {"unit": f" {unit}", "unit_scale": unit == "tokens", "dynamic_ncols": True, "leave": False}
            self._bar = tqdm(desc=self.title, total=total, file=screen(), **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def update(self, n: float = 1, note: str = "") -> None:
        """Count `n` more units; `note` is shown beside them, such as the loss."""
        self.n, self.note = self.n + n, note or self.note
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            status(str(self))

    def __str__(self) -> str:
        of = f" of {self.total:.0f}" if self.total else ""
        left = ""
        if self.total and self.n:
            seconds = (time.monotonic() - self._started) * (self.total - self.n) / self.n
            left = f"; {max(seconds, 0) / 60:.0f} min left" if seconds >= 90 else f"; {max(seconds, 0):.0f} s left"
        return f"{self.title}: {self.n:.0f}{of} {self.unit}{f', {self.note}' if self.note else ''}{left}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class RunLog:
    """A file that lines are added to; several processes may add to it at the same time."""

    def __init__(self, path: str | Path):
        self.path, self._refused = Path(path), False
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


class _ToLog:
    """A stream whose lines go to a log, each as a carriage return left it: the last state of a progress bar."""

    def __init__(self, screen, log: RunLog, quiet: bool):
        self.screen, self.log, self.quiet, self.line = screen, log, quiet, ""

    def write(self, text: str) -> int:
        *ended, self.line = (self.line + text).split("\n")
        for line in ended:
            self.log.add(_after_carriage_return(line))
        self.line = _after_carriage_return(self.line)
        return len(text)

    def flush(self) -> None:
        self.screen.flush()

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str):
        return getattr(self.screen, name)


def _after_carriage_return(line: str) -> str:
    return line[line.rfind("\r", 0, -1) + 1 :]


class _LogHandler(logging.Handler):
    """Records of loggers into the log; on the screen only errors, and what this package has to say."""

    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.startswith("first_trl")
        message = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}"
        if ours or record.levelno >= logging.ERROR:
            show(f"[first-trl] {record.getMessage() if ours else message}")
        else:
            self.log.add(message)
        if record.exc_info and record.exc_info[1] is not None:
            self.log.add_traceback(record.exc_info[1])


@contextmanager
def recording(path: str | Path, *, quiet: bool = False, title: str = "") -> Iterator[RunLog]:
    """Send what this process prints to a log, and its status lines both there and to the screen.

    Args:
        path: the log, added to.
        quiet: show nothing but errors and warnings of this package; the log has everything.
        title: first line of this recording, in the log alone.
    """
    log = RunLog(path)
    if title and is_main_process():
        log.add(f"--- {title}")
    with redirect_stdout(_ToLog(sys.stdout, log, quiet)), redirect_stderr(_ToLog(sys.stderr, log, quiet)):
        yield log


@contextmanager
def libraries_into(log: RunLog) -> Iterator[None]:
    """Send the warnings and log records of other libraries to a log; imports those in [`LIBRARIES`]."""

    def keep(message, category, filename, lineno, file=None, line=None):
        if Path(filename).is_relative_to(PACKAGE):
            show(f"[first-trl] {message}")
        log.add(f"{category.__name__}: {filename}:{lineno}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = keep
        for name in LIBRARIES:
            __import__(name)
        from transformers.utils.logging import disable_progress_bar, enable_progress_bar

        disable_progress_bar()  # of seconds of loading and saving weights; training has its own
        handler = _LogHandler(log)
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

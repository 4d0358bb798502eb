"""Ends that come from outside: Ctrl-C, SIGTERM, and a parent that is gone. Nothing is left running behind.

`first-trl` runs each stage in a process group of its own and passes on what ends it; a stage ends with its parent even
where that is killed (Linux). What a stage had finished stays: the same command continues.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

INTERRUPTED = "interrupted; the same command continues"
PARENT = "FIRST_TRL_PARENT"  # environment: the process that waits for this one, and tells the user how it ended
GRACE = 20.0  # seconds that a stage has to end after a signal
_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, to be handled as Ctrl-C is."""


def exit_status(error: KeyboardInterrupt) -> int:
    """As a shell gives it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def raise_on_sigterm() -> None:
    """Let SIGTERM raise [`Terminated`], so that files are closed and locks released; main thread only."""

    def terminate(number, frame):
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


def follow_parent() -> bool:
    """End this process when the one that started it for the user does; returns whether there is such a one."""
    if PARENT not in os.environ:
        return False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us in the background
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(int(os.environ[PARENT]), 0)
    except ProcessLookupError:  # it ended before we could ask for a signal
        raise Terminated from None
    return True


def run_child(command: list[str], environment: dict[str, str]) -> int:
    """Run a command in a process group of its own, passing on Ctrl-C and SIGTERM; returns its exit status.

    A second signal, or the end of the grace, kills the group. The status of a killed command is 128 + the signal.
    """
    environment = {**environment, PARENT: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)

    def to_group(number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    try:
        code = process.wait()
    except KeyboardInterrupt as error:
        code = exit_status(error)
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            to_group(code - 128)
            process.wait(GRACE)
        to_group(signal.SIGKILL)
        process.wait()
    if code < 0:
        to_group(signal.SIGKILL)  # what is left of the group
    return 128 - code if code < 0 else code


def accelerate_launch() -> None:
    """`accelerate launch` without tracebacks of its own: the stages say what is wrong, and end on the same signal."""
    follow_parent()
    passed_on: list[int] = []

    def pass_on(number, frame):  # the group has had the signal too, but where the parent was killed
        if str(os.getppid()) != os.environ.get(PARENT) and not passed_on:
            passed_on.append(number)
            os.killpg(0, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    sys.excepthook = lambda *error: None
    from accelerate.commands.launch import main

    main()

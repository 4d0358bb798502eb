"""Whoever stops a command gets one line and the shell's exit status, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from first_trl import __main__ as command
from first_trl.interrupts import run_child
from tests.cache_recipe import write_recipe

STAGE = """
import os, sys, time
from first_trl.interrupts import exit_status, follow_parent, raise_on_sigterm
follow_parent(), raise_on_sigterm()
open(sys.argv[1], "w").write(str(os.getpid()))
try:
    time.sleep(60)
except KeyboardInterrupt as error:
    sys.exit(exit_status(error))
"""
PARENT = f"""
import os, sys
from first_trl.interrupts import raise_on_sigterm, run_child
raise_on_sigterm()
sys.exit(run_child([sys.executable, "-c", {STAGE!r}, sys.argv[1]], dict(os.environ)))
"""
ENDS = pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])


def wait_for(true, seconds=60):
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="a killed parent is noticed on Linux alone")
@ENDS
def test_a_signal_to_the_command_alone_ends_its_stage_as_well(tmp_path, number, status):
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)])
    assert wait_for(lambda: file.exists() and file.read_text())
    parent.send_signal(getattr(signal, number))
    assert parent.wait(timeout=30) == status
    assert wait_for(lambda: gone(int(file.read_text())), 10), "an orphan"


def test_a_child_that_does_not_end_is_killed_and_the_status_of_a_killed_one_is_a_shells(monkeypatch):
    deaf = "import os, signal, time; signal.signal(2, signal.SIG_IGN); os.kill(os.getppid(), 2); time.sleep(60)"
    monkeypatch.setattr("first_trl.interrupts.GRACE", 1.0)
    killed, failed = "import os; os.kill(os.getpid(), 9)", "raise SystemExit(3)"
    codes = [run_child([sys.executable, "-c", code], dict(os.environ)) for code in (deaf, killed, failed)]
    assert codes == [130, 137, 3]


@pytest.mark.parametrize("arguments", [["predict", "s"], ["plan", "r"], ["cache", "verify", "c"], ["run", "r"]])
def test_every_command_ends_in_one_line_and_130(monkeypatch, capsys, arguments):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run_alone", interrupted)
    monkeypatch.setattr(command, "run_recipe", interrupted)
    assert command.main(arguments) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "interrupted" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--config_file", "configs/cpu.yaml"]])
@ENDS
def test_a_stage_that_trains_ends_with_one_line_and_without_orphans(tmp_path, number, status, options):
    recipe, root = write_recipe(tmp_path / "job"), Path(__file__).parent.parent
    log = tmp_path / "job" / "runs" / "tiny" / "log.txt"
    settings = ["--distill.max_steps", "100000", "--distill.logging_steps", "1"]
    for stage in ("cache", "distill"):
        command = [sys.executable, "-m", "first_trl", stage, str(recipe), *settings, *options]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root)
        if stage == "cache":
            assert run.wait(timeout=240) == 0
    assert wait_for(lambda: "step 2:" in log.read_text(), 240)
    run.send_signal(getattr(signal, number))
    _, said = run.communicate(timeout=60)
    assert run.returncode == status and "Traceback" not in said
    assert said.strip().endswith("interrupted; the same command continues") or status == -9

    def ended():
        alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        return f"distill {recipe}" not in alive.replace(".py", "")

    assert wait_for(ended, 10)

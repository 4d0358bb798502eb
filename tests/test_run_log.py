"""What a run prints is kept; what goes wrong is one line for the user, and everything for the log."""

import argparse
import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from first_trl import __main__ as command_line
from first_trl import failures
from first_trl.errors import FirstTrlError
from first_trl.interrupts import Terminated
from first_trl.log import Progress, libraries_into, recording, status
from first_trl.redaction import redacted
from first_trl.stages import command
from tests.cache_recipe import write_recipe

TOKEN = "hf_" + "a" * 30


def lines_of(log):
    """The lines of a log without their times."""
    return [line.split(" ", 2)[2] for line in log.read_text().splitlines()]


def test_status_lines_are_shown_and_logged_and_what_else_is_printed_is_logged_alone(tmp_path, capsys):
    with recording(tmp_path / "run" / "log.txt", title="first-trl cache r.yaml"):
        print("{'loss': 3.1}")
        status("cache: wrote \x1b[31mit")
        print("no end of line", end="")
        print(", and its end")
    assert capsys.readouterr() == ("", "[first-trl] cache: wrote ?[31mit\n"), "no escapes of others on a terminal"
    assert lines_of(tmp_path / "run" / "log.txt") == [
        "--- first-trl cache r.yaml", "{'loss': 3.1}", "[first-trl] cache: wrote \x1b[31mit",
        "no end of line, and its end",
    ]  # fmt: skip


def test_quiet_prints_nothing_and_logs_everything(tmp_path, capsys):
    with recording(tmp_path / "log.txt", quiet=True):
        print("rows: 3")
        status("done")
        with Progress("cache", 3) as progress:
            progress.update(3)
    assert capsys.readouterr() == ("", "") and lines_of(tmp_path / "log.txt") == ["rows: 3", "[first-trl] done"]


def test_of_a_progress_bar_of_others_the_log_keeps_the_last_state(tmp_path, capsys):
    from tqdm import tqdm

    with recording(tmp_path / "log.txt"):
        for _ in tqdm(range(500), mininterval=0):
            pass
        print("after", file=sys.stderr)
    bar, after = lines_of(tmp_path / "log.txt")
    assert "500/500" in bar and after == "after" and capsys.readouterr() == ("", "")


def test_progress_is_a_line_every_half_minute_without_a_terminal_and_names_its_place(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setenv("FIRST_TRL_POSITION", "3/7")
    with recording(tmp_path / "log.txt"), Progress("distill.first", 1000) as progress:
        for _ in range(100):
            now[0] += 0.7
            progress.update(note="loss 0.5")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and shown == lines_of(tmp_path / "log.txt")
    assert shown[0] == "[first-trl] 3/7 distill.first: 43 of 1000 steps, loss 0.5; 11:09 left"


def test_progress_is_one_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    with recording(tmp_path / "log.txt"), Progress("sft", 4) as progress:
        progress.update(3, "loss 0.5")
        status("above it")
    bar = screen.getvalue()
    assert "sft:  75%" in bar and "loss 0.5" in bar and "[first-trl] above it\n" in bar
    assert lines_of(tmp_path / "log.txt") == ["[first-trl] above it"]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capfd):
    (tmp_path / "log.txt").mkdir()
    with recording(tmp_path / "log.txt"):
        for _ in range(5):
            print("a line")
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_no_secret_reaches_a_log(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    with recording(tmp_path / "log.txt") as log:
        print(f"logged in with {TOKEN} and correct-horse-battery")
        print("GET https://me:battery@host/x Authorization: Bearer abcdefghijkl")
        log.add_traceback(ValueError(f"bad token {TOKEN}"))
    text = (tmp_path / "log.txt").read_text()
    assert TOKEN not in text and "battery" not in text and "abcdefghijkl" not in text
    assert text.count("(not shown)") == 5
    assert redacted("Bearer of news, at http://host:80/x") == "Bearer of news, at http://host:80/x"


def test_warnings_of_libraries_go_to_the_log_alone_ours_are_shown_and_all_is_as_before_afterwards(tmp_path, capsys):
    import datasets  # noqa: F401  adds its handler

    before = logging.getLogger("datasets").handlers[:], logging.getLogger().handlers[:], sys.stdout, sys.stderr
    with recording(tmp_path / "log.txt") as log, libraries_into(log):
        warnings.warn("theirs is deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.somewhere").warning("a tip of transformers")
        logging.getLogger("accelerate").warning("a tip of accelerate")
        logging.getLogger("first_trl.trainer").warning("the student's mass is low")
        logging.getLogger("torch").error("a library's error")
    assert before == (logging.getLogger("datasets").handlers, logging.getLogger().handlers, sys.stdout, sys.stderr)
    shown, kept = capsys.readouterr().err, (tmp_path / "log.txt").read_text()
    for words in ("theirs is deprecated", "a tip of transformers", "a tip of accelerate"):
        assert words in kept and words not in shown
    for words in ("the student's mass is low", "a library's error"):
        assert words in kept and words in shown


def test_only_the_main_process_shows_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with recording(tmp_path / "log.txt", title="not from here") as log:
        print("rows: 3")
        status("not from here")
        log.add("but this")
    assert capsys.readouterr() == ("", "") and lines_of(tmp_path / "log.txt") == ["rows: 3", "but this"]


def run(monkeypatch, tmp_path, error):
    """The one line that a stage `cache` ends with when its work raises `error`, and its log."""
    recipe, options = SimpleNamespace(run_folder=tmp_path), argparse.Namespace(quiet=False)
    monkeypatch.setattr(command, "parse_stage", lambda stage, argv: (recipe, options))

    def work(recipe, options):
        raise error

    with pytest.raises(SystemExit) as stop:
        command.stage_command("cache")(work)([])
    return stop.value.code, (tmp_path / "log.txt").read_text()


def test_an_unexpected_error_is_one_line_that_names_its_process_and_its_traceback_is_in_the_log(
    monkeypatch, tmp_path, capsys
):
    line, log = run(monkeypatch, tmp_path, KeyError(f"shape {TOKEN}"))
    place = f"(unexpected; traceback in {tmp_path / 'log.txt'})"
    assert line == f"[first-trl] cache failed: KeyError: 'shape (not shown)' {place}"
    assert "Traceback (most recent call last)" in log and "in work" in log and TOKEN not in log
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "5")
    line, log = run(monkeypatch, tmp_path, TypeError("x"))
    assert line.startswith("[first-trl] cache failed in process 5: TypeError: x") and line in log


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_who_stops_a_run_is_told_that_it_continues(monkeypatch, tmp_path, capsys, error, code):
    assert run(monkeypatch, tmp_path, error)[0] == code
    assert capsys.readouterr().err == "[first-trl] interrupted; the same command continues\n"


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "larger than the system allows"),
        (RuntimeError("SafetensorError: I/O error: Disk quota exceeded (os error 122)"), "quota is used up"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "larger than"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 702848 vs 702740"), "disk is full"),
        (PermissionError(errno.EROFS, "Read-only file system", "/mnt/teacher"), "/mnt/teacher cannot be"),
    ],
)
def test_a_disk_that_takes_no_more_is_called_that(error, name):
    told = failures.explain(error, "sft")
    assert name in told and "output_dir" in told and "loaded" not in told


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("sft", "halve sft.per_device_train_batch_size and double sft.gradient_accumulation_steps"),
        ("cache", "halve cache.tokens_per_batch"),
        ("push", "close other programs"),
    ],
)
def test_out_of_memory_comes_with_what_to_change(stage, advice):
    import torch

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4e14 bytes"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        told = failures.explain(error, stage)
        assert told.startswith("out of memory (") and advice in told and told.endswith(failures.AGAIN)


def test_an_error_that_nobody_foresaw_is_not_explained():
    assert failures.explain(json.JSONDecodeError("Expecting value", "", 0), "calibrate") is None


def test_a_mistake_in_the_data_is_one_clear_message_through_the_whole_command(tmp_path):
    recipe = write_recipe(tmp_path / "job", rows=8)
    with open(tmp_path / "job" / "train.jsonl", "a") as file:
        file.write('{"text": "a film", "label": null}\n')
    command = [sys.executable, "-m", "first_trl", "run", str(recipe), "--stages", "cache", "--skip_checks"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    *_, told, last = [line for line in done.stderr.splitlines() if line.startswith("[first-trl]")]
    assert told.startswith("[first-trl] cache failed: datasets.train, row 8: ") and "{label} is missing" in told
    assert last == "[first-trl] cache failed (exit status 1); run the same command again to continue from here"
    log = (tmp_path / "job" / "runs" / "tiny" / "log.txt").read_text()
    assert "Traceback" in log and told in log and last in log


def test_a_quiet_stage_prints_nothing_and_its_summary_is_in_the_log(tmp_path, monkeypatch, capsys):
    from first_trl.stages import cache

    folder = tmp_path / "job"
    recipe = write_recipe(folder, rows=8)
    capsys.readouterr()  # what the tiny teacher printed
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cache.main([str(recipe), "--quiet"])
    assert capsys.readouterr() == ("", "")
    summary = next(line for line in lines_of(folder / "runs" / "tiny" / "log.txt") if "; next: " in line)
    assert f"read {folder}/teacher, {folder}/train.jsonl, {folder}/validation.jsonl; wrote " in summary
    assert f"wrote {folder}/runs/tiny/cache/train, " in summary and summary.endswith("; next: calibrate")


@pytest.mark.parametrize(
    ("code", "told"), [(137, "memory: halve cache.tokens_per_batch"), (1, "status 1 and no message"), (143, "")]
)
def test_a_stage_that_ends_without_a_message_is_explained_by_its_status(tmp_path, monkeypatch, capsys, code, told):
    recipe = write_recipe(tmp_path / "job", rows=8)
    monkeypatch.setattr(command_line, "run_child", lambda *_: code)
    capsys.readouterr()
    assert command_line.main(["run", str(recipe), "--stages", "cache", "--skip_checks"]) == code
    said = capsys.readouterr().err
    assert told in said and ("memory" in said) == (code == 137) and ("interrupted" in said) == (code == 143)


@pytest.mark.parametrize("kind", ["file", "dangling link", "read-only"])
def test_an_output_dir_that_cannot_be_written_is_one_line(tmp_path, kind):
    from first_trl.stages import calibrate

    recipe, place = write_recipe(tmp_path / "job", rows=8), tmp_path / "place"
    if kind == "file":
        place.write_text("")
    elif kind == "dangling link":
        place.symlink_to("/proc/nowhere")
    else:
        place = Path("/proc")
    with pytest.raises(SystemExit) as stop:
        calibrate.main([str(recipe), f"--output_dir={place}"])
    assert re.search(r"calibrate failed: \S+ cannot be written \(.+\); correct name or output_dir$", stop.value.code)


def test_a_vocabulary_is_no_credential():
    from first_trl.redaction import refuse_leaks

    refuse_leaks("tokenizer.json", '{"?key=": 12, "&token=":13,"://":5,":":6,"@":7}')
    for text in ('{"url": "https://me:word@host/x"}', '{"url": "http://host/x?key=abc"}'):
        with pytest.raises(FirstTrlError, match="recipe.yaml holds an access token"):
            refuse_leaks("recipe.yaml", text)

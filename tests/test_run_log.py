"""What a run prints is kept; what goes wrong is one line for the user, and everything for the log."""

import argparse
import errno
import json
import logging
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from first_trl import failures
from first_trl.log import libraries_into, recording, status
from first_trl.redaction import redacted
from first_trl.stages import command
from tests.cache_recipe import write_recipe

TOKEN = "hf_" + "a" * 30


def test_what_is_printed_is_on_the_screen_and_in_the_log(tmp_path, capsys):
    with recording(tmp_path / "run" / "log.txt", title="first-trl cache r.yaml"):
        print("rows: 3")
        status("cache: wrote it")
        print("no end of line", end="")
        print(", and its end")
    out, err = capsys.readouterr()
    assert out == "rows: 3\nno end of line, and its end\n" and err == "[first-trl] cache: wrote it\n"
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert lines == [
        "--- first-trl cache r.yaml",
        "rows: 3",
        "[first-trl] cache: wrote it",
        "no end of line, and its end",
    ]


def test_quiet_prints_nothing_and_logs_everything(tmp_path, capsys):
    with recording(tmp_path / "log.txt", quiet=True):
        print("rows: 3")
        status("done")
    assert capsys.readouterr() == ("", "")
    assert "rows: 3" in (tmp_path / "log.txt").read_text() and "done" in (tmp_path / "log.txt").read_text()


def test_of_a_progress_bar_the_log_keeps_the_last_state(tmp_path, capsys):
    from tqdm import tqdm

    with recording(tmp_path / "log.txt"):
        for _ in tqdm(range(500), mininterval=0):
            pass
        print("after", file=sys.stderr)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 2 and "500/500" in lines[0] and lines[1].endswith("after")


def test_no_secret_reaches_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    with recording(tmp_path / "log.txt") as log:
        print(f"logged in with {TOKEN} and correct-horse-battery")
        print("GET https://me:battery@host/x Authorization: Bearer abcdefghijkl")
        try:
            raise ValueError(f"bad token {TOKEN}")
        except ValueError as error:
            log.add_traceback(error)
    text = (tmp_path / "log.txt").read_text()
    assert TOKEN not in text and "battery" not in text and "abcdefghijkl" not in text
    assert text.count("(not shown)") == 5
    assert redacted("Bearer of news, at http://host:80/x") == "Bearer of news, at http://host:80/x"


def test_warnings_of_libraries_go_to_the_log_alone_and_ours_are_shown(tmp_path, capsys):
    with recording(tmp_path / "log.txt") as log, libraries_into(log):
        warnings.warn("theirs is deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.somewhere").warning("a tip of transformers")
        logging.getLogger("accelerate").warning("a tip of accelerate")
        logging.getLogger("first_trl.trainer").warning("the student's mass is low")
        logging.getLogger("torch").error("a library's error")
    shown = capsys.readouterr().err
    kept = (tmp_path / "log.txt").read_text()
    for words in ("theirs is deprecated", "a tip of transformers", "a tip of accelerate"):
        assert words in kept and words not in shown
    for words in ("the student's mass is low", "a library's error"):
        assert words in kept and words in shown


def test_loggers_and_streams_are_as_before_afterwards(tmp_path):
    before = logging.getLogger("datasets").handlers[:], logging.getLogger().handlers[:], sys.stdout, sys.stderr
    with recording(tmp_path / "log.txt") as log, libraries_into(log):
        pass
    assert before == (logging.getLogger("datasets").handlers[:], logging.getLogger().handlers[:], *before[2:])
    assert (sys.stdout, sys.stderr) == before[2:]


def test_only_the_main_process_records_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with recording(tmp_path / "log.txt") as log:
        print("rows: 3")
        status("not from here")
        log.add("but this")
    assert capsys.readouterr() == ("rows: 3\n", "")
    assert (tmp_path / "log.txt").read_text().endswith("but this\n")


def run(monkeypatch, tmp_path, error, quiet=False):
    """The one line that a stage `cache` ends with when its work raises `error`, and its log."""
    recipe = SimpleNamespace(run_folder=tmp_path)
    options = argparse.Namespace(quiet=quiet)
    monkeypatch.setattr(command, "parse_stage", lambda stage, argv: (recipe, options))

    def work(recipe, options):
        raise error

    with pytest.raises(SystemExit) as stop:
        command.stage_command("cache")(work)([])
    return stop.value.code, (tmp_path / "log.txt").read_text()


def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_the_log(monkeypatch, tmp_path, capsys):
    line, log = run(monkeypatch, tmp_path, KeyError(f"shape {TOKEN}"))
    assert line == (
        f"[first-trl] cache failed: KeyError: 'shape (not shown)' (unexpected; traceback in {tmp_path / 'log.txt'})"
    )
    assert "Traceback (most recent call last)" in log and "in work" in log and TOKEN not in log
    assert capsys.readouterr() == ("", "")


def test_who_stops_a_run_is_told_nothing_they_do_not_know(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, KeyboardInterrupt())[0] == 130


def test_an_error_of_another_process_says_which(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "5")
    line, log = run(monkeypatch, tmp_path, TypeError("x"))
    assert line.startswith("[first-trl] cache failed in process 5: TypeError: x") and line in log


def test_a_mistake_that_we_name_is_told_without_a_word_more():
    from first_trl.cache.reader import open_cache

    with pytest.raises(ValueError) as error:
        open_cache("nowhere at all")
    assert failures.explain(error.value, "calibrate") == str(error.value)
    try:
        json.loads("{")
    except ValueError as unexpected:
        assert failures.explain(unexpected, "calibrate") is None  # a ValueError, but nobody here wrote its message


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("sft", "halve sft.per_device_train_batch_size and double sft.gradient_accumulation_steps"),
        ("distill", "halve distill.per_device_train_batch_size and double distill.gradient_accumulation_steps"),
        ("cache", "halve cache.tokens_per_batch"),
        ("evaluate", "halve evaluate.tokens_per_batch"),
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


def first_trl(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "first_trl", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_a_mistake_in_the_data_is_one_clear_message_through_the_whole_command(tmp_path):
    recipe = write_recipe(tmp_path / "job", rows=8)
    with open(tmp_path / "job" / "train.jsonl", "a") as file:
        file.write('{"text": "a film", "label": null}\n')
    done = first_trl(tmp_path, "run", str(recipe), "--stages", "cache")
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    *_, told, last = [line for line in done.stderr.splitlines() if line.startswith("[first-trl]")]
    assert told == (
        "[first-trl] cache failed: datasets.train, row 8: "
        "template ' {label}': {label} is missing (None) in this row; fill it or drop "
        "the row from the dataset"
    )
    assert last == "[first-trl] cache failed (exit status 1); run the same command again to continue from here"
    log = (tmp_path / "job" / "runs" / "tiny" / "log.txt").read_text()
    assert "Traceback" in log and told in log and last in log


def test_a_quiet_stage_prints_nothing_and_its_summary_is_in_the_log(tmp_path, monkeypatch, capsys):
    from first_trl.stages import cache

    recipe = write_recipe(tmp_path / "job", rows=8)
    capsys.readouterr()  # what the tiny teacher printed
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cache.main([str(recipe), "--quiet"])
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "job" / "runs" / "tiny" / "log.txt").read_text()
    folder = tmp_path / "job"
    summary = next(line for line in log.splitlines() if "; next: " in line)
    assert f"read {folder}/teacher, {folder}/train.jsonl, {folder}/validation.jsonl; wrote " in summary
    assert f"wrote {folder}/runs/tiny/cache/train, " in summary and summary.endswith("; next: calibrate")


def test_a_process_that_the_system_ends_for_its_memory_is_told_as_such(tmp_path, monkeypatch, capsys):
    from first_trl import __main__ as command

    recipe = write_recipe(tmp_path / "job", rows=8)

    def killed(stage, arguments, config_file):
        with recording(tmp_path / "job" / "runs" / "tiny" / "log.txt", title="first-trl cache"):
            pass
        return 1

    monkeypatch.setattr(command, "launch", killed)
    assert command.main(["run", str(recipe), "--stages", "cache"]) == 1
    assert "takes too much memory: halve cache.tokens_per_batch" in capsys.readouterr().err

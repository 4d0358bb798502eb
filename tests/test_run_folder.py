"""Work is skipped exactly when nothing it was made from has changed and its outputs are there."""

import os

import pytest

from first_trl.files import path_fingerprint, write_atomically
from first_trl.run import RunFolder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "out").mkdir()
    run = RunFolder(tmp_path)
    run.start("cache", {"k": 5})
    run.finish("cache", {"k": 5}, ["out"], seconds=1.0)
    return run


def test_finished_work_is_current_until_its_inputs_change(run):
    assert run.is_current("cache", {"k": 5})
    assert not run.is_current("cache", {"k": 6})
    assert not run.is_current("calibrate", {"k": 5})


def test_deleted_outputs_make_work_stale_and_take_its_identity_away(run):
    assert run.identity("cache")
    (run.path / "out").rmdir()
    assert not run.is_current("cache", {"k": 5})
    assert run.identity("cache") is None


def test_redoing_work_gives_it_a_new_identity(run):
    before = run.identity("cache")
    run.finish("cache", {"k": 5}, ["out"], seconds=1.0)
    assert run.identity("cache") != before


def test_an_interrupted_attempt_continues_only_from_the_same_inputs(run):
    assert run.start("distill.first", {"rate": 1}) is False
    assert run.start("distill.first", {"rate": 1}) is True
    assert run.start("distill.first", {"rate": 2}) is False


def test_work_that_another_process_makes_is_refused_by_name_until_that_ends(run):
    with run.lock("sft"):
        with pytest.raises(ValueError, match=rf"sft of .* is being written by process {os.getpid()} on host"):
            with RunFolder(run.path).lock("sft"):
                pass
        with RunFolder(run.path).lock("cache"):
            pass  # other work is free
    with RunFolder(run.path).lock("sft"):
        pass
    assert not (run.path / ".records" / "sft.holder").exists()


def test_tuples_and_lists_are_the_same_input(run):
    run.finish("cache", {"methods": ("a", "b")}, ["out"], seconds=1.0)
    assert run.is_current("cache", {"methods": ["a", "b"]})


def test_a_fingerprint_follows_contents_and_names_not_times(tmp_path):
    (tmp_path / "a").write_text("one")
    before = path_fingerprint(tmp_path)
    (tmp_path / "a").touch()
    assert path_fingerprint(tmp_path) == before
    (tmp_path / "a").write_text("two")
    assert path_fingerprint(tmp_path) != before


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "value.json"
    write_atomically(file, "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        write_atomically(file, "new")
    assert file.read_text() == "old"

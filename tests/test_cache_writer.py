"""A cache is written once, by one job, and survives whatever happens to that job."""

import errno
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from first_trl.cache.format import CacheError
from first_trl.cache.reader import open_cache
from first_trl.cache.writer import CacheWriter
from first_trl.errors import FirstTrlError
from first_trl.failures import explain
from tests.cache_samples import (
    contents,
    description,
    hold_lock,
    make_row,
    make_rows,
    small_job,
    whole_job,
    write_cache,
    write_share,
)

pytestmark = pytest.mark.usefixtures("arrow_files")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def processes():
    """Processes that start quickly: forked off a server that has the libraries imported and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cache_samples"])
    started = []

    def start(target, *arguments):
        started.append(context.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def num_shards(path):
    return len(list(path.glob("train-*.parquet")))


@pytest.mark.parametrize(
    ("kills", "shards", "by"),
    [
        (4, 60, signal.SIGKILL),
        (2, 30, signal.SIGTERM),
        pytest.param(30, 300, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_job_killed_again_and_again_ends_with_the_same_bytes(tmp_path, path, processes, kills, shards, by):
    rows, log, dice = 2 * shards - 1, tmp_path / "log", random.Random(kills)
    whole_job(tmp_path / "undisturbed", tmp_path / "unused", rows)
    for kill in range(kills):
        job = processes(whole_job, path, log, rows)
        done = num_shards(path) if path.exists() else 0
        goal = dice.randint(
            done + 1, max(done + 1, 2 * shards // 3 * (kill + 1) // kills)
        )  # the last kill comes before the end
        wait_until(lambda goal=goal: num_shards(path) >= goal)
        time.sleep(dice.random() * 0.01)
        os.kill(job.pid, by)
        job.join()
        assert job.exitcode == -by
        assert all(small_job(path).shard_is_complete(int(file.stem[-6:])) for file in path.glob("train-*"))
    assert not (path / "manifest.json").exists()
    whole_job(path, log, rows)
    assert contents(path) == contents(tmp_path / "undisturbed")
    computed = log.read_text().split()
    assert len(set(computed)) == shards and len(computed) <= shards + kills
    assert not list(path.glob(".*.tmp"))
    open_cache(path)


def test_a_job_that_lost_one_of_three_processes_is_finished_by_two(tmp_path, path, processes):
    whole_job(tmp_path / "undisturbed", tmp_path / "unused", 59)
    with small_job(path).hold() as writer:
        ranks = [processes(write_share, path, tmp_path / "log", 59, rank, 3, rank == 1) for rank in range(3)]
        for rank in (ranks[0], ranks[2]):
            rank.join()
        ranks[1].kill()
        ranks[1].join()
        with pytest.raises(CacheError, match=r"train-00000\d.parquet is missing.* the others are kept"):
            writer.finish(59)
    assert not (path / "manifest.json").exists()
    with small_job(path).hold() as writer:
        for rank in [processes(write_share, path, tmp_path / "log", 59, rank, 2) for rank in range(2)]:
            rank.join()
        writer.finish(59)
    assert contents(path) == contents(tmp_path / "undisturbed")


def test_a_second_writer_is_refused_with_the_pid_and_host_of_the_first(tmp_path, path, processes):
    holder = processes(hold_lock, path, tmp_path / "ready")
    wait_until((tmp_path / "ready").exists)
    with pytest.raises(FirstTrlError, match=f"written by process {holder.pid} on host {os.uname().nodename}"):
        small_job(path).hold().__enter__()
    holder.kill()
    holder.join()
    whole_job(path, tmp_path / "log", 5)  # the dead process holds nothing
    assert len(open_cache(path).dataset) == 5


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_manifest_comes_last(tmp_path, path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(("fsync", file, os.path.getsize(file) if os.path.isfile(file) else None))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_cache(path / "deep", make_rows(8))
    folder, targets = str(path / "deep"), []
    _, *files = zip(*[iter(events)] * 3, strict=True)  # the first is the note of who holds the folder
    for synced, renamed, listed in files:
        assert synced[0] == "fsync" and renamed[:2] == ("replace", synced[1]) and listed == ("fsync", folder, None)
        assert os.path.basename(synced[1]).startswith(".") and renamed[2] != synced[1]
        assert synced[2] == os.path.getsize(renamed[2])  # all of it was there to be synced
        targets.append(os.path.basename(renamed[2]))
    assert targets == ["train-000000.parquet", "train-000001.parquet", "manifest.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "file size"])
def test_a_full_disk_leaves_the_finished_shards_and_can_be_finished(path, monkeypatch, failing):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows, limits = make_rows(8), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fails(write, *arguments):
        before = {file: file.read_bytes() for file in path.iterdir()}
        try:
            if failing == "file size":
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
            else:
                monkeypatch.setattr(os, failing, no_space)
            with pytest.raises(OSError, match="No space left|File too large") as raised:
                write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            monkeypatch.undo()
        assert "finished work is kept" in explain(raised.value, "cache")
        assert {file: file.read_bytes() for file in path.iterdir()} == before

    with CacheWriter(path, description(), top_k=5, rows_per_shard=4).hold() as writer:
        writer.write_shard(0, rows[:4])
        fails(writer.write_shard, 1, rows[4:])
        assert writer.shard_is_complete(0) and not writer.shard_is_complete(1)
        writer.write_shard(1, rows[4:])
        fails(writer.finish, 8)
        writer.finish(8)


OTHER_JOBS = {
    "teacher": ({"teacher": {**description()["teacher"], "revision": "def"}}, "revision is 'abc123', expected 'def'"),
    "an entry less": ({"dataset": {"path": "json"}}, "dataset.split is 'train', expected 'absent'"),
    "an entry more": ({"backend": {"name": "vllm"}}, "backend is 'absent', expected {'name': 'vllm'}"),
    "K": ({"top_k": 3}, "top_k is 5, expected 3"),
    "shard size": ({"rows_per_shard": 5}, "rows_per_shard is 4, expected 5"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", OTHER_JOBS)
def test_the_work_of_another_job_is_refused_with_what_differs(path, name, finished):
    changes, difference = OTHER_JOBS[name]
    write_cache(path, make_rows(6))
    if not finished:
        (path / "manifest.json").unlink()
    before = contents(path)
    with pytest.raises(CacheError) as raised:
        write_cache(path, make_rows(6, top_k=changes.get("top_k", 5)), **changes)
    assert difference in str(raised.value) and "Choose another folder, delete this one" in str(raised.value)
    assert ("unfinished" in str(raised.value)) is not finished
    assert contents(path) == before


def test_the_work_of_another_job_is_removed_and_reported_when_asked_for(path, caplog):
    write_cache(path, make_rows(9))
    write_cache(path, make_rows(4), overwrite=True, tokenizer_sha256="0" * 64)
    assert "held the cache of another job, which is removed: tokenizer_sha256 is" in caplog.text
    assert num_shards(path) == 1 and open_cache(path).manifest["tokenizer_sha256"] == "0" * 64


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"library_versions": {"torch": "2.14.0"}}, "library_versions.torch is '2.13.0', expected '2.14.0'"),
        ({"backend": {"name": "vllm", "version": "0.11"}}, "backend.version is '0.10', expected '0.11'"),
    ],
)
def test_work_of_other_versions_alone_is_never_removed(path, finished, changes, remedy):
    write_cache(path, make_rows(9), backend={"name": "vllm", "version": "0.10"})
    if not finished:
        (path / "manifest.json").unlink()
    before, changes = contents(path), {"backend": {"name": "vllm", "version": "0.10"}, **changes}
    for overwrite in (False, True):
        with pytest.raises(CacheError, match=f"{remedy}.* install those versions again, or delete the folder"):
            write_cache(path, make_rows(9), overwrite=overwrite, **changes)
    assert contents(path) == before
    write_cache(path, make_rows(9), overwrite=True, tokenizer_sha256="0" * 64, **changes)
    assert open_cache(path).manifest["tokenizer_sha256"] == "0" * 64, "another job's work is removed, as it says"


def test_foreign_parquet_files_are_never_overwritten(path):
    path.mkdir()
    pq.write_table(pa.table({"text": ["mine"]}), path / "train-000000.parquet")
    before = contents(path)
    for overwrite in (False, True):
        with pytest.raises(CacheError, match="train-000000.parquet is a .* no part of a teacher cache"):
            write_cache(path, make_rows(4), overwrite=overwrite)
    assert contents(path) == before


def test_a_finished_cache_of_the_same_job_is_known_and_kept(path):
    task = {"max_length": 64, "choices": ("good", "bad")}  # a list after its way through JSON
    write_cache(path, make_rows(9), task=task)
    before = contents(path)
    with CacheWriter(path, description(task=task), top_k=5, rows_per_shard=4).hold() as writer:
        assert (path / "manifest.json").exists() and all(writer.shard_is_complete(i) for i in range(3))
    assert contents(path) == before


@pytest.mark.parametrize("damage", ["shard", "manifest", "missing"])
def test_what_is_damaged_in_a_finished_cache_is_made_again(path, caplog, damage):
    rows = make_rows(9)
    write_cache(path, rows)
    before = contents(path)
    file = path / ("manifest.json" if damage == "manifest" else "train-000001.parquet")
    changed = bytearray(file.read_bytes())
    changed[len(changed) - 12] ^= 1  # in a shard: in its footer, which no page checksum covers
    file.unlink() if damage == "missing" else file.write_bytes(changed)
    with CacheWriter(path, description(), top_k=5, rows_per_shard=4).hold() as writer:
        assert file.name in caplog.text and not (path / "manifest.json").exists()
        assert [writer.shard_is_complete(i) for i in range(3)] == [True, damage == "manifest", True]
    write_cache(path, rows)
    assert contents(path) == before


def test_a_shard_is_complete_only_if_it_is_whole_and_has_the_rows(path):
    rows = make_rows(8)
    manifest = write_cache(path, rows)
    keys = [row["row_key"] for row in open_cache(path).dataset]
    (path / "manifest.json").unlink()
    writer, file = CacheWriter(path, description(), top_k=5, rows_per_shard=4), path / manifest["shards"][0]["name"]
    assert writer.shard_is_complete(0) and writer.shard_is_complete(0, keys[:4])
    assert not writer.shard_is_complete(0, keys[:3]) and not writer.shard_is_complete(0, keys[1:5])
    assert not writer.shard_is_complete(2)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert not writer.shard_is_complete(0)
    file.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])  # in the first page
    assert not writer.shard_is_complete(0)
    shutil.copy(path / manifest["shards"][1]["name"], file)
    assert not writer.shard_is_complete(0)


def test_a_flipped_bit_in_unfinished_work_never_ends_in_a_traceback(path):
    write_cache(path, make_rows(4))
    (path / "manifest.json").unlink()
    file, dice, outcomes = path / "train-000000.parquet", random.Random(0), []
    content = file.read_bytes()
    for bit in dice.sample(range(8 * len(content)), 100):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            with CacheWriter(path, description(), top_k=5, rows_per_shard=4).hold() as writer:
                outcomes.append(writer.shard_is_complete(0))
        except CacheError:
            outcomes.append("refused")
    assert len(outcomes) == 100 and outcomes.count(False) > 10


def test_finish_counts_the_rows(path):
    path.mkdir()
    (path / ".train-000000.parquet.0123.tmp").write_bytes(b"half a shard of a killed job")
    with CacheWriter(path, description(), top_k=5, rows_per_shard=4).hold() as writer:
        assert not list(path.glob(".*.tmp"))
        writer.write_shard(0, make_rows(4))
        writer.write_shard(1, make_rows(3))
        with pytest.raises(CacheError, match="000001.parquet has 3 rows; expected 4"):
            writer.finish(8)
        with pytest.raises(CacheError, match="4 rows make 1 shards, but .* also has train-000001.parquet"):
            writer.finish(4)
        assert not (path / "manifest.json").exists()
        assert writer.finish(7)["totals"]["rows"] == 7
    with CacheWriter(path / "none", description(), top_k=5).hold() as writer:
        with pytest.raises(CacheError, match="shards is"):
            writer.finish(0)


def broken(**changes):
    row = make_row(0, supervised=2, length=3)
    return {**row, **{name: change(row[name]) for name, change in changes.items()}}


BROKEN_ROWS = {  # what is wrong with values stands in test_cache.py: the check is the same
    "one teacher row too few": (broken(teacher_ids=lambda v: v[1:]), "without an entry in teacher_ids"),
    "another K": (broken(teacher_log_probs=lambda v: v[:, :4]), "cannot reshape"),
    "labels of another length": (broken(labels=lambda v: v[1:]), "more tokens than labels"),
    "probabilities": (broken(teacher_log_probs=np.exp), "do not sum to 1"),
    "tail that is a probability": (broken(teacher_tail_log_prob=np.exp), "do not sum to 1"),
    "ids of 64 bits": (broken(teacher_ids=lambda v: v + 2**32), "not in range"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_row_that_no_teacher_gives_is_refused_by_number(path, name):
    row, message = BROKEN_ROWS[name]
    with small_job(path).hold() as writer:
        with pytest.raises(CacheError, match=message) as raised:
            writer.write_shard(3, [make_row(1), row])
        assert re.search("Row 7 has|Rows 6 to 7 fit no shard", str(raised.value)) and num_shards(path) == 0


def test_lists_and_arrays_make_the_same_bytes(tmp_path):
    rows = make_rows(4)
    as_lists = [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]
    as_arrays = [{name: np.asarray(value) for name, value in row.items()} for row in rows]
    for name, given in (("lists", as_lists), ("arrays", as_arrays)):
        write_cache(tmp_path / name, given)
    assert contents(tmp_path / "lists") == contents(tmp_path / "arrays")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": None}, "tokenizer_sha256 is None: .* string"),
        ({"task": "prompt"}, "task is 'prompt': .* dictionary"),
        ({"top_k": 0}, "top_k is 0"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16': .*'float16' or 'float32'"),
    ],
)
def test_a_job_that_does_not_say_what_it_is_is_refused(path, changes, message):
    with pytest.raises(CacheError, match=message):
        write_cache(path, make_rows(4), **changes)

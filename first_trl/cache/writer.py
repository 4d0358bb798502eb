"""Writing a teacher cache: shards whole or absent, by any number of processes, through any number of restarts.

Shard i holds the dataset's rows from i * rows_per_shard on, so its bytes do not depend on who writes it or when. Each
carries the description of its job, by which a restart knows the finished ones. The manifest comes last and makes a
folder of shards a cache. Nothing here runs a teacher; reading is `first_trl.cache.reader`.

Shapes: E examples of one shard, N their supervised positions, K kept tokens.
"""

import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..files import file_digest
from .format import (
    IDENTITY,
    MANIFEST,
    RESULT,
    SCHEMA_VERSION,
    CacheError,
    canonical_json,
    check_types,
    dataset_fingerprint,
    manifest_schema,
    read_manifest,
    render_manifest,
    row_key,
    shard_name,
)
from .reader import describe_differences, parquet_files
from .shard import Statistics, encode_shard

LOGGER = logging.getLogger(__name__)
LIBRARIES = ("first-trl", "torch", "transformers", "peft", "bitsandbytes", "datasets", "pyarrow")

_BACKEND = "backend.version"  # of the engine or the server, beside those of the libraries
_LOCK, _HOLDER, _TEMPORARY = ".lock", ".holder.json", ".tmp-"
_SHARD_NAME = re.compile(r"train-\d{6,}\.parquet")
_JOB_KEY, _SHARD_KEY = b"first_trl.job", b"first_trl.shard"


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the content of a cache, for its manifest."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class CacheWriter:
    """One process's hand in the writing of a cache.

    The main process of the job holds the lock, from before anyone writes until after `finish`:

        writer = CacheWriter(path, manifest, top_k=5)
        if is_main: writer.acquire()
        ... barrier; every process:
        for i in its shards: if not writer.shard_is_complete(i, keys): writer.write_shard(i, rows)
        ... barrier
        if is_main: writer.finish(num_rows); writer.release()

    Args:
        path: the folder; made if absent. On several nodes, one that all of them share.
        manifest: what the cache is made from, the entries of `first_trl.cache.format.IDENTITY` and any others. Two
            jobs are the same if this and the layout are.
        top_k: K.
        dtype: `float16` or `float32`, of the K log-probabilities.
        rows_per_shard: examples per file, the work that a crash can lose.

    Raises:
        CacheError: an entry of `manifest` is missing or has the wrong type.
    """

    def __init__(
        self, path: str | Path, manifest: dict, *, top_k: int, dtype: str = "float16", rows_per_shard: int = 1024
    ):
        self.path = Path(path)
        check_types("the description of the caching job", manifest, IDENTITY)
        if top_k < 1 or rows_per_shard < 1:
            raise CacheError(f"top_k is {top_k} and rows_per_shard {rows_per_shard}; both must be at least 1.")
        layout = {"schema_version": SCHEMA_VERSION, "top_k": top_k, "dtype": dtype, "rows_per_shard": rows_per_shard}
        self.job = json.loads(canonical_json({**manifest, **layout}))
        self.rows_per_shard = rows_per_shard
        self.schema = manifest_schema(self.job)
        self._lock = FileLock(self.path / _LOCK)

    def __enter__(self) -> "CacheWriter":
        self.acquire()
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def acquire(self, overwrite: bool = False) -> None:
        """Take the folder for this job: lock it, clear what a killed run left, refuse the work of another job.

        Args:
            overwrite: remove the work of another job instead of refusing it. An upgrade does not make another job:
                work that only differs in the versions that made it is refused all the same.

        Raises:
            CacheError: another process holds the folder (its pid and host are named), or it has another job's work,
                or this one's of other versions.
        """
        with _clear_errors(f"taking the folder {self.path}"):
            _make_folder(self.path)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise CacheError(
                    f"The cache {self.path} is being written by {self._holder()}. Wait until it ends, or end it, and "
                    "run again: finished shards are kept."
                ) from None
            try:
                holder = {"pid": os.getpid(), "host": socket.gethostname()}
                (self.path / _HOLDER).write_text(json.dumps(holder), encoding="utf-8")
                for leftover in self.path.glob(f"{_TEMPORARY}*"):
                    leftover.unlink()
                self._take_over(overwrite)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Let go of the folder. The lock of a process that dies is let go by the system."""
        if self._lock.is_locked:
            (self.path / _HOLDER).unlink(missing_ok=True)
            self._lock.release()  # the empty lock file stays: removing it would let two processes hold a lock each

    def _holder(self) -> str:
        try:
            holder = json.loads((self.path / _HOLDER).read_text(encoding="utf-8"))
            return f"process {holder['pid']} on host {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has the lock and has not signed yet
            return "another process (it has not written its pid yet)"

    def _take_over(self, overwrite: bool) -> None:
        """Refuse or remove the work of another job; remove what was damaged of a finished cache of this one."""
        manifest, damage = None, None
        if (self.path / MANIFEST).exists():
            try:
                manifest = read_manifest(self.path)
            except CacheError as error:
                damage = error
        names = parquet_files(self.path)
        jobs = [manifest, *(self._job_of(self.path / name) for name in names)]
        each = (self._differences(job) for job in jobs if job)
        differences: dict[str, str] = next(filter(None, each), {})
        found, state = "; ".join(differences.values()), "finished" if manifest else "unfinished"
        if differences and all(name.startswith("library_versions.") or name == _BACKEND for name in differences):
            raise CacheError(
                f"{self.path} holds the {state} cache of this job, made with other versions than are here now: "
                f"{found}. Install those versions again to go on with it, for two would give one cache two roundings, "
                "or delete the folder to run the teacher from the start."
            )
        if differences and not overwrite:
            raise CacheError(
                f"{self.path} holds the {state} cache of another job: {found}. Choose another folder, delete this "
                "one, or go back to that job's settings."
            )
        unwanted = []
        if differences:
            LOGGER.warning("%s held the cache of another job, which is removed: %s.", self.path, found)
            unwanted = [name for name in names if _SHARD_NAME.fullmatch(name)]
        elif manifest:
            unwanted = [shard["name"] for shard in manifest["shards"] if not self._has(shard["name"], shard["sha256"])]
        if not differences and (damage or unwanted):
            LOGGER.warning("%s was finished and is damaged: %s. Made again.", self.path, damage or ", ".join(unwanted))
        if differences or damage or unwanted:
            (self.path / MANIFEST).unlink(missing_ok=True)
            for name in unwanted:
                (self.path / name).unlink(missing_ok=True)
            _sync_folder(self.path)

    def _has(self, name: str, sha256: str) -> bool:
        return (self.path / name).is_file() and file_digest(self.path / name) == sha256

    def _differences(self, job: dict) -> dict[str, str]:
        """What a job or a manifest has that this job has not, and the other way round: dotted name -> in words."""
        mine = dict(self.job)
        for name in job.keys() - RESULT.keys():
            if isinstance(job[name], dict) and isinstance(mine.get(name), dict):
                mine[name] = {**dict.fromkeys(job[name], "absent"), **mine[name]}
            mine.setdefault(name, "absent")
        return describe_differences(job, mine)

    def _job_of(self, file: Path) -> dict | None:
        """The job that wrote a shard; None for a damaged one, which is made again."""
        try:
            metadata = pq.read_metadata(file).metadata or {}
            if _JOB_KEY in metadata:
                return json.loads(metadata[_JOB_KEY])
        except (pa.ArrowException, OSError, ValueError):
            return None
        raise CacheError(
            f"{file} is a Parquet file that is no part of a teacher cache. Choose an empty folder for the cache."
        )

    @property
    def is_finished(self) -> bool:
        """Whether the folder is already the finished cache of this job (after `acquire`, an undamaged one)."""
        return (self.path / MANIFEST).exists() and not self._differences(read_manifest(self.path))

    def _signature(self, index: int) -> list[bytes]:
        """What a shard of this job says of itself: the job, and its place in it."""
        return [canonical_json(self.job).encode(), str(index).encode()]

    def shard_is_complete(self, index: int, row_keys: Sequence[str] | None = None) -> bool:
        """Whether a shard of this very job is on disk, whole: every page is read and its checksum compared.

        Args:
            row_keys: the keys of the rows that it must hold, in order; without them they are not compared.
        """
        table = self._read_shard(index)
        return table is not None and (row_keys is None or table.column("row_key").to_pylist() == list(row_keys))

    def _read_shard(self, index: int) -> pa.Table | None:
        file = self.path / shard_name(index)
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                metadata = parquet.metadata.metadata or {}
                if [metadata.get(key) for key in (_JOB_KEY, _SHARD_KEY)] != self._signature(index):
                    return None
                return parquet.read().cast(self.schema)
        except (pa.ArrowException, ValueError, OSError):  # absent or damaged: it is made again
            return None

    def write_shard(self, index: int, rows: Sequence[dict]) -> None:
        """Write one shard: whole, on the disk and under its name when this returns; absent if it fails.

        Args:
            rows: at most `rows_per_shard` dicts with `input_ids`, `labels`, `teacher_ids` (n, K) most probable first,
                `teacher_log_probs` (n, K) and `teacher_tail_log_prob` (n,) in nats, for the n supervised positions.

        Raises:
            CacheError: a row is not what it should be, or the system refused to write.
        """
        if not 0 < len(rows) <= self.rows_per_shard:
            raise CacheError(f"Shard {index} is given {len(rows)} rows; it holds 1 to {self.rows_per_shard}.")
        content = encode_shard(
            rows,
            first_row=index * self.rows_per_shard,
            schema=self.schema,
            metadata=dict(zip((_JOB_KEY, _SHARD_KEY), self._signature(index), strict=True)),
        )
        with _clear_errors(f"writing {self.path / shard_name(index)}"):
            _write_durably(self.path / shard_name(index), content)

    def finish(self, num_rows: int) -> dict:
        """Check every shard, seal them in `manifest.json`, and return its content. For the main process only.

        Args:
            num_rows: rows of the dataset.

        Raises:
            CacheError: a shard is missing, damaged or has the wrong number of rows, or the system refused to write.
        """
        if num_rows < 1:
            raise CacheError(f"The dataset has {num_rows} rows: nothing to cache. Check the recipe's datasets.")
        assert self._lock.is_locked, "finish() needs acquire()"
        statistics = Statistics()
        with _clear_errors(f"finishing {self.path}"):
            fingerprint = dataset_fingerprint(self._finished_shards(num_rows, statistics))
            content = {
                **self.job,
                "dataset_fingerprint": fingerprint,
                "shards": statistics.shards,
                "totals": statistics.totals(),
            }
            _write_durably(self.path / MANIFEST, render_manifest(content))
        return read_manifest(self.path)

    def _finished_shards(self, num_rows: int, statistics: Statistics) -> Iterator[str]:
        """Read the shards in order, adding each to the statistics; yields the row keys."""
        num_shards = -(-num_rows // self.rows_per_shard)
        names = [shard_name(index) for index in range(num_shards)]
        if extra := sorted(set(parquet_files(self.path)) - set(names)):
            raise CacheError(
                f"{num_rows} rows make {num_shards} shards, but {self.path} also has {', '.join(extra[:3])}. "
                "Move them out of the folder and run again."
            )
        for index, name in enumerate(names):
            table, expected = self._read_shard(index), min(self.rows_per_shard, num_rows - index * self.rows_per_shard)
            if table is None or len(table) != expected:
                state = "is missing, damaged or of another job" if table is None else f"has {len(table)} rows"
                raise CacheError(
                    f"{self.path / name} {state}; expected {expected} rows. Delete it if it is there and run again: "
                    "finished shards are kept."
                )
            statistics.add(self.path / name, table)
            yield from table.column("row_key").to_pylist()


@contextmanager
def _clear_errors(doing: str) -> Iterator[None]:
    """Turns an error of the operating system into a CacheError with the place and the remedy."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"The system refused {doing}: {error}. Free space or mend what it reports, and run again: "
            "finished shards are kept."
        ) from error


def _write_durably(target: Path, content: bytes) -> None:
    """Put `content` under a name so that a crash or a power cut leaves all of it or none."""
    temporary = target.with_name(f"{_TEMPORARY}{target.name}-{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    """Make a folder and its parents, each entry on disk before anything is put into it."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def write_shards(
    writer: CacheWriter,
    dataset: Dataset | IterableDataset,
    encode: Callable[[dict, int], dict],
    run_teacher: Callable[[list[dict], Callable[[int], None]], list[dict]],
    *,
    present: Collection[str] = (),
    rank: int = 0,
    processes: int = 1,
    answered_by_teacher: bool = False,
    title: str = "cache",
) -> int:
    """Write the shards of process `rank` that are not already there; returns the rows of the whole dataset.

    Args:
        encode: an example (`input_ids`, `labels`) from a row and its number in the dataset.
        run_teacher: the columns of a shard from its examples; calls its second argument with the tokens of each batch.
        present: names of the shards that were there when the job began, the same on every process. They are dealt out
            to be checked, and the others to be made, so that neither falls to one process.
        answered_by_teacher: the tokens after the prompts are the teacher's. The rows of a finished shard are then not
            compared with the dataset's, only the job that made it is.
        title: of the progress bar, which the first process shows.

    Raises:
        ValueError: a row cannot be encoded, or a shard not be written.
    """
    turns = {True: count(), False: count()}
    num_rows, own_rows, own_tokens, writing = 0, 0, 0, None
    with (
        ThreadPoolExecutor(max_workers=1) as background,
        tqdm(desc=title, unit=" tokens", unit_scale=True, disable=rank != 0) as bar,
    ):
        for index, rows in enumerate(_slices(dataset, writer.rows_per_shard)):
            first, num_rows = num_rows, num_rows + len(rows)
            if next(turns[shard_name(index) in present]) % processes != rank:
                continue
            examples = [encode(row, first + i) for i, row in enumerate(rows)]
            own_rows, own_tokens = own_rows + len(rows), own_tokens + sum(len(row["input_ids"]) for row in examples)
            if isinstance(dataset, Dataset):  # the tokens to come, if they are like those so far
                bar.total = round(own_tokens / own_rows * len(dataset) / processes)
            keys = [row_key(row["input_ids"], row["labels"]) for row in examples]
            if writer.shard_is_complete(index, None if answered_by_teacher else keys):
                bar.update(own_tokens - bar.n)
                continue
            columns = run_teacher(examples, bar.update)
            _raise_error_of(writing)
            writing = background.submit(writer.write_shard, index, columns)
        _raise_error_of(writing)
    return num_rows


def _raise_error_of(writing: Future | None) -> None:
    """Wait for a shard to be on the disk."""
    if writing is not None:
        writing.result()


def _slices(dataset: Dataset | IterableDataset, size: int) -> Iterator[Dataset | list[dict]]:
    """The rows of each shard; those of a `Dataset` are read when they are looked at."""
    if isinstance(dataset, Dataset):
        for start in range(0, len(dataset), size):
            yield dataset.select(range(start, min(start + size, len(dataset))))
        return
    stream = iter(dataset)
    while rows := list(islice(stream, size)):
        yield rows

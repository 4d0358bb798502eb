"""Writing a teacher cache: shards whole or absent, by any number of processes, through any number of restarts.

Shard i holds the dataset's rows from i * rows_per_shard on, so its bytes do not depend on who writes it or when. Each
carries the description of its job, by which a restart knows the finished ones. The manifest comes last and makes a
folder of shards a cache. Reading is `first_trl.cache.reader`.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

from ..files import file_digest, locked, write_atomically
from ..log import Progress
from .format import (
    MANIFEST,
    RESULTS,
    SCHEMA_VERSION,
    CacheError,
    Job,
    cache_schema,
    canonical_json,
    check_entries,
    read_manifest,
    render_manifest,
    row_key,
    shard_name,
)
from .reader import describe_differences, parquet_files
from .shard import encode_shard, summarize

LOGGER = logging.getLogger(__name__)

_SHARD_NAME = re.compile(r"train-\d{6,}\.parquet")
_JOB_KEY, _SHARD_KEY = b"first_trl.job", b"first_trl.shard"


class CacheWriter:
    """Writes one process's shards of a teacher cache.

    The main process holds the folder, from before anyone writes until after `finish`:

        writer = CacheWriter(path, manifest, top_k=5)
        with writer.hold() if is_main else nullcontext():
            ... barrier; every process:
            for i in its shards: if not writer.shard_is_complete(i, keys): writer.write_shard(i, rows)
            ... barrier
            if is_main: writer.finish(num_rows)

    Args:
        path: the folder; made if absent. On several nodes, one that all of them share.
        manifest: what the cache is made from, the entries of `first_trl.cache.format.Job` and any others. Two jobs are
            the same if this and the layout are.
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
        layout = {"schema_version": SCHEMA_VERSION, "top_k": top_k, "dtype": dtype, "rows_per_shard": rows_per_shard}
        check_entries(Job, {**manifest, **layout}, "the description of the caching job")
        self.job = json.loads(canonical_json({**manifest, **layout}))
        self.rows_per_shard = rows_per_shard
        self.schema = cache_schema(top_k, dtype)

    @contextmanager
    def hold(self, overwrite: bool = False) -> Iterator["CacheWriter"]:
        """Hold the folder for this job: lock it, clear what a killed run left, refuse the shards of another job.

        Args:
            overwrite: remove the cache of another job instead of refusing it. An upgrade does not make another job:
                a cache that only differs in the versions that made it is refused all the same.

        Raises:
            FirstTrlError: another process holds the folder; its pid and host are named.
            CacheError: the folder has another job's shards, or this one's of other versions.
        """
        with locked(self.path / ".lock", f"The cache {self.path}"):
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()
            self._resume_or_refuse(overwrite)
            yield self

    def _resume_or_refuse(self, overwrite: bool) -> None:
        """Refuse or remove the shards of another job; remove what was damaged of a finished cache of this one."""
        manifest: dict = {}
        damage = None
        if (self.path / MANIFEST).exists():
            try:
                manifest = read_manifest(self.path)
            except CacheError as error:
                damage = str(error)
        names = parquet_files(self.path)
        jobs = filter(None, [manifest, *(self._job_of(self.path / name) for name in names)])
        if differences := next(filter(None, map(self._differences, jobs)), {}):
            self._refuse_or_announce(differences, "finished" if manifest else "unfinished", overwrite)
            unwanted = [name for name in names if _SHARD_NAME.fullmatch(name)]
        else:
            shards = {shard["name"]: shard["sha256"] for shard in manifest.get("shards", [])}
            unwanted = [name for name in shards if name not in names or file_digest(self.path / name) != shards[name]]
            if damage := damage or ", ".join(unwanted):
                LOGGER.warning("%s was finished and is damaged, and is repaired: %s", self.path, damage)
        if differences or damage:
            for name in (MANIFEST, *unwanted):
                (self.path / name).unlink(missing_ok=True)

    def _refuse_or_announce(self, differences: dict[str, str], state: str, overwrite: bool) -> None:
        found = "; ".join(differences.values())
        # The version of a server stands beside those of the libraries
        if all(name.startswith("library_versions.") or name == "backend.version" for name in differences):
            raise CacheError(
                f"{self.path} holds the {state} cache of this job, made with other versions: {found}. Two would give "
                "one cache two roundings: install those versions again, or delete the folder to start anew."
            )
        if not overwrite:
            raise CacheError(
                f"{self.path} holds the {state} cache of another job: {found}. Choose another folder, delete this "
                "one, or go back to that job's settings."
            )
        LOGGER.warning("%s held the cache of another job, which is removed: %s.", self.path, found)

    def _differences(self, job: dict) -> dict[str, str]:
        """What a job or a manifest has that this job has not, and the other way round: dotted name -> both values."""
        mine = dict(self.job)
        for name in job.keys() - set(RESULTS):
            if isinstance(job[name], dict) and isinstance(mine.get(name), dict):
                mine[name] = {**dict.fromkeys(job[name], "absent"), **mine[name]}
            mine.setdefault(name, "absent")
        return describe_differences(job, mine)

    def _job_of(self, file: Path) -> dict | None:
        """The job that wrote a shard; None for a damaged one, which is written anew."""
        try:
            metadata = pq.read_metadata(file).metadata or {}
            if _JOB_KEY in metadata:
                return json.loads(metadata[_JOB_KEY])
        except (pa.ArrowException, OSError, ValueError):
            return None
        raise CacheError(
            f"{file} is a Parquet file that is no part of a teacher cache. Choose an empty folder for the cache."
        )

    def _signature(self, index: int) -> dict[bytes, bytes]:
        """What a shard of this job says of itself: the job, and its place in it."""
        return {_JOB_KEY: canonical_json(self.job).encode(), _SHARD_KEY: str(index).encode()}

    def shard_is_complete(self, index: int, row_keys: Sequence[str] | None = None) -> bool:
        """Whether a shard of this very job is on disk, whole (every page's checksum is compared), with these rows."""
        table = self._read_shard(index)
        return table is not None and (row_keys is None or table.column("row_key").to_pylist() == list(row_keys))

    def _read_shard(self, index: int) -> pa.Table | None:
        try:
            with pq.ParquetFile(self.path / shard_name(index), page_checksum_verification=True) as parquet:
                same = self._signature(index).items() <= (parquet.metadata.metadata or {}).items()
                return parquet.read().cast(self.schema) if same else None
        except (pa.ArrowException, ValueError, OSError):  # absent or damaged: it is written anew
            return None

    def write_shard(self, index: int, rows: Sequence[dict]) -> None:
        """Write one shard: whole, on the disk and under its name when this returns; absent if it fails.

        Args:
            rows: at most `rows_per_shard` dicts, see `first_trl.cache.shard.encode_shard`.

        Raises:
            CacheError: a row is not what it should be.
        """
        first_row = index * self.rows_per_shard
        content = encode_shard(rows, first_row=first_row, schema=self.schema, metadata=self._signature(index))
        write_atomically(self.path / shard_name(index), content)

    def finish(self, num_rows: int, count_labels: Callable[[list], dict[str, int]] | None = None) -> dict:
        """Check every shard, seal them in `manifest.json`, and return its content. For the main process, in `hold`.

        What `count_labels` counts in the labels of each shard is added to the totals.

        Raises CacheError: a shard is missing, damaged or has the wrong number of rows.
        """
        sizes = [min(self.rows_per_shard, num_rows - start) for start in range(0, num_rows, self.rows_per_shard)]
        if extra := sorted(set(parquet_files(self.path)) - set(map(shard_name, range(len(sizes))))):
            raise CacheError(
                f"{num_rows} rows make {len(sizes)} shards, but {self.path} also has {', '.join(extra[:3])}. "
                "Move them out of the folder and run again."
            )
        shards = (self._finished_shard(index, size) for index, size in enumerate(sizes))
        write_atomically(self.path / MANIFEST, render_manifest({**self.job, **summarize(shards, count_labels)}))
        return read_manifest(self.path)

    def _finished_shard(self, index: int, size: int) -> tuple[Path, pa.Table]:
        file, table = self.path / shard_name(index), self._read_shard(index)
        if table is None or len(table) != size:
            state = "is missing, damaged or of another job" if table is None else f"has {len(table)} rows"
            raise CacheError(f"{file} {state}; expected {size} rows. Delete it and run again: the others are kept.")
        return file, table


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

    Memory does not grow with the dataset, which may be a stream. A shard is written by a second thread while the
    teacher runs over the next.

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
    num_rows, own_rows, own_tokens = 0, 0, 0
    writing: Future | None = None
    with ThreadPoolExecutor(max_workers=1) as background, Progress(title, unit="tokens") as bar:
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
            if writing is not None:
                writing.result()  # raises what went wrong with the shard before
            writing = background.submit(writer.write_shard, index, columns)
        if writing is not None:
            writing.result()
    return num_rows


def _slices(dataset: Dataset | IterableDataset, size: int) -> Iterator[Dataset | list[dict]]:
    """The rows of each shard; those of a `Dataset` are read when they are looked at."""
    if isinstance(dataset, Dataset):
        for start in range(0, len(dataset), size):
            yield dataset.select(range(start, min(start + size, len(dataset))))
        return
    stream = iter(dataset)
    while rows := list(islice(stream, size)):
        yield rows

"""Reading a teacher cache: any cache that fails verification is refused.

A cache is a folder of Parquet shards and a `manifest.json` that says what they were made from and seals them. Whatever
is wrong (a flipped bit, a missing shard, a row that no teacher gives, another tokenizer) is a `CacheError` with what
was found, what was expected and what to do; nothing is ever a warning. Writing is `first_trl.cache.writer`.
"""

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..constants import HUB_ID
from ..errors import shorten
from ..files import file_digest
from .format import (
    MAKE_AGAIN,
    MANIFEST,
    SEAL,
    CacheError,
    cache_schema,
    canonical_json,
    fingerprint,
    read_manifest,
    refuse_special_file,
    tokenizer_fingerprint,
)
from .shard import check_table

# Decoded values for each byte of a shard; every row has 32 bytes of its key, which nothing compresses. More is a bomb.
_MOST_VALUES_PER_BYTE = 4096
_REMEDIES = {
    "tokenizer_sha256": "train a student with the teacher's tokenizer",
    "top_k": "set cache.top_k to what the cache holds",
    "support": "set cache.support to what the cache holds",
    "teacher": "point to the teacher that the cache was made with",
    "dataset": "use the data that the cache was made from",
    "dataset_fingerprint": "use the rows that the cache was made from, in their order",
    "task": "use the templates and lengths that the cache was made with",
}


@dataclass(frozen=True)
class TeacherCache:
    """An opened cache: its folder, its manifest, and its rows in dataset order, memory-mapped."""

    path: Path
    manifest: dict
    dataset: datasets.Dataset


def open_cache(path: str | Path, verify: bool = True, *, revision: str | None = None) -> TeacherCache:
    """Open a finished cache.

    Args:
        path: the folder, or the id of a data set repository on the Hub; a folder of that name comes first.
        verify: hash every shard and check every row. Without it only presence, size and row count are compared with
            the manifest.
        revision: branch, tag or commit of the repository.

    Raises:
        CacheError: the folder is not a whole, unchanged, finished cache, or the Hub does not give it.
    """
    path = _local_folder(path, revision)
    manifest = read_manifest(path)
    _check_shards(path, manifest, verify)
    return TeacherCache(path, manifest, _memory_mapped(path, manifest))


def _local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a cache, downloaded if `path` is no folder here and may be an id on the Hub."""
    if Path(path).is_dir():
        if revision is not None:
            raise CacheError(f"{path} is a folder here, which has no revision {revision!r}. Leave the revision out.")
        return Path(path)
    if not HUB_ID.fullmatch(str(path)):
        raise CacheError(f"There is no cache at {path}: no such folder. Run the cache stage, or correct the path.")
    from huggingface_hub import snapshot_download

    wanted = {"repo_type": "dataset", "revision": revision, "allow_patterns": [MANIFEST, "*.parquet"]}
    try:
        return Path(snapshot_download(str(path), **wanted))
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub raises no narrower family
        raise CacheError(
            f"There is no folder {path} here, and the Hub does not give a data set {path}"
            f"{'' if revision is None else f' at revision {revision!r}'}: {' '.join(str(error).split())} "
            "Correct the path, or check the network, HF_HUB_OFFLINE, and `hf auth login` for a private one."
        ) from error


def parquet_files(path: Path) -> list[str]:
    """Names of the Parquet files of a folder, relative to it, that `load_dataset` would read; hidden ones are not."""
    names = (file.relative_to(path) for file in path.rglob("*.parquet"))
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def _check_shards(path: Path, manifest: dict, verify: bool) -> None:
    """Compare the shards on disk with the manifest: which there are, their sizes, their bytes, their rows."""
    listed, found = {shard["name"] for shard in manifest["shards"]}, set(parquet_files(path))
    if missing := sorted(listed - found):
        raise CacheError(
            f"The cache {path} should have {len(listed)} shards and lacks {len(missing)}: {', '.join(missing[:3])}. "
            "Run the cache stage again with the same settings to make them, or fetch a whole copy."
        )
    if extra := sorted(found - listed):
        raise CacheError(
            f"The cache {path} has {len(found)} Parquet files where its manifest lists {len(listed)}; the others "
            f"are {', '.join(extra[:3])}. Move them out of the folder."
        )
    first_row = 0
    for shard in manifest["shards"]:
        file = path / shard["name"]
        refuse_special_file(file)
        _compare(file, "size in bytes", file.stat().st_size, shard["bytes"])
        if verify:
            _compare(file, "sha256", file_digest(file), shard["sha256"])
        try:
            with pq.ParquetFile(file) as parquet:
                _check_layout(file, parquet, shard["rows"], cache_schema(manifest["top_k"], manifest["dtype"]))
                for batch in parquet.iter_batches(batch_size=1024) if verify else ():
                    check_table(pa.Table.from_batches([batch]), first_row, manifest.get("vocab_size"))
                    first_row += len(batch)
        except CacheError as error:
            raise error if str(file) in str(error) else CacheError(f"{file}: {error}") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CacheError(f"{file} is not a readable Parquet file ({error}). {MAKE_AGAIN}") from error


def _check_layout(file: Path, parquet: pq.ParquetFile, rows: int, schema: pa.Schema) -> None:
    columns, metadata = parquet.schema_arrow.remove_metadata(), parquet.metadata
    _compare(file, "number of rows", metadata.num_rows, rows)
    if not columns.equals(schema):
        _compare(file, "columns", columns.to_string(), schema.to_string())
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
    if values > _MOST_VALUES_PER_BYTE * file.stat().st_size:
        raise CacheError(f"{values:,} values in {file.stat().st_size:,} bytes, as no text has. {MAKE_AGAIN}")


def _compare(file: Path, what: str, found, expected) -> None:
    if found != expected:
        raise CacheError(
            f"{file} is damaged: its {what} is {found}, the manifest has {expected}. Delete this file and "
            "run the cache stage again with the same settings, or fetch a whole copy."
        )


def _memory_mapped(path: Path, manifest: dict) -> datasets.Dataset:
    """The rows as an Arrow file among those of `datasets`, which can be memory-mapped as Parquet cannot.

    One per cache folder, named after the manifest's SHA-256 and so after every byte of the shards: rows of an earlier
    cache in the same folder are never met again, and are removed.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "first_trl" / fingerprint(str(path.resolve()))[:16]
    for other in folder.glob("*"):
        if other.name != manifest[SEAL]:
            shutil.rmtree(other, ignore_errors=True)  # another process may be removing it too
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        files = [glob.escape(str(path / shard["name"])) for shard in manifest["shards"]]
        return datasets.Dataset.from_parquet(files, cache_dir=str(folder / manifest[SEAL]))
    except datasets.exceptions.DatasetGenerationError as error:  # of rows, or of a disk that takes no copy
        raise CacheError(f"The cache {path} cannot be read: {error.__cause__ or error}. {MAKE_AGAIN}") from error
    finally:
        if not shown:
            datasets.enable_progress_bars()


def describe_differences(found: dict, expected: dict) -> dict[str, str]:
    """Entries of `expected` that `found` does not have: dotted name -> both values, in words.

    A section (`teacher`, `task`, `dataset`, ...) is compared entry by entry, and only those that `expected` names.
    """
    differences = {}
    for name, wanted in expected.items():
        have = found.get(name, "absent")
        pairs = {name: (have, wanted)}
        if isinstance(wanted, dict) and isinstance(have, dict):
            pairs = {f"{name}.{key}": (have.get(key, "absent"), value) for key, value in wanted.items()}
        for place, (left, right) in pairs.items():
            if canonical_json(left) != canonical_json(right):
                differences[place] = f"{place} is {shorten(repr(left))}, expected {shorten(repr(right))}"
    return differences


def check_cache(cache: TeacherCache, *, tokenizer=None, **expected) -> None:
    """Refuse a cache that was made from something else than is expected.

    Args:
        tokenizer: the student's, or any that must give every id of the cache the same meaning.
        expected: entries of the manifest and their values, e.g. `top_k=5`, `teacher={"revision": "main"}`,
            `task={"max_length": 512}`, `chat_template_sha256=None`. In a section only the entries named are compared.

    Raises:
        CacheError: an entry differs; the message has both values of each, and the remedy.
    """
    if tokenizer is not None:
        expected["tokenizer_sha256"] = tokenizer_fingerprint(tokenizer)
    if differences := describe_differences(cache.manifest, expected):
        sections = (name.partition(".")[0] for name in differences)
        remedies = dict.fromkeys(_REMEDIES[name] for name in sections if name in _REMEDIES)
        raise CacheError(
            f"The cache {cache.path} does not fit: {'; '.join(differences.values())}. "
            f"To fix it, {''.join(f'{remedy}, or ' for remedy in remedies)}make the cache again."
        )


def check_vocabulary(cache: TeacherCache, vocab_size: int, tokenizer=None) -> None:
    """Refuse a cache with a token that the student cannot have: ids must be below its head, and its tokenizer's end.

    Args:
        vocab_size: rows of the student's head.
        tokenizer: names the offending token; its largest id is a limit too, as a head may have rows for padding.

    Raises:
        CacheError: an id is too large; the message names the column, the row and the token.
    """
    limit, whose = vocab_size, f"the student's vocabulary has {vocab_size} entries"
    if tokenizer is not None:
        end = max(tokenizer.get_vocab().values()) + 1
        if end < limit:
            limit, whose = end, f"the student's tokenizer ends at id {end - 1}"
    for column in ("teacher_ids", "input_ids"):
        lists = cache.dataset.data.column(column)
        if (pc.max(pc.list_flatten(lists, recursive=True)).as_py() or 0) < limit:
            continue
        largest = (max(np.ravel(ids.as_py()), default=-1) for ids in lists)
        row, token_id = next((row, int(found)) for row, found in enumerate(largest) if found >= limit)
        token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token_id)
        raise CacheError(
            f"{column} of row {row} of the cache {cache.path} has token id {token_id} "
            f"({'a token without a name' if token is None else repr(token)}), but {whose}. Take a student with the "
            "teacher's vocabulary, or make the cache with a teacher that has the student's."
        )

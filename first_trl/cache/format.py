"""The format of a teacher cache: its columns, its file names, and the manifest that says what it was made from.

The manifest seals the shards by SHA-256 and itself by one more, and has one rendering only: whatever changes a byte of
it is noticed. Writer and reader both take the format from here; neither is here.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
TAIL_DTYPE = "float32"
_DTYPES = {"float16": pa.float16(), "float32": pa.float32()}

# What the job that writes a cache must say about itself, and the types of what it says.
IDENTITY = {
    "teacher": dict,  # id, revision, weights or adapter digest, dtype, quantisation
    "tokenizer_sha256": str,
    "chat_template_sha256": (str, type(None)),
    "dataset": dict,  # where the rows came from, with the split
    "task": dict,  # the templates and max_length
    "library_versions": dict,
}
LAYOUT = {"schema_version": int, "top_k": int, "dtype": str, "rows_per_shard": int}
RESULT = {"dataset_fingerprint": str, "shards": list, "totals": dict, SEAL: str}
_SHARD = {"name": str, "rows": int, "supervised_positions": int, "bytes": int, "sha256": str}
_TOTALS = {"rows": int, "supervised_positions": int, "teacher_mass_mean": float, "teacher_mass_p10": float}

MAKE_AGAIN = "Delete the folder and make the cache again, or fetch a whole copy of it."


class CacheError(ValueError):
    """A cache that is damaged, unfinished, held by another job, or made from something else than is asked for."""


def manifest_schema(manifest: dict) -> pa.Schema:
    """The columns of the cache with this manifest, or of the job with this description and layout."""
    return cache_schema(manifest["top_k"], manifest["dtype"])


def cache_schema(top_k: int, dtype: str = "float16") -> pa.Schema:
    """The columns of a cache, for the writer and the reader alike. `dtype` is that of the K log-probabilities."""
    if dtype not in _DTYPES:
        raise CacheError(f"dtype {dtype!r} is no type of log-probabilities; choose {' or '.join(_DTYPES)}.")
    # The tail keeps float32: losses and searches take 1 - tau from it, and it costs 1.5 bytes after compression.
    columns = {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "teacher_ids": pa.list_(pa.list_(pa.int32(), top_k)),
        "teacher_log_probs": pa.list_(pa.list_(_DTYPES[dtype], top_k)),
        "teacher_tail_log_prob": pa.list_(_DTYPES[TAIL_DTYPE]),
        "row_key": pa.string(),
    }
    return pa.schema(columns)


def shard_name(index: int) -> str:
    """File name of a shard. It begins with the one split that `load_dataset` gives to a folder of plain files."""
    return f"train-{index:06d}.parquet"


def render_manifest(content: dict) -> bytes:
    """The bytes of a manifest file, its own SHA-256 added: the only rendering that `read_manifest` accepts."""
    sealed = {**content, SEAL: fingerprint({key: value for key, value in content.items() if key != SEAL})}
    return (json.dumps(sealed, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> dict:
    """The manifest of a cache folder, complete and unchanged since it was written.

    Raises:
        CacheError: it is missing, damaged or edited, of another version, or lacks an entry.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CacheError(
            f"{path} has no {MANIFEST}: the cache was never finished. Run the cache stage again with the same "
            "settings: it keeps the finished shards and makes the others."
        ) from None
    except OSError as error:
        raise CacheError(f"{file} cannot be read: {error}. Mend what the system reports.") from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{file} is damaged: it is not JSON ({error}). {MAKE_AGAIN}") from error
    if not isinstance(manifest, dict):
        raise CacheError(f"{file} is damaged: it holds a {type(manifest).__name__}, not an object. {MAKE_AGAIN}")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION and isinstance(version, int) and manifest.get(SEAL) == _seal(manifest):
        raise CacheError(
            f"{file} has schema_version {version}, this reader knows {SCHEMA_VERSION}. "
            "Use the version of first-trl that wrote it, or make the cache again."
        )
    # One rendering per content: this refuses edits that JSON would not notice, such as a key given twice.
    seal = _seal(manifest)
    if seal is None or manifest.get(SEAL) != seal or render_manifest(manifest) != content:
        raise CacheError(
            f"{file} was changed after it was written: its {SEAL} is {manifest.get(SEAL)!r}, its content gives "
            f"{seal!r}. {MAKE_AGAIN}"
        )
    _check_entries(file, manifest)
    return manifest


def _seal(manifest: dict) -> str | None:
    try:
        return fingerprint({key: value for key, value in manifest.items() if key != SEAL})
    except ValueError:  # NaN and infinities, which no manifest holds
        return None


def check_types(place: str, content: dict, types: dict) -> None:
    """Refuse a mapping that lacks an entry of `types`, or holds one of another type."""
    for name, expected in types.items():
        value = content.get(name)
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if name not in content or type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            found = f"{value!r}, a {type(value).__name__}" if name in content else "absent"
            raise CacheError(f"{place}: {name} is {found}; expected a {wanted}. {MAKE_AGAIN}")


def _check_entries(file: Path, manifest: dict) -> None:
    check_types(str(file), manifest, {**LAYOUT, **IDENTITY, **RESULT})
    check_types(f"{file}, totals", manifest["totals"], _TOTALS)
    if manifest["dtype"] not in _DTYPES or not 1 <= manifest["top_k"] < 2**31:
        raise CacheError(
            f"{file}: dtype is {manifest['dtype']!r} and top_k {manifest['top_k']}; expected one of "
            f"{', '.join(_DTYPES)} and 1 or more. {MAKE_AGAIN}"
        )
    for index, shard in enumerate(manifest["shards"]):
        place = f"{file}, shard {index}"
        if not isinstance(shard, dict):
            raise CacheError(f"{place} is {shard!r}; expected an object. {MAKE_AGAIN}")
        check_types(place, shard, _SHARD)
        if shard["name"] != shard_name(index):
            raise CacheError(f"{place} is named {shard['name']!r}; expected {shard_name(index)!r}. {MAKE_AGAIN}")
    for total in ("rows", "supervised_positions"):
        found = sum(shard[total] for shard in manifest["shards"])
        if found != manifest["totals"][total]:
            raise CacheError(f"{file}: {total} is {manifest['totals'][total]}, its shards have {found}. {MAKE_AGAIN}")


def canonical_json(content) -> str:
    """One text for one content: keys sorted, no blanks, ASCII only, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(content) -> str:
    """SHA-256 of anything that JSON can hold, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of the whole token -> id mapping, added and special tokens included.

    Which of them ends or pads a sequence is left out: a cache stores ids, and a base model and its chat version, which
    share every id, may end their turns differently.

    Args:
        tokenizer: a `transformers` tokenizer.
    """
    return fingerprint(tokenizer.get_vocab())


def row_key(input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """SHA-256 of one example: the length and the int32 little-endian bytes of `input_ids`, then of `labels`."""
    digest = hashlib.sha256()
    for values in (input_ids, labels):
        tokens = np.asarray(values, dtype="<i4")
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
    return digest.hexdigest()


def dataset_fingerprint(row_keys: Iterable[str]) -> str:
    """SHA-256 of a dataset: its row keys in order. Takes any iterable, and keeps none of it."""
    digest = hashlib.sha256()
    for key in row_keys:
        digest.update(bytes.fromhex(key))
    return digest.hexdigest()

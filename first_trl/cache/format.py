"""The format of a teacher cache: its columns, its file names, its manifest, and the digests that identify its parts.

The manifest seals the shards by SHA-256 and itself by one more, and has one rendering only: whatever changes a byte of
it is noticed. Two things with the same digest are the same for distillation: same token ids, same prompts, same rows.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import FirstTrlError, shorten

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
SCHEMA_VERSION = 1
RESULTS = ("dataset_fingerprint", "shards", "totals", SEAL)  # what a manifest says beyond its job and layout
MAKE_AGAIN = "Delete the folder and make the cache again, or fetch a whole copy of it."


class CacheError(FirstTrlError):
    """A cache that is damaged, unfinished, or made from something else than is asked for."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Job(_Part):
    """What the job that writes a cache says about itself, and the layout of its shards."""

    schema_version: Literal[1]
    teacher: dict  # id, revision, weights or adapter digest, dtype, quantisation
    tokenizer_sha256: str
    chat_template_sha256: str | None
    dataset: dict  # where the rows came from, with the split
    task: dict  # the templates and max_length
    library_versions: dict
    top_k: int = Field(ge=1, lt=2**31)
    dtype: Literal["float16", "float32"]
    rows_per_shard: int = Field(ge=1)


class ShardEntry(_Part):
    """One file of the cache."""

    name: str
    rows: int = Field(ge=1)
    supervised_positions: int = Field(ge=0)
    bytes: int = Field(ge=1)
    sha256: str


class Totals(_Part):
    """Sums over the shards; the teacher's mass on the kept tokens, mean and 10th percentile."""

    rows: int
    supervised_positions: int
    teacher_mass_mean: float
    teacher_mass_p10: float


class Manifest(Job):
    """`manifest.json`: the job, and what came out."""

    dataset_fingerprint: str
    shards: list[ShardEntry] = Field(min_length=1)
    totals: Totals
    manifest_sha256: str

    @model_validator(mode="after")
    def _shards_add_up(self) -> "Manifest":
        for index, shard in enumerate(self.shards):
            if shard.name != shard_name(index):
                raise FirstTrlError(f"shard {index} is named {shard.name!r}; expected {shard_name(index)!r}")
        for name in ("rows", "supervised_positions"):
            total, found = getattr(self.totals, name), sum(getattr(shard, name) for shard in self.shards)
            if total != found:
                raise FirstTrlError(f"{name} is {total}, its shards have {found}")
        return self


def check_entries(model: type[BaseModel], content: dict, place: str) -> None:
    """Refuse a manifest, or the description of a job, that lacks an entry or holds one of another kind."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        found = "absent" if first["type"] == "missing" else shorten(repr(first["input"]))
        problem = f"{entry} is {found}: {first['msg']}" if entry else str(first["ctx"]["error"])
        raise CacheError(f"{place}: {problem}. {MAKE_AGAIN if model is Manifest else ''}".rstrip()) from error


def cache_schema(top_k: int, dtype: str = "float16") -> pa.Schema:
    """The columns of a cache. `dtype` is that of the K log-probabilities."""
    # The tail keeps float32: losses and searches take 1 - tau from it, and it costs 1.5 bytes after compression.
    columns = {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "teacher_ids": pa.list_(pa.list_(pa.int32(), top_k)),
        "teacher_log_probs": pa.list_(pa.list_(pa.float16() if dtype == "float16" else pa.float32(), top_k)),
        "teacher_tail_log_prob": pa.list_(pa.float32()),
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
    if not file.exists():
        raise CacheError(
            f"{path} has no {MANIFEST}: the cache was never finished. Run the cache stage again with the same "
            "settings: it keeps the finished shards and makes the others."
        )
    refuse_special_file(file)
    content = file.read_bytes()
    try:
        manifest = dict(json.loads(content))
        rendered: bytes | None = render_manifest(manifest)
    except (ValueError, TypeError, RecursionError):  # not JSON, no object, or NaN, which no manifest holds
        rendered = None
    # One rendering per content: this refuses edits that JSON would not notice, such as a key given twice.
    if rendered != content:
        raise CacheError(f"{file} is damaged, or was changed after it was written. {MAKE_AGAIN}")
    check_entries(Manifest, manifest, str(file))
    return manifest


def refuse_special_file(file: Path) -> None:
    """Refuse what is there and is no regular file: reading a pipe or a device may never end."""
    if file.exists() and not file.is_file():
        raise CacheError(f"{file} is not a regular file. {MAKE_AGAIN}")


def canonical_json(content) -> str:
    """One text for one content: keys sorted, no blanks, ASCII only, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(content) -> str:
    """SHA-256 of anything that JSON can hold, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of the whole token -> id mapping of a tokenizer, added and special tokens included.

    Which of them ends or pads a sequence is left out: a cache stores ids, and a base model and its chat version, which
    share every id, may end their turns differently.
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

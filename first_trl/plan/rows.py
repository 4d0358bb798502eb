"""What a split holds, for a plan: rows, tokens and supervised positions, and the bytes that its cache will take.

Rows are counted exactly. Tokens are those of the rows themselves, or of an even sample of a large split. The token
columns of a cache are encoded as the cache would; only the teacher's columns, which nobody knows before the teacher
has run, are estimated, from bytes per position that were measured. Nothing here knows models or devices.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cache.format import cache_schema
from ..cache.shard import encode_shard
from ..constants import IGNORED
from ..data.choices import with_placeholder_answers
from ..data.encoding import encode_row
from ..data.loading import load_split
from ..recipe.rules import looks_local

SAMPLE = 8192  # rows that are tokenised; of a longer split, as many spread evenly over it
# Measured after compression, in bytes: of a kept token its id and its log-probability; the tail of a position.
_TAIL_BYTES, _LOG_PROB_BYTES = 2.9, {"float16": 1.6, "float32": 3.4}
_CLOSED_ID_BYTES, _CHOICE_ID_BYTES, _ID_SHARE = 0.4, 0.1, 0.75
_JOB_BYTES = 1100  # what each shard says of the job that made it
_TEACHER_COLUMNS = ("teacher_ids", "teacher_log_probs", "teacher_tail_log_prob")


@dataclass
class Split:
    """Rows of a split, 0 if unknown. `tokens` and `supervised` are (sampled rows,) counts, empty if unknown."""

    rows: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    supervised: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    examples: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def known(self) -> bool:
        return len(self.tokens) > 0

    def total(self, counts: np.ndarray) -> float:
        """A count over all rows, from its count over the sample."""
        return float(counts.mean()) * self.rows


def read_split(config, role: str, task, tokenizer: Any | None) -> Split:
    """Load a split and encode its rows; what is wrong with it, or out of reach, is said in words."""
    split, place = Split(), f"datasets.{role}"
    try:
        dataset = load_split(config, role if role in ("train", "validation") else "test")
    except ValueError as error:
        said = split.problems if _is_here(config) else split.unknown
        said.append(f"{place}: {str(error).partition(': ')[2] or error}")
        return split
    split.rows = len(dataset)
    if tokenizer is None:
        return split
    if role == "transfer":  # its rows need no answers
        dataset = with_placeholder_answers(dataset, task)
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).astype(int)):
        try:
            split.examples.append(encode_row(dataset[int(index)], int(index), task, tokenizer))
        except ValueError as error:
            split.problems.append(f"{place}: {error}")
            break
    split.tokens = np.array([len(example["input_ids"]) for example in split.examples], np.int64)
    split.supervised = np.array([_positions(example) for example in split.examples], np.int64)
    return split


def _is_here(config) -> bool:
    return config.data_files is not None or looks_local(config.path)


def _positions(example: dict) -> int:
    return sum(label != IGNORED for label in example["labels"][1:])


def padded_tokens(tokens: np.ndarray, batch: int) -> float:
    """Tokens of a row with its share of padding, in batches of `batch` rows drawn at random."""
    order = np.random.default_rng(0).permutation(len(tokens))
    batches = [tokens[order[start : start + batch]] for start in range(0, len(tokens), batch)]
    return sum(int(rows.max()) * len(rows) for rows in batches) / len(tokens)


def id_bytes(support: str, closed: bool, vocab_size: int) -> float:
    """Bytes of a kept token's id: three quarters of its bits, and less where the same answers are always kept.

    Args:
        closed: whether the answer to a closed question is all that is supervised.
    """
    if support == "choices":
        return _CHOICE_ID_BYTES
    return _CLOSED_ID_BYTES if closed else _ID_SHARE * math.log2(vocab_size) / 8


def cache_bytes(split: Split, *, top_k: int, dtype: str, rows_per_shard: int, bytes_of_id: float) -> int:
    """Bytes of the shards of a split's cache, within a few per cent."""
    schema = cache_schema(top_k, dtype)
    per_shard, per_row = 0, 0.0
    for shard in _shards(split.examples, rows_per_shard):
        footer, columns = _token_bytes(shard, schema, top_k)
        per_shard, per_row = max(per_shard, footer), per_row + columns
    shards = math.ceil(split.rows / rows_per_shard)
    kept = top_k * (bytes_of_id + _LOG_PROB_BYTES[dtype])
    per_position = _TAIL_BYTES + kept
    tokens = per_row / len(split.examples) * split.rows
    return round(shards * per_shard + tokens + split.total(split.supervised) * per_position)


def _shards(examples: list[dict], size: int) -> Iterator[list[dict]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _token_bytes(examples: list[dict], schema, top_k: int) -> tuple[int, int]:
    """(what a shard holds beside its columns, what its columns hold that are not the teacher's), in bytes."""
    import io

    import pyarrow.parquet as pq

    rows = []
    for example in examples:
        count = _positions(example)
        row = {
            **example,
            "teacher_ids": np.tile(np.arange(top_k), (count, 1)),
            "teacher_log_probs": np.full((count, top_k), -math.log(2 * top_k)),
            "teacher_tail_log_prob": np.full(count, -math.log(2)),
        }
        rows.append(row)
    content = encode_shard(rows, first_row=0, schema=schema, metadata={})
    metadata = pq.ParquetFile(io.BytesIO(content)).metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column.path_in_schema.partition(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    others = sum(size for name, size in sizes.items() if name not in _TEACHER_COLUMNS)
    return len(content) - sum(sizes.values()) + _JOB_BYTES, others

"""One shard of a teacher cache: from rows to the bytes of a Parquet file, every value checked, and totals over shards.

The same rows give the same bytes, whoever encodes them. Nothing here writes a file.

Shapes: E examples of one shard, N their supervised positions, K kept tokens.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..constants import IGNORED
from ..files import file_digest
from .format import CacheError, row_key

MASS_BINS = 10_000  # of the histogram that the 10th percentile is read from: it is exact to 1e-4
_SETTINGS = {
    "compression": "zstd",
    "compression_level": 9,
    "use_dictionary": ["input_ids.list.element", "labels.list.element"],
    "write_statistics": False,
    "write_page_checksum": True,
    "data_page_version": "1.0",  # the second version leaves the list levels uncompressed
    "version": "2.6",
}
# The bytes of one significance together, where the high ones are nearly constant. Not for float16, which would save
# another byte per position: DuckDB, and with it the Hub's viewer, reads that encoding for wider types only.
_BYTE_PLANES = {
    "teacher_ids.list.element.list.element": "BYTE_STREAM_SPLIT",
    "teacher_tail_log_prob.list.element": "BYTE_STREAM_SPLIT",
}
_FLOAT32_PLANES = {"teacher_log_probs.list.element.list.element": "BYTE_STREAM_SPLIT"}


def encode_shard(rows: Sequence[dict], *, first_row: int, schema: pa.Schema, metadata: dict[bytes, bytes]) -> bytes:
    """The Parquet file of some rows.

    Args:
        rows: dicts with `input_ids`, `labels`, `teacher_ids` (n, K) most probable first, `teacher_log_probs` (n, K)
            and `teacher_tail_log_prob` (n,) in nats, for the n supervised positions of each.
        first_row: number of the first in the dataset, for messages.
        schema: the columns, from `first_trl.cache.format`.
        metadata: what else the file says about itself.

    Raises:
        CacheError: a row is not what it should be.
    """
    buffer, table = io.BytesIO(), _columns(rows, first_row, schema)
    encoding = dict(_BYTE_PLANES)
    if schema.field("teacher_log_probs").type.value_type.value_type == pa.float32():
        encoding |= _FLOAT32_PLANES
    with pq.ParquetWriter(buffer, schema, column_encoding=encoding, **_SETTINGS) as writer:
        writer.write_table(table, row_group_size=len(table))
        writer.add_key_value_metadata(metadata)
    return buffer.getvalue()


class Statistics:
    """What the manifest says about the shards, gathered one shard at a time."""

    def __init__(self, count_labels: Callable[[list], dict[str, int]] | None = None) -> None:
        self.count_labels, self.counts = count_labels, Counter[str]()
        self.shards: list[dict] = []
        self.mass_sum = 0.0
        self.mass_counts = np.zeros(MASS_BINS, dtype=np.int64)

    def add(self, file: Path, table: pa.Table) -> None:
        tail = table.column("teacher_tail_log_prob").combine_chunks().flatten().to_numpy().astype(np.float64)
        mass = np.clip(-np.expm1(tail), 0, 1)  # a = 1 - tau, and a rounded log tau can be a little above 0
        self.mass_sum += float(mass.sum())
        if self.count_labels:
            self.counts.update(self.count_labels(table.column("labels").to_pylist()))
        self.mass_counts += np.histogram(mass, bins=MASS_BINS, range=(0, 1))[0]
        self.shards.append(
            {
                "name": file.name,
                "rows": len(table),
                "supervised_positions": len(tail),
                "bytes": file.stat().st_size,
                "sha256": file_digest(file),
            }
        )

    def totals(self) -> dict:
        count = int(self.mass_counts.sum())
        tenth = int(np.searchsorted(np.cumsum(self.mass_counts), 0.1 * count))
        return {
            "rows": sum(shard["rows"] for shard in self.shards),
            "supervised_positions": count,
            "teacher_mass_mean": self.mass_sum / max(count, 1),
            "teacher_mass_p10": (tenth + 0.5) / MASS_BINS,
            **self.counts,
        }


def _columns(rows: Sequence[dict], first_row: int, schema: pa.Schema) -> pa.Table:
    """Rows as the columns of the cache, every value checked."""
    top_k = schema.field("teacher_ids").type.value_type.list_size
    widths = {"teacher_ids": (top_k,), "teacher_log_probs": (top_k,), "teacher_tail_log_prob": ()}
    counts = [_check_shapes(row, first_row + i, widths) for i, row in enumerate(rows)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids_NK = np.concatenate([np.asarray(row["teacher_ids"], dtype=np.int64).reshape(-1, top_k) for row in rows])
    log_probs_NK = np.concatenate(
        [np.asarray(row["teacher_log_probs"], dtype=np.float32).reshape(-1, top_k) for row in rows]
    )
    tail_N = np.concatenate([np.asarray(row["teacher_tail_log_prob"], dtype=np.float32) for row in rows])
    _check_teacher(ids_NK, log_probs_NK, tail_N, lambda n: first_row + int(np.searchsorted(offsets, n, "right")) - 1)
    log_prob_type = schema.field("teacher_log_probs").type.value_type.value_type
    with np.errstate(over="ignore"):  # below -65504 nats float16 has -inf, which is the same probability: none
        stored_NK = log_probs_NK.astype(log_prob_type.to_pandas_dtype())
    columns = [
        _lists([row["input_ids"] for row in rows]),
        _lists([row["labels"] for row in rows]),
        _nested(offsets, pa.FixedSizeListArray.from_arrays(pa.array(ids_NK.astype(np.int32).ravel()), top_k)),
        _nested(offsets, pa.FixedSizeListArray.from_arrays(pa.array(stored_NK.ravel()), top_k)),
        _nested(offsets, pa.array(tail_N)),
        pa.array([row_key(row["input_ids"], row["labels"]) for row in rows]),
    ]
    return pa.table(columns, schema=schema)


def _lists(rows: Sequence) -> pa.Array:
    values = [np.asarray(row, dtype=np.int32) for row in rows]
    return _nested(np.concatenate([[0], np.cumsum([len(row) for row in values])]), pa.array(np.concatenate(values)))


def _nested(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _check_shapes(row: dict, number: int, widths: dict[str, tuple[int, ...]]) -> int:
    """The number of supervised positions of a row, after checking that all its columns agree on it."""
    tokens, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    if tokens.shape != labels.shape or tokens.ndim != 1 or len(tokens) == 0:
        raise CacheError(f"Row {number} has input_ids of shape {tokens.shape} and labels of shape {labels.shape}.")
    supervised = labels != IGNORED
    if (tokens < 0).any() or (tokens[supervised] != labels[supervised]).any():
        raise CacheError(f"Row {number}: labels are {IGNORED} or the token itself, and tokens are not negative.")
    count = int(supervised[1:].sum())
    for column, width in widths.items():
        found, shape = np.shape(row.get(column)), (count, *width)
        if found != shape and not (count == 0 and np.size(row.get(column)) == 0):
            raise CacheError(f"Row {number}: {column} has shape {found}; {count} supervised positions need {shape}.")
    return count


def _check_teacher(
    ids_NK: np.ndarray,
    log_probs_NK: np.ndarray,
    tail_N: np.ndarray,
    row_of: Callable[[int], int],
    tolerance: float = 0.01,
    vocab_size: int | None = None,
) -> None:
    """Refuse what is no distribution over K different tokens, most probable first, and a tail."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows, or is -inf - -inf, is judged below
        probabilities_N = np.exp(log_probs_NK.astype(np.float64)).sum(axis=1) + np.exp(tail_N.astype(np.float64))
        rising_N = (np.diff(log_probs_NK, axis=1) > 0).any(axis=1)
    end = 2**31 if vocab_size is None else vocab_size
    off_N = ~(np.abs(probabilities_N - 1) < tolerance)  # also true for NaN
    for wrong_N, what in (
        (off_N, "probabilities of the kept tokens and the tail that do not sum to 1"),
        (rising_N, "kept tokens that are not sorted, most probable first"),
        ((ids_NK < 0).any(axis=1) | (ids_NK >= end).any(axis=1), f"token ids outside 0 to {end - 1}"),
        ((np.diff(np.sort(ids_NK, axis=1), axis=1) == 0).any(axis=1), "the same token kept twice"),
    ):
        if wrong_N.any():
            n = int(wrong_N.argmax())
            raise CacheError(
                f"The teacher gave row {row_of(n)} {what}: ids {ids_NK[n].tolist()}, log-probabilities "
                f"{log_probs_NK[n].tolist()}, tail {tail_N[n]}. Check the teacher's weights and the dtype it runs in."
            )


def check_table(table: pa.Table, first_row: int, vocab_size: int | None = None) -> None:
    """Refuse the rows of a shard that no teacher gives, whatever their manifest says.

    Args:
        first_row: number of the first in the dataset, for messages.
        vocab_size: size of the teacher's tokenizer, where the manifest has it.

    Raises:
        CacheError: a value is missing, rows and supervised positions do not match, labels are not the tokens, or a
            position's probabilities are no distribution over K different tokens of the vocabulary and a tail.
    """
    columns = {name: _whole_lists(table.column(name).combine_chunks(), name) for name in table.column_names}
    (tokens_T, lengths_E), (labels_T, label_lengths_E) = columns["input_ids"], columns["labels"]
    _refuse_rows(lengths_E < 1, first_row, "no token")
    _refuse_rows(lengths_E != label_lengths_E, first_row, "more tokens than labels, or fewer")
    starts_E = np.cumsum(lengths_E) - lengths_E
    supervised_T = labels_T != IGNORED
    wrong_T = (supervised_T & (labels_T != tokens_T)) | (tokens_T < 0)
    _refuse_rows(np.logical_or.reduceat(wrong_T, starts_E), first_row, f"labels other than {IGNORED} and its tokens")
    if vocab_size is not None:
        beyond_E = np.maximum.reduceat(tokens_T, starts_E) >= vocab_size
        _refuse_rows(beyond_E, first_row, f"tokens beyond the tokenizer's last, {vocab_size - 1}")
    supervised_T[starts_E] = False  # nothing comes before a document's first token to predict it from
    counts_E = np.add.reduceat(supervised_T.astype(np.int64), starts_E)
    for name in ("teacher_ids", "teacher_log_probs", "teacher_tail_log_prob"):
        _refuse_rows(columns[name][1] != counts_E, first_row, f"supervised positions without an entry in {name}")
    ends_E = np.cumsum(counts_E)
    if ends_E[-1]:
        top_k = len(columns["teacher_ids"][0]) // int(ends_E[-1])
        ids_NK, log_probs_NK = (columns[name][0].reshape(-1, top_k) for name in ("teacher_ids", "teacher_log_probs"))
        _check_teacher(
            ids_NK,
            log_probs_NK.astype(np.float32),
            columns["teacher_tail_log_prob"][0],
            lambda n: first_row + int(np.searchsorted(ends_E, n, "right")),
            tolerance=0.02,  # float16 adds up to 0.001 to what a writer lets pass
            vocab_size=vocab_size,
        )


def _whole_lists(column: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The innermost values of a column, and the length of each of its lists; a null anywhere is refused."""
    lengths = np.zeros(0, dtype=np.int64)
    values = column
    while not values.null_count and (pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)):
        lengths = lengths if len(lengths) else values.value_lengths().to_numpy(zero_copy_only=False)
        values = values.flatten()
    if values.null_count:
        raise CacheError(f"The column {name} holds a null, where every value is known. Make the cache again.")
    return values.to_numpy(zero_copy_only=False), lengths


def _refuse_rows(wrong_E: np.ndarray, first_row: int, what: str) -> None:
    if wrong_E.any():
        raise CacheError(f"Row {first_row + int(wrong_E.argmax())} of the cache has {what}. Make the cache again.")

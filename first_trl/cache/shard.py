"""One shard of a teacher cache: from rows to the bytes of a Parquet file, and what no teacher gives refused.

The same rows give the same bytes, whoever encodes them; the same check stands before writing and after reading.

Shapes: E examples of one shard, T their tokens, N their supervised positions, K kept tokens.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..constants import IGNORED
from ..files import file_digest
from .format import CacheError, dataset_fingerprint, row_key

SUM_TOLERANCE = 0.015  # float16 rounding of K + 1 probabilities moves their sum by less
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
    keys = pa.array([row_key(row["input_ids"], row["labels"]) for row in rows])
    try:
        columns = [_column([row[name] for row in rows], schema.field(name).type) for name in schema.names[:-1]]
    except ValueError as error:  # of numpy, and of Arrow for what does not fit into 32 bits
        raise CacheError(f"Rows {first_row} to {first_row + len(rows) - 1} fit no shard: {error}.") from error
    table = pa.table([*columns, keys], schema=schema)
    check_table(table, first_row)
    wide = schema.field("teacher_log_probs").type.value_type.value_type == pa.float32()
    encoding, buffer = _BYTE_PLANES | (_FLOAT32_PLANES if wide else {}), io.BytesIO()
    with pq.ParquetWriter(buffer, schema, column_encoding=encoding, **_SETTINGS) as writer:
        writer.write_table(table, row_group_size=len(table))
        writer.add_key_value_metadata(metadata)
    return buffer.getvalue()


def _column(rows: Sequence, kind: pa.ListType) -> pa.Array:
    """A column of lists, of numbers or of K numbers each."""
    top_k = kind.value_type.list_size if pa.types.is_fixed_size_list(kind.value_type) else None
    number = kind.value_type.value_type if top_k else kind.value_type
    before = np.int64 if pa.types.is_integer(number) else np.float32
    parts = [np.asarray(row, dtype=before).reshape((-1, top_k) if top_k else -1) for row in rows]
    values = np.concatenate(parts).ravel()
    if pa.types.is_floating(number):
        with np.errstate(over="ignore"):  # below -65504 nats float16 has -inf, which is the same probability: none
            values = values.astype(number.to_pandas_dtype())
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    array = pa.array(values, number)
    return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(array, top_k) if top_k else array)


def check_table(table: pa.Table, first_row: int, vocab_size: int | None = None) -> None:
    """Refuse rows of a shard that no teacher gives, whatever their manifest says.

    Args:
        first_row: number of the first in the dataset, for messages.
        vocab_size: size of the teacher's tokenizer, where the manifest has it.

    Raises:
        CacheError: a value is missing, rows and supervised positions do not match, labels are not the tokens, or a
            position's probabilities are no distribution over K different tokens of the vocabulary and a tail.
    """

    def refuse(wrong: np.ndarray, what: str, example_of: Callable[[int], int] = int) -> None:
        if wrong.any():
            row = first_row + example_of(int(wrong.argmax()))
            raise CacheError(
                f"Row {row} has {what}: no teacher gives that. Check the teacher and make the cache again."
            )

    columns = {name: _values_and_lengths(table.column(name).combine_chunks(), name) for name in table.column_names}
    (tokens_T, lengths_E), (labels_T, label_lengths_E) = columns["input_ids"], columns["labels"]
    end = 2**31 if vocab_size is None else vocab_size
    refuse(lengths_E < 1, "no token")
    refuse(lengths_E != label_lengths_E, "more tokens than labels, or fewer")
    starts_E = np.cumsum(lengths_E) - lengths_E
    supervised_T = labels_T != IGNORED
    wrong_T = (supervised_T & (labels_T != tokens_T)) | (tokens_T < 0)
    refuse(np.logical_or.reduceat(wrong_T, starts_E), f"labels other than {IGNORED} and its tokens")
    refuse(np.maximum.reduceat(tokens_T, starts_E) >= end, f"tokens beyond the tokenizer's last, {end - 1}")
    supervised_T[starts_E] = False  # nothing comes before a document's first token to predict it from
    counts_E = np.add.reduceat(supervised_T.astype(np.int64), starts_E)
    for name in ("teacher_ids", "teacher_log_probs", "teacher_tail_log_prob"):
        refuse(columns[name][1] != counts_E, f"supervised positions without an entry in {name}, or too many")
    ends_E, tail_N = np.cumsum(counts_E), columns["teacher_tail_log_prob"][0]
    shape = (len(tail_N), table.schema.field("teacher_ids").type.value_type.list_size)
    ids_NK, log_probs_NK = (columns[name][0].reshape(shape) for name in ("teacher_ids", "teacher_log_probs"))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows, or is -inf - -inf, is judged below
        sums_N = np.exp(log_probs_NK.astype(np.float64)).sum(axis=1) + np.exp(tail_N.astype(np.float64))
        rising_N = (np.diff(log_probs_NK.astype(np.float32), axis=1) > 0).any(axis=1)
    for wrong_N, what in (
        (~(np.abs(sums_N - 1) < SUM_TOLERANCE), "probabilities that do not sum to 1"),  # NaN does not either
        (rising_N, "kept tokens that are not sorted, most probable first"),
        ((ids_NK < 0).any(axis=1) | (ids_NK >= end).any(axis=1), f"token ids outside 0 to {end - 1}"),
        ((np.diff(np.sort(ids_NK, axis=1), axis=1) == 0).any(axis=1), "the same token kept twice"),
    ):
        n = int(wrong_N.argmax()) if len(wrong_N) else 0
        what += f" (ids {ids_NK[n : n + 1].tolist()}, log-probabilities {log_probs_NK[n : n + 1].tolist()})"
        refuse(wrong_N, what, lambda n: int(np.searchsorted(ends_E, n, "right")))


def _values_and_lengths(column: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The innermost values of a column, and the length of each of its lists; a null anywhere is refused."""
    lengths, values = np.zeros(0, dtype=np.int64), column
    while not values.null_count and (pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)):
        lengths = lengths if len(lengths) else values.value_lengths().to_numpy(zero_copy_only=False)
        values = values.flatten()
    if values.null_count:
        raise CacheError(f"The column {name} holds a null, where every value is known. Make the cache again.")
    return values.to_numpy(zero_copy_only=False), lengths


def summarize(shards: Iterable[tuple[Path, pa.Table]], count_labels: Callable | None = None) -> dict:
    """What the manifest says about its shards: `dataset_fingerprint`, `shards`, `totals`.

    Args:
        shards: each file and its rows, read one at a time.
        count_labels: from the labels of a shard to counts, which are added to the totals.
    """
    entries: list[dict] = []
    mass_sum, mass_counts, counts = 0.0, np.zeros(MASS_BINS, dtype=np.int64), Counter[str]()

    def keys() -> Iterable[str]:
        nonlocal mass_sum
        for file, table in shards:
            tail = table.column("teacher_tail_log_prob").combine_chunks().flatten().to_numpy().astype(np.float64)
            mass = np.clip(-np.expm1(tail), 0, 1)  # a = 1 - tau, and a rounded log tau can be a little above 0
            mass_sum += float(mass.sum())
            np.add(mass_counts, np.histogram(mass, bins=MASS_BINS, range=(0, 1))[0], out=mass_counts)
            counts.update(count_labels(table.column("labels").to_pylist()) if count_labels else {})
            size = {"rows": len(table), "supervised_positions": len(tail), "bytes": file.stat().st_size}
            entries.append({"name": file.name, **size, "sha256": file_digest(file)})
            yield from table.column("row_key").to_pylist()

    digest, positions = dataset_fingerprint(keys()), int(mass_counts.sum())
    tenth = int(np.searchsorted(np.cumsum(mass_counts), 0.1 * positions))
    totals = {
        "rows": sum(entry["rows"] for entry in entries),
        "supervised_positions": positions,
        "teacher_mass_mean": mass_sum / max(positions, 1),
        "teacher_mass_p10": (tenth + 0.5) / MASS_BINS,
        **counts,
    }
    return {"dataset_fingerprint": digest, "shards": entries, "totals": totals}

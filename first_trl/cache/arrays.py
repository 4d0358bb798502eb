"""From the columns of a cache to the arrays that calibration and its search read.

A row is one supervised position: K log-probabilities, the tail's, and which of the K+1 holds the label. The two ways
of choosing positions are the recipe's `calibrate.positions`: `answer`, the first completion token of each example in
which the choices differ, and `all`, every supervised token but those that the template forces (its opening, the end of
turn): no answer could differ in them, and they would fill the most confident bin.

Rows come in blocks of examples, so that a cache of any size can be looked through; only what a search sorts and bins
again and again, the validation rows, is put together.

Shapes: E examples, T tokens, N supervised positions, K kept tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..constants import IGNORED, POSITIONS
from ..data.choices import forced_positions
from ..errors import FirstTrlError

BLOCK = 256  # examples read at a time: with 1,024 tokens each, all in the loss, some 30 MB
# A teacher that is this much more accurate or confident on the rows it labels than on validation has memorised them.
GAP = 0.05


class Rows(NamedTuple):
    """Rows of a cache: `log_probs` (N, K+1) float32 nats with the tail last, `target` (N,) int64 in 0..K.

    `label_ids` (N,) are the labels' tokens, `examples` (N,) the number of each row's example, ascending.
    """

    log_probs: np.ndarray
    target: np.ndarray
    label_ids: np.ndarray
    examples: np.ndarray


def summary(blocks: Iterable[Rows], labelled: bool = True) -> dict[str, float | None]:
    """Accuracy of the first token, and its mean probability: the two numbers whose gap is the miscalibration.

    Without labels, where the targets are the teacher's own answers, the accuracy is None.
    """
    num_positions, correct, confidence = 0, 0, 0.0
    for block in blocks:
        kept_NK = block.log_probs[:, :-1]
        num_positions += len(block.target)
        correct += int((block.target == kept_NK.argmax(axis=1)).sum())
        confidence += float(np.exp(kept_NK.max(axis=1)).sum(dtype=np.float64))
    return {
        "num_positions": num_positions,
        "accuracy": correct / num_positions if labelled else None,
        "confidence": confidence / num_positions,
    }


def is_memorised(cached: dict, validation: dict) -> bool:
    """Whether two summaries differ as those of rows that a teacher was trained on and of rows that it never saw."""
    known = ("confidence",) if cached["accuracy"] is None else ("accuracy", "confidence")
    return any(cached[name] - validation[name] >= GAP for name in known)


def calibration_rows(dataset, positions: str = "answer", forced: Mapping | None = None) -> Rows:
    """All of `row_blocks` in one: (N, K+1) in memory, for validation."""
    return Rows(*map(np.concatenate, zip(*row_blocks(dataset, positions, forced), strict=True)))


def row_blocks(dataset, positions: str = "answer", forced: Mapping | None = None) -> Iterator[Rows]:
    """The rows of a cache that a calibration looks at, those of at most `BLOCK` examples at a time.

    Args:
        dataset: `datasets.Dataset` with the cache's columns.
        positions: `answer` or `all`.
        forced: of the cache's manifest: what every answer begins and ends with. None keeps every position, and takes
            each example's first one for its answer.

    Raises:
        FirstTrlError: an unknown `positions`, or nothing left to look at.
    """
    if positions not in POSITIONS:
        raise FirstTrlError(f"positions is {positions!r}; choose one of {', '.join(POSITIONS)}.")
    first, found = 0, False
    for table in dataset.with_format("arrow").iter(batch_size=BLOCK):
        rows = _rows(table, first, positions, forced)
        first += len(table)
        if rows is not None:
            found = True
            yield rows
    if not found:
        raise FirstTrlError(
            f"No supervised position is left under positions={positions!r}: the split is empty of answers."
        )


def _rows(table: pa.Table, first: int, positions: str, forced: Mapping | None) -> Rows | None:
    labels = table["labels"].combine_chunks()
    lengths_E = pc.list_value_length(labels).to_numpy(zero_copy_only=False)
    starts_E = np.cumsum(lengths_E) - lengths_E
    labels_T = labels.flatten().to_numpy()
    supervised_T = labels_T != IGNORED
    supervised_T[starts_E] = False  # the first token of a document is never predicted
    example_N = np.repeat(np.arange(len(lengths_E)), lengths_E)[supervised_T]
    label_ids_N = labels_T[supervised_T].astype(np.int64)
    ids_NK = flat(table["teacher_ids"])
    log_probs_NK1 = np.column_stack([flat(table["teacher_log_probs"]), flat(table["teacher_tail_log_prob"])])
    assert len(ids_NK) == len(label_ids_N), "teacher rows and supervised positions differ"
    if positions == "answer":
        place_N = np.arange(len(example_N)) - np.searchsorted(example_N, example_N)  # within the example
        kept_N = place_N == (forced["answer"] if forced else 0)
    else:
        kept_N = ~forced_positions(labels_T, starts_E, forced)[supervised_T] if forced else np.full(len(ids_NK), True)
    if not kept_N.any():
        return None
    is_label_NK = ids_NK[kept_N] == label_ids_N[kept_N, None]
    target_N = np.where(is_label_NK.any(axis=1), is_label_NK.argmax(axis=1), ids_NK.shape[1])
    return Rows(log_probs_NK1[kept_N], target_N.astype(np.int64), label_ids_N[kept_N], first + example_N[kept_N])


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) or (N, K) float32/int64 values of a list column, examples one after the other."""
    values = column.combine_chunks().flatten()
    shape: tuple[int, ...] = (len(values),)
    if pa.types.is_fixed_size_list(values.type) or pa.types.is_list(values.type):
        num_rows, values = len(values), values.flatten()
        shape = (num_rows, len(values) // max(num_rows, 1))
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64).reshape(shape)

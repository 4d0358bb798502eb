"""From the columns of a cache to the arrays that calibration and its search read.

A row is one supervised position: K log-probabilities, the tail's, and which of the K+1 holds the label. The two ways
of choosing positions are the recipe's `calibrate.positions`: `answer`, the token of each example that says its answer
(with choices the first in which they differ), and `all`, every supervised token but forced ones, such as an end of
turn, which would fill the most confident bin.

Rows come in blocks of examples, so that a cache of any size can be looked through; only what a search sorts and bins
again and again, the validation rows, is put together.

Shapes: E examples, T tokens, N supervised positions, K kept tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..data.choices import forced_positions

POSITIONS = ("answer", "all")
BLOCK = 256  # examples read at a time: with 1,024 tokens each, all in the loss, some 30 MB
# A teacher that is this much more accurate or confident on the rows it labels than on validation knows them by heart.
GAP = 0.05


class Rows(NamedTuple):
    """Rows of a cache: `log_probs` (N, K+1) float32 nats with the tail last, `target` (N,) int64 in 0..K.

    `labels` (N,) are the targets' token ids, `examples` (N,) the numbers of the examples they stand in.
    """

    log_probs: np.ndarray
    target: np.ndarray
    labels: np.ndarray
    examples: np.ndarray


def summary(blocks: Iterable[Rows], labelled: bool = True) -> dict[str, float | None]:
    """Accuracy of the first token, and its mean probability: the two numbers whose gap is the miscalibration.

    Without labels, where the targets are the teacher's own answers, the accuracy is None.
    """
    num_positions, correct, confidence = 0, 0, 0.0
    for log_probs_NK1, target_N, *_ in blocks:
        kept_NK = log_probs_NK1[:, :-1]
        num_positions += len(target_N)
        correct += int((target_N == kept_NK.argmax(axis=1)).sum())
        confidence += float(np.exp(kept_NK.max(axis=1)).sum(dtype=np.float64))
    return {
        "num_positions": num_positions,
        "accuracy": correct / num_positions if labelled else None,
        "confidence": confidence / num_positions,
    }


def learned_by_heart(cached: dict, validation: dict) -> bool:
    """Whether two summaries differ as those of rows that a teacher was trained on and of rows that it never saw."""
    known = ("confidence",) if cached["accuracy"] is None else ("accuracy", "confidence")
    return any(cached[name] - validation[name] >= GAP for name in known)


def calibration_rows(dataset, positions: str = "answer", forced: Mapping[str, Any] | None = None) -> Rows:
    """All of `row_blocks` in one: (N, K+1) in memory, for validation."""
    return Rows(*map(np.concatenate, zip(*row_blocks(dataset, positions, forced), strict=True)))


def row_blocks(dataset, positions: str = "answer", forced: Mapping[str, Any] | None = None) -> Iterator[Rows]:
    """The rows of a cache that a calibration looks at, those of at most `BLOCK` examples at a time.

    Args:
        dataset: `datasets.Dataset` with the cache's columns.
        positions: `answer` or `all`.
        forced: of the manifest, from `first_trl.data.choices.forced_tokens`; without it nothing is forced.

    Raises:
        ValueError: an unknown `positions`, or nothing left to look at.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; choose one of {', '.join(POSITIONS)}.")
    found = False
    for block, table in enumerate(dataset.with_format("arrow").iter(batch_size=BLOCK)):
        rows = _rows(table, positions, forced or {"opening": [], "closing": [], "answer": 0})
        if rows is not None:
            found = True
            yield rows._replace(examples=rows.examples + block * BLOCK)
    if not found:
        raise ValueError(
            f"No supervised position is left under positions={positions!r}; the split is empty of answers."
        )


def _rows(table: pa.Table, positions: str, forced: Mapping[str, Any]) -> Rows | None:
    """The rows of some examples; None where none is left."""
    labels = table["labels"].combine_chunks()
    starts = np.asarray(labels.offsets)[:-1] - int(labels.offsets[0].as_py())
    labels_T = labels.flatten().to_numpy()
    supervised_T = labels_T != -100
    supervised_T[starts] = False  # a document's first token is nobody's target
    document_T = np.repeat(np.arange(len(starts)), np.asarray(pa.compute.list_value_length(labels)))
    target_ids_N, document_N = labels_T[supervised_T], document_T[supervised_T]
    if not supervised_T.any():
        return None
    ids_NK = _flat(table["teacher_ids"])
    log_probs_NK1 = np.column_stack([_flat(table["teacher_log_probs"]), _flat(table["teacher_tail_log_prob"])])
    assert len(ids_NK) == len(target_ids_N), "teacher rows and supervised positions differ"
    if positions == "answer":
        first_N = np.diff(document_N, prepend=-1) != 0
        offset_N = np.arange(len(document_N)) - np.flatnonzero(first_N)[np.cumsum(first_N) - 1]
        kept_N = offset_N == forced["answer"]
    else:
        kept_N = ~forced_positions(labels_T, starts, forced)[supervised_T]
    if not kept_N.any():
        return None
    is_label_NK = ids_NK[kept_N] == target_ids_N[kept_N, None]
    target_N = np.where(is_label_NK.any(axis=1), is_label_NK.argmax(axis=1), ids_NK.shape[1])
    return Rows(log_probs_NK1[kept_N], target_N.astype(np.int64), target_ids_N[kept_N], document_N[kept_N])


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) or (N, K) float32/int64 values of a list column, examples one after the other."""
    values = column.combine_chunks().flatten()
    width = None
    if pa.types.is_fixed_size_list(values.type) or pa.types.is_list(values.type):
        num_rows, values = len(values), values.flatten()
        width = len(values) // max(num_rows, 1)
    array = values.to_numpy(zero_copy_only=False)
    array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
    return array if width is None else array.reshape(-1, width)

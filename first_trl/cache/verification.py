"""Whether a finished teacher cache is still true: every row by its key, and a sample of the rows by the teacher.

`check_content` compares every row with its key, and the totals with the manifest; `compare_with_teacher` runs the
teacher again. That the bytes are those of the manifest is checked by `first_trl.cache.reader`, before anything here.

Shapes: N supervised positions, K kept tokens, K1 = K+1 (last column the tail). Log-probabilities and their differences
are in nats.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch

from ..constants import IGNORED
from ..head import partition_log_probs, top_k_log_probs
from ..modeling import innermost, language_model_head
from ..scoring import hidden_states_at
from .format import CacheError, dataset_fingerprint, row_key
from .reader import TeacherCache, check_cache
from .shard import Statistics

# A position of the cache was scored in one batch, a sample's in another; both differ from a third as two others do.
_NOISE_FACTOR = 4
_SUM_ERROR = 2.0**-17  # of probabilities, from log-probabilities that are float32 differences of logits up to 128
_LEAST_NOISE = 1e-5  # nats: float32 sums over a large vocabulary, where the two live runs happen to agree


def check_content(cache: TeacherCache) -> None:
    """Compare every row with its key, and their fingerprint and totals with the manifest.

    The bytes of an opened cache are those of its manifest; this finds a manifest that was made for wrong rows.

    Raises:
        CacheError: one differs.
    """
    statistics, keys = Statistics(), []
    for shard in cache.manifest["shards"]:
        with pq.ParquetFile(cache.path / shard["name"], page_checksum_verification=True) as parquet:
            table = parquet.read()
        statistics.add(cache.path / shard["name"], table)
        for row in table.select(["input_ids", "labels", "row_key"]).to_pylist():
            keys.append(row_key(row["input_ids"], row["labels"]))
            if row["row_key"] != keys[-1]:
                raise CacheError(
                    f"{cache.path / shard['name']} is not sound: row {len(keys) - 1} has row_key {row['row_key']}, "
                    f"its tokens give {keys[-1]}. Make the cache again."
                )
    found = {"dataset_fingerprint": dataset_fingerprint(keys), "totals": statistics.totals()}
    check_cache(cache, **found)


@dataclass(frozen=True)
class TeacherComparison:
    """A sample of the cache beside the teacher as it is now; differences of log-probabilities in nats.

    Args:
        rows, positions: of the sample.
        largest: the largest difference between cache and teacher.
        unexplained: the largest that is left when each is lessened by what rounding does there, at `row` and token
            `token_id` (None: the tail).
        live: the largest difference between the teacher with one row at a time and in batches.
        tolerance: of `unexplained`: 4 times `live`.
        exceeding: positions where more is unexplained.
    """

    rows: int
    positions: int
    largest: float
    unexplained: float
    row: int
    token_id: int | None
    cached: float
    now: float
    live: float
    tolerance: float
    exceeding: int


@torch.inference_mode()
def compare_with_teacher(
    cache: TeacherCache, model: torch.nn.Module, vocab_limit: int, num_rows: int = 32, tokens_per_batch: int = 8192
) -> TeacherComparison:
    """Run the teacher again over rows spread evenly over a cache, one at a time and in batches.

    Both the log-probabilities of the cached tokens and the K largest are compared: tokens of the right probability are
    not enough, nor are tokens that were once among the largest. A cache of the choices holds them whatever their rank.

    Args:
        vocab_limit: size of the tokenizer, as for `first_trl.scoring.teacher_rows`.
    """
    numbers = np.unique(np.linspace(0, len(cache.dataset) - 1, num_rows).astype(int)).tolist()
    rows = [cache.dataset[number] for number in numbers]
    rows_of_N = np.repeat(numbers, [len(row["teacher_ids"]) for row in rows])
    top_k = cache.manifest["top_k"]
    ids_NK = np.concatenate([np.reshape(row["teacher_ids"], (-1, top_k)) for row in rows]).astype(np.int64)
    cached_NK1 = np.concatenate(
        [
            np.column_stack([np.reshape(row["teacher_log_probs"], (-1, top_k)), row["teacher_tail_log_prob"]])
            for row in rows
        ]
    ).astype(np.float32)
    if len(cached_NK1) == 0:
        raise CacheError(f"The {len(rows)} rows sampled of {cache.path} have no supervised position. Ask for more.")
    singly, best_NK = _live(model, rows, 1, vocab_limit)
    together, _ = _live(model, rows, tokens_per_batch, vocab_limit)
    live = float(_difference(singly, together, np.float32).max())
    stored = np.dtype(cache.manifest["dtype"])
    difference_NK1 = _difference(cached_NK1, singly, stored)
    if cache.manifest.get("support") != "choices":
        difference_NK1[:, :-1] = np.maximum(difference_NK1[:, :-1], _difference(cached_NK1[:, :-1], best_NK, stored))
    unexplained_NK1 = (difference_NK1 - _rounding(cached_NK1, singly, stored, cache.manifest.get("tail"))).clip(0)
    worst, column = np.unravel_index(np.argmax(unexplained_NK1), unexplained_NK1.shape)
    tolerance = max(_NOISE_FACTOR * live, _LEAST_NOISE)
    return TeacherComparison(
        rows=len(rows),
        positions=len(cached_NK1),
        largest=float(difference_NK1.max()),
        unexplained=float(unexplained_NK1[worst, column]),
        row=int(rows_of_N[worst]),
        token_id=int(ids_NK[worst, column]) if column < top_k else None,
        cached=float(cached_NK1[worst, column]),
        now=float(singly[worst, column]),
        live=live,
        tolerance=tolerance,
        exceeding=int((unexplained_NK1 > tolerance).any(axis=1).sum()),
    )


def _live(model, rows: list[dict], tokens_per_batch: int, vocab_limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's (N, K+1) at the cached tokens, and its (N, K) largest, for rows in batches of so many tokens."""
    positions = [np.flatnonzero(np.asarray(row["labels"][1:]) != IGNORED) for row in rows]
    head, at_cached, largest = language_model_head(innermost(model)), [None] * len(rows), [None] * len(rows)
    for indices, hidden_ND in hidden_states_at(model, [row["input_ids"] for row in rows], positions, tokens_per_batch):
        ids_NK = torch.as_tensor(np.concatenate([rows[i]["teacher_ids"] for i in indices if len(positions[i])]))
        ids_NK = ids_NK.to(hidden_ND.device, torch.int64)
        log_probs_NK1 = partition_log_probs(hidden_ND, head.weight, ids_NK, *head[1:])
        best_NK1 = top_k_log_probs(hidden_ND, head.weight, ids_NK.shape[1], *head[1:], vocab_limit=vocab_limit)[1]
        ends = np.cumsum([len(positions[i]) for i in indices])[:-1]
        for i, ours, best in zip(
            indices, np.split(log_probs_NK1.cpu(), ends), np.split(best_NK1[:, :-1].cpu(), ends), strict=True
        ):
            at_cached[i], largest[i] = np.asarray(ours), np.asarray(best)
    return np.concatenate(at_cached), np.concatenate(largest)


def _difference(a: np.ndarray, b: np.ndarray, stored: np.dtype) -> np.ndarray:
    """|a - b|, where what the stored type cannot hold is as good as -inf."""
    floor = float(np.finfo(stored).min)
    return np.abs(np.maximum(a, floor).astype(np.float64) - np.maximum(b, floor))


def _rounding(cached_NK1: np.ndarray, now_NK1: np.ndarray, stored: np.dtype, tail: str | None) -> np.ndarray:
    """What rounding can do to each column, nats.

    The kept tokens: half the distance from the stored value to the next lower one of its type. The tail, where it is
    what K probabilities leave of 1: the error e of their sum, which is e / tau in its logarithm.
    """
    held_NK = np.maximum(cached_NK1[:, :-1], np.finfo(stored).min).astype(stored)
    rounding_NK1 = np.zeros(cached_NK1.shape)
    rounding_NK1[:, :-1] = (held_NK.astype(np.float64) - np.nextafter(held_NK, stored.type(-np.inf))) / 2
    if tail == "from_top_k":
        lower_N = np.minimum(cached_NK1[:, -1], now_NK1[:, -1]).astype(np.float64)
        rounding_NK1[:, -1] = _SUM_ERROR / np.exp(np.maximum(lower_N, -500))
    return rounding_NK1

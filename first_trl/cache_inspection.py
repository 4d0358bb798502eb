"""What is in a teacher cache, for people: its totals, its confidence, some of its rows; and whether it is still true.

`describe` shows; `check_content` compares every row with its key; `compare_with_teacher` runs the teacher again over a
sample of the rows. Nothing here writes.

Shapes: N supervised positions, D hidden, K kept tokens, K1 = K+1 (last column the tail). Units: nats, bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from .cache import TeacherCache, check_cache
from .cache_format import CacheError
from .cache_rows import Statistics
from .data import IGNORED
from .fingerprints import dataset_fingerprint, row_key
from .head import partition_log_probs, top_k_log_probs
from .modeling import language_model_head
from .scoring import hidden_states_at, innermost

NUM_EXAMPLES = 10
_POSITIONS_SHOWN = 3
_BAR = 40  # characters
# A position of the cache was scored in one batch, a sample's in another; both differ from a third as two others do.
_NOISE_FACTOR = 4
_LEAST_NOISE = 1e-5  # nats: float32 sums over a large vocabulary, where the two live runs happen to agree


def teacher_bytes(cache: TeacherCache) -> int:
    """Bytes on disk of the three columns that hold the teacher."""
    return sum(size for name, size in _column_bytes(cache) if name.startswith("teacher"))


def _column_bytes(cache: TeacherCache) -> Iterator[tuple[str, int]]:
    for shard in cache.manifest["shards"]:
        metadata = pq.read_metadata(cache.path / shard["name"])
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                yield column.path_in_schema, column.total_compressed_size


def describe(cache: TeacherCache, tokenizer=None) -> str:
    """A page about a cache: what it is made from, its size, the teacher's confidence, and ten of its rows.

    Args:
        tokenizer: the teacher's, to show tokens as text; without it they are numbers.
    """
    manifest, totals = cache.manifest, cache.manifest["totals"]
    positions = max(totals["supervised_positions"], 1)
    whole, ours = sum(shard["bytes"] for shard in manifest["shards"]), teacher_bytes(cache)
    teacher, task = manifest["teacher"], manifest["task"]
    kept = "those of the choices" if manifest.get("support") == "choices" else "the most probable"
    facts = {
        "teacher": ", ".join(f"{name} {value}" for name, value in teacher.items() if value is not None),
        "task": ", ".join(f"{name} {value!r}" for name, value in task.items() if value is not None),
        "rows": f"{totals['rows']:,} in {len(manifest['shards'])} shards",
        "supervised positions": f"{totals['supervised_positions']:,}",
        "kept": f"{manifest['top_k']} tokens each ({kept}), log-probabilities in {manifest['dtype']}",
        "on disk": f"{whole:,} bytes, {whole / positions:.1f} per supervised position",
        "of these, the teacher": f"{ours:,} bytes, {ours / positions:.1f} per supervised position",
        "teacher's mass on them": f"mean {totals['teacher_mass_mean']:.4f}, p10 {totals['teacher_mass_p10']:.4f}",
    }
    lines = [str(cache.path), *(f"  {name:<23} {value}" for name, value in facts.items())]
    lines += ["", "confidence of the teacher's first token", *_histogram(_confidence_counts(cache))]
    shown = np.unique(np.linspace(0, totals["rows"] - 1, NUM_EXAMPLES).astype(int)).tolist()
    lines += ["", f"{len(shown)} rows, evenly spread"]
    for number in shown:
        lines += _example(number, cache.dataset[number], tokenizer)
    return "\n".join(lines)


def _confidence_counts(cache: TeacherCache, num_bins: int = 10) -> np.ndarray:
    counts = np.zeros(num_bins, dtype=np.int64)
    for batch in cache.dataset.select_columns(["teacher_log_probs"]).with_format("arrow").iter(batch_size=1024):
        log_probs_NK = _flat(batch["teacher_log_probs"]).reshape(-1, cache.manifest["top_k"])
        counts += np.histogram(np.exp(log_probs_NK[:, 0]).clip(0, 1), bins=num_bins, range=(0, 1))[0]
    return counts


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    values = column.combine_chunks().flatten()
    values = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
    return values.to_numpy(zero_copy_only=False).astype(np.float32)


def _histogram(counts: np.ndarray) -> list[str]:
    width = _BAR / max(counts.max(), 1)
    return [
        f"  {i / len(counts):.1f} to {(i + 1) / len(counts):.1f} {count:>12,}  {'#' * round(count * width)}".rstrip()
        for i, count in enumerate(counts)
    ]


def _example(number: int, row: dict, tokenizer) -> list[str]:
    def text(ids) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else repr(tokenizer.decode(ids))

    supervised = [i for i, label in enumerate(row["labels"]) if label != IGNORED and i > 0]
    lines = [f"  row {number}: {text(row['input_ids'][: supervised[0]] if supervised else row['input_ids'])}"]
    for place, position in enumerate(supervised[:_POSITIONS_SHOWN]):
        pairs = zip(row["teacher_ids"][place], row["teacher_log_probs"][place], strict=True)
        kept = ", ".join(f"{text([token])} {np.exp(log_prob):.3f}" for token, log_prob in pairs)
        tail = np.exp(row["teacher_tail_log_prob"][place])
        lines.append(f"    label {text([row['labels'][position]])}: teacher {kept}, all others {tail:.3f}")
    if len(supervised) > _POSITIONS_SHOWN:
        lines.append(f"    and {len(supervised) - _POSITIONS_SHOWN} more positions")
    return lines


def teacher_near(path: Path) -> str | None:
    """The teacher of the run that a cache lies in, `runs/<name>/cache/<role>`: the one given to it or made by it."""
    run = path.resolve().parent.parent
    if not (run / "recipe.resolved.yaml").is_file():
        return None
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text(encoding="utf-8"))
    given = (recipe.get("cache") or {}).get("teacher")
    return given or (str(run / "teacher") if (run / "teacher").is_dir() else None)


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
        largest: the largest difference between cache and teacher, at `row` and token `token_id`.
        live: the largest difference between the teacher with one row at a time and in batches.
        tolerance: what is allowed at that place: `live` times 4, and the rounding of the stored type.
        exceeding: positions where a difference is not allowed.
    """

    rows: int
    positions: int
    largest: float
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
    allowed_NK1 = np.full_like(difference_NK1, max(_NOISE_FACTOR * live, _LEAST_NOISE))
    allowed_NK1[:, :-1] += _rounding(cached_NK1[:, :-1], stored)
    worst, column = np.unravel_index(np.argmax(difference_NK1 - allowed_NK1), difference_NK1.shape)
    return TeacherComparison(
        rows=len(rows),
        positions=len(cached_NK1),
        largest=float(difference_NK1[worst, column]),
        row=int(rows_of_N[worst]),
        token_id=int(ids_NK[worst, column]) if column < top_k else None,
        cached=float(cached_NK1[worst, column]),
        now=float(singly[worst, column]),
        live=live,
        tolerance=float(allowed_NK1[worst, column]),
        exceeding=int((difference_NK1 > allowed_NK1).any(axis=1).sum()),
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


def _rounding(log_probs: np.ndarray, stored: np.dtype) -> np.ndarray:
    """Half the distance from these values to the next lower ones that the stored type has: what rounding can do."""
    held = np.maximum(log_probs, np.finfo(stored).min).astype(stored)
    return (held.astype(np.float64) - np.nextafter(held, stored.type(-np.inf))) / 2

"""What is in a teacher cache, for people: what it is made from, its size, its confidence, some of its rows.

Nothing here writes, and nothing judges: whether a cache is still true is `first_trl.cache.verification`.

Shapes: N supervised positions, K kept tokens. Units: nats, bytes.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ..constants import IGNORED
from .reader import TeacherCache

NUM_EXAMPLES = 10
_POSITIONS_SHOWN = 3
_TEXT_SHOWN = 160  # characters of a prompt: its end, which the answer follows
_BAR = 40  # characters


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
        "teacher": _named(teacher, "id", "revision", "commit", "base", "dtype", "quantization", "weights_sha256"),
        "rows from": _named(manifest["dataset"], "path", "name", "files", "split", "revision", "max_rows"),
        "task": ", ".join(f"{name} {value!r}" for name, value in task.items() if value is not None),
        "rows": f"{totals['rows']:,} in {len(manifest['shards'])} shards",
        "supervised positions": f"{totals['supervised_positions']:,}",
        "kept": f"{manifest['top_k']} tokens each ({kept}), log-probabilities in {manifest['dtype']}",
        "all other tokens": "what the kept ones leave of 1"
        if manifest.get("tail") == "from_top_k"
        else "their exact sum",
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


def _named(section: dict, *names: str) -> str:
    """Some entries of a section of the manifest, the first without its name; of a hash enough to tell two apart."""
    texts = {name: str(section[name]) for name in names if section.get(name)}
    texts |= {name: ", ".join(section[name]) for name in texts if isinstance(section[name], list)}
    texts |= {name: f"{text[:12]}..." for name, text in texts.items() if name.endswith("sha256")}
    return ", ".join(text if name == names[0] else f"{name} {text}" for name, text in texts.items())


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
        said = " ".join(map(str, ids)) if tokenizer is None else repr(tokenizer.decode(ids))
        return said if len(said) <= _TEXT_SHOWN else f"...{said[-_TEXT_SHOWN:]}"

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
    made = next((folder for folder in (run / "teacher/fold-0", run / "teacher") if folder.is_dir()), None)
    return given or (str(made) if made else None)

"""The rows of a split that are used, tokenised: what does not fit is refused, dropped or cut, and counted.

Training, caching and evaluation all take their rows from here, so that the number of a row means the same row
everywhere. How one row is encoded is `first_trl.data.encoding`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import templates
from ..constants import IGNORED
from ..errors import FirstTrlError
from ..files import file_digest
from ..settings import DatasetConfig, TaskConfig
from .choices import choices_of, has_answer, room_to_write, with_answer, with_stand_in
from .encoding import TooLongError, encode_example
from .loading import load_split

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LOST = 0.05  # of a split's rows, dropped, that need no warning


class UsableRows(NamedTuple):
    """The rows of a split that are used: as they were loaded, and their `input_ids` and `labels` (None for a stream).

    `lost` is plain data: {"rows": of the split, "dropped": {reason: rows}, "cut": {"prompt" or "completion": rows}}.
    """

    rows: "Dataset"
    tokenized: "Dataset | None"
    lost: dict[str, Any]


def load_rows(
    config: DatasetConfig, role: str, task: TaskConfig, tokenizer, *, place="", streaming=False, write=None
) -> UsableRows:
    """Load a split and keep the rows that can be used; with `datasets.*.bad_rows` and `task.too_long` as they say.

    Rows of `datasets.transfer` (a `place`) may have no answers; with `write`, the settings of `cache.write_answers`,
    they come back with stand-ins, and leave room for the answers that the teacher is about to write.

    Raises:
        FirstTrlError: as `load_split` and `usable_rows`; or rows of a stream are to be dropped.
    """
    place = place or f"datasets.{role}"
    policies = {f"{place}.bad_rows": config.bad_rows, "task.too_long": task.too_long}
    if streaming and (key := next((key for key, policy in policies.items() if policy == "drop"), None)):
        raise FirstTrlError(f"{key}: drop counts the rows before they are read; set cache.streaming: false, or refuse")
    rows = load_split(config, role, streaming=streaming)
    if write and place == "datasets.transfer":
        rows, task = with_stand_ins(rows, task), room_to_write(task, write)
    if streaming:
        return UsableRows(rows, None, {})
    labelled = place != "datasets.transfer"
    return usable_rows(rows, task, tokenizer, place=place, bad_rows=config.bad_rows, labelled=labelled)


def with_stand_ins(rows: "Dataset", task: TaskConfig) -> "Dataset":
    """Rows, perhaps a stream, with short answers in the place of those that the teacher is about to write."""
    import datasets

    named = {}
    if isinstance(rows, datasets.Dataset):  # `datasets` does not see when the code of a module has changed
        parts = [rows._fingerprint, dict(task), "stand-ins", _code_of_tokens()]
        named["new_fingerprint"] = datasets.fingerprint.Hasher.hash(parts)
    return rows.map(partial(with_stand_in, task=task), **named)


def usable_rows(
    dataset: "Dataset",
    task: TaskConfig,
    tokenizer,
    *,
    place: str = "",
    bad_rows: str = "refuse",
    labelled: bool = True,
) -> UsableRows:
    """Encode every row, in order, and drop those that the task and `bad_rows` let go.

    `place` says where the rows come from, for messages; unless `labelled`, a declared choice stands in for answers.

    Raises:
        FirstTrlError: rows that cannot be used, or none that can; the first is named with its problem.
    """
    encoded = encode_rows(dataset, task, tokenizer, place=place, labelled=labelled)
    refused, lost = lost_rows(encoded, task, bad_rows)
    if refused:
        others = f" (and {len(refused) - 1:,} more of {len(encoded):,} rows cannot be used)" * (len(refused) > 1)
        name = f"{place}{', ' if place else ''}row {refused[0]}"
        raise FirstTrlError(f"{name}: {encoded[refused[0]]['problem']}{others}")
    kept = [number for number, reason in enumerate(encoded.data.column("reason").to_pylist()) if not reason]
    if not kept:
        raise FirstTrlError(f"{place}: every row is dropped, the first because {encoded[0]['problem']}")
    used = UsableRows(dataset, encoded.select_columns(["input_ids", "labels"]), lost)
    return used if len(kept) == len(dataset) else _selected(used, kept, lost["dropped"])


def encode_rows(
    dataset: "Dataset", task: TaskConfig, tokenizer, *, place: str = "", labelled: bool = True
) -> "Dataset":
    """Encode every row, in order: `input_ids`, `labels` and `cut` as `Example`, or why a row cannot be used.

    Returns:
        A dataset with these columns (empty where a row cannot be used), `reason` (`too_long`, `bad` or empty) and
        `problem`, a sentence. It is kept by `datasets`, for the rows, the task and the tokenizer.
    """
    import datasets

    stand_in = None if labelled or has_answer(task, dataset[0]) else choices_of(task, place)[0]
    features = {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")}
    features |= {name: datasets.Value("string") for name in ("cut", "reason", "problem")}
    # Named here, because a tokenizer's own hash changes when it is used, and the cache would never be found again.
    parts = [dataset._fingerprint, dict(task), stand_in, tokenizer_state(tokenizer), _code_of_tokens()]
    return dataset.map(
        partial(_encode_batch, task=task, tokenizer=tokenizer, stand_in=stand_in),
        batched=True,
        remove_columns=dataset.column_names,
        features=datasets.Features(features),
        num_proc=min(os.cpu_count() or 1, 8) if len(dataset) >= 20_000 else None,
        new_fingerprint=datasets.fingerprint.Hasher.hash(parts),
        desc=f"Encoding {place}".strip(),
    )


def _encode_batch(batch: dict[str, list], task: TaskConfig, tokenizer, stand_in: str | None) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in ("input_ids", "labels", "cut", "reason", "problem")}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            answered = row if stand_in is None else with_answer(row, task, stand_in)
            example: dict = {**encode_example(task, tokenizer, answered)}
        except FirstTrlError as error:
            reason = "too_long" if isinstance(error, TooLongError) else "bad"
            example = {"input_ids": [], "labels": [], "reason": reason, "problem": str(error)}
        for name, column in found.items():
            column.append(example.get(name, ""))
    return found


def lost_rows(encoded: "Dataset", task: TaskConfig, bad_rows: str) -> tuple[list[int], dict[str, Any]]:
    """Of what `encode_rows` returned: (numbers of the rows to refuse, `lost` as in [`UsableRows`])."""
    reasons, cuts = (encoded.data.column(name).to_pylist() for name in ("reason", "cut"))
    dropped = {reason for reason, policy in (("too_long", task.too_long), ("bad", bad_rows)) if policy == "drop"}
    counts = {
        "dropped": Counter(reason for reason in reasons if reason in dropped),
        "cut": Counter(filter(None, cuts)),
    }
    lost = {"rows": len(reasons), **{name: dict(count) for name, count in counts.items()}}
    return [number for number, reason in enumerate(reasons) if reason and reason not in dropped], lost


def learned_tokens(encoded: "Dataset") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the M tokens that are learned, in order: the row (M,), the position in the row (M,), and the token (M,)."""
    table = encoded.with_format("arrow")[:]
    labels = table.column("labels").combine_chunks()
    flat, lengths_N = labels.flatten().to_numpy(), labels.value_lengths().to_numpy()
    row_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
    at_M = np.flatnonzero(flat != IGNORED)
    starts_N = np.cumsum(lengths_N) - lengths_N
    return row_T[at_M], at_M - starts_N[row_T[at_M]], flat[at_M]


def without_shared(used: UsableRows, shared: Collection[int]) -> UsableRows:
    """A test set without the rows of these numbers, which models were fitted on; they are counted."""
    kept = [number for number in range(len(used.rows)) if number not in shared]
    return _selected(used, kept, {**used.lost["dropped"], "overlap": len(used.rows) - len(kept)})


def _selected(used: UsableRows, kept: list[int], dropped: dict[str, int]) -> UsableRows:
    assert used.tokenized is not None
    return UsableRows(used.rows.select(kept), used.tokenized.select(kept), {**used.lost, "dropped": dropped})


def describe_lost(place: str, lost: Mapping[str, Any]) -> str | None:
    """One line on rows that were dropped or cut, None without any; a warning where more than `MOST_LOST` dropped."""
    words = {"too_long": "too long", "bad": "not usable", "overlap": "also in a split that models were fitted on"}
    dropped, cut = lost.get("dropped") or {}, lost.get("cut") or {}
    told = [f"{count:,} dropped ({words[reason]})" for reason, count in dropped.items()]
    told += [f"{count:,} with the end of the {part} cut" for part, count in cut.items()]
    if not told:
        return None
    warning = "warning: " * (sum(dropped.values()) > MOST_LOST * lost["rows"])
    return f"{warning}{place}: of {lost['rows']:,} rows {', '.join(told)}"


@lru_cache(maxsize=1)
def _code_of_tokens() -> list[str]:
    """Digests of the modules that decide a row's tokens, so that no upgrade reads what an older one tokenised."""
    return [file_digest(file) for file in [*sorted(Path(__file__).parent.glob("*.py")), Path(templates.__file__)]]


def tokenizer_state(tokenizer) -> list:
    """What decides the tokens of a text, without the padding and truncation that earlier calls left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        state = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    digest = hashlib.sha256(json.dumps(state).encode())
    return [digest.hexdigest(), tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]


@dataclass(frozen=True)
class Overlap:
    """Examples of `second` whose prompt is also in `first`: how many, and all as (row of first, row of second)."""

    first: str
    second: str
    count: int
    rows: list[tuple[int, int]]


def check_disjoint(splits: dict[str, "Dataset"]) -> list[Overlap]:
    """Prompts shared between tokenised splits, one `Overlap` per pair that shares any.

    `splits` is {"train": ..., "transfer": ..., "validation": ..., and any test sets}, those that there are, in this
    order; pairs of two test sets are not compared. What to do about an overlap is the caller's decision.
    """
    prompts = {name: _prompt_rows(dataset) for name, dataset in splits.items()}
    overlaps, names = [], list(splits)
    for first in (name for name in ("train", "transfer", "validation") if name in splits):
        for second in names[names.index(first) + 1 :]:
            shared = prompts[first].keys() & prompts[second].keys()
            rows = sorted((row, prompts[first][prompt][0]) for prompt in shared for row in prompts[second][prompt])
            if rows:
                overlaps.append(Overlap(first, second, len(rows), [(there, here) for here, there in rows]))
    return overlaps


def _prompt_rows(dataset: "Dataset") -> dict[bytes, list[int]]:
    """Digest of a prompt's tokens -> the rows that have it, in order."""
    ids = dataset.with_format("arrow")[:].column("input_ids").combine_chunks()
    flat, lengths_N = ids.flatten().to_numpy(), ids.value_lengths().to_numpy()
    start_N = np.cumsum(lengths_N) - lengths_N
    row_M, position_M, _ = learned_tokens(dataset)
    number_R, first_R = np.unique(row_M, return_index=True)
    rows: dict[bytes, list[int]] = {}
    for number, start, length in zip(number_R.tolist(), start_N[number_R], position_M[first_R], strict=True):
        prompt = flat[start : start + length]
        rows.setdefault(hashlib.blake2b(prompt.tobytes(), digest_size=16).digest(), []).append(number)
    return rows

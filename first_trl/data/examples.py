"""From rows of a dataset to tokens: loading a split, and the one road by which an example is encoded.

Training, caching and evaluation all encode here, so the prompt that a student is tested on is the prompt that it was
trained on. The tokens of a prompt are always exactly those that inference would see: they must be a prefix of the
tokens of prompt and completion together, and a template for which they are not is refused, never repaired. This is not
a collator (batches are made by `first_trl.trainer`) and not a store (`first_trl.cache.reader`).
"""

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..config import DatasetConfig, TaskConfig
from .encoding import chat_ids, check_prefix, clean_messages, eos_token_id, text_ids
from .load_errors import BUILDERS, explain_load_error
from .rendering import render_template, template_fields, text_around_field

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


class Example(TypedDict):
    """One encoded row: `labels[i] == input_ids[i]` in the completion, -100 in the prompt."""

    input_ids: list[int]
    labels: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Overlap:
    """Examples of `second` whose prompt is also in `first`: how many, and a few as (row of first, row of second)."""

    first: str
    second: str
    count: int
    rows: list[tuple[int, int]]


# Encoding


def encode_example(task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> Example:
    """Encode one row, prompt masked and completion supervised, cut at `task.max_length` from the end.

    A completion made by templates or by plain columns is ended by the end-of-sequence token if `task.append_eos`; a
    chat template ends its turns itself. Of `messages`, only the last one is supervised.

    Raises:
        ValueError: the row does not fit the templates or the choices, has no completion, or keeps no supervised token
            within `task.max_length`; or the prompt's tokens are not a prefix of the whole example's.
    """
    prompt_ids = encode_prompt(task, tokenizer, row, check_length=False)
    if is_conversational(task, row):
        messages, answer = split_messages(row)
        _check_answer(task, answer[-1]["content"], "the assistant's message")
        input_ids = chat_ids(tokenizer, messages + answer, task.chat_template_kwargs)
    else:
        prompt, completion = _render_pair(task, row)
        input_ids = text_ids(tokenizer, prompt + completion)
    check_prefix(tokenizer, prompt_ids, input_ids)
    if not is_conversational(task, row):
        input_ids = with_end(task, tokenizer, input_ids)
    # Nothing stands before the first token of all, so nothing can predict it.
    num_prompt_tokens = max(len(prompt_ids), 1)
    if num_prompt_tokens >= min(len(input_ids), task.max_length):
        raise ValueError(_too_long(task, len(prompt_ids), len(input_ids)))
    labels = [IGNORED] * num_prompt_tokens + input_ids[num_prompt_tokens:]
    return Example(
        input_ids=input_ids[: task.max_length], labels=labels[: task.max_length], num_prompt_tokens=len(prompt_ids)
    )


def with_end(task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", input_ids: list[int]) -> list[int]:
    """The tokens of a completion, ended by the end of sequence where the task asks for it and it is not there."""
    if task.append_eos and input_ids[-1] != eos_token_id(tokenizer):
        return [*input_ids, eos_token_id(tokenizer)]
    return input_ids


def encode_prompt(
    task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any], *, check_length: bool = True
) -> list[int]:
    """The tokens of the prompt alone, as `encode_example` begins; the row needs no answer.

    Raises:
        ValueError: as `encode_example`; the prompt leaves no room for an answer (unless `check_length` is False).
    """
    if is_conversational(task, row):
        prompt, _ = split_messages(row, labelled=False)
        ids = chat_ids(tokenizer, prompt, task.chat_template_kwargs, add_generation_prompt=True)
    else:
        ids = text_ids(tokenizer, render_template(templates_of(task, row)[0], row))
    if check_length and len(ids) >= task.max_length:
        raise ValueError(_too_long(task, len(ids), len(ids)))
    return ids


def is_conversational(task: TaskConfig, row: Mapping[str, Any]) -> bool:
    if task.prompt is not None or task.completion is not None:
        return False
    return "messages" in row or ("prompt" in row and isinstance(row["prompt"], list))


def templates_of(task: TaskConfig, row: Mapping[str, Any] | None) -> tuple[str, str]:
    if task.prompt is not None and task.completion is not None:
        return task.prompt, task.completion
    if row is not None and "prompt" not in row:
        raise ValueError(
            "task.prompt and task.completion are not set, and the dataset has neither `messages` nor `prompt`: its "
            f"columns are {', '.join(map(str, row.keys()))}. Write both templates, or map the columns with `columns`"
        )
    return "{prompt}", "{completion}"


def _render_pair(task: TaskConfig, row: Mapping[str, Any]) -> tuple[str, str]:
    prompt_template, completion_template = templates_of(task, row)
    prompt, completion = render_template(prompt_template, row), render_template(completion_template, row)
    if task.choices:
        before, after = text_around_field(completion_template)
        answer = completion[len(before) : len(completion) - len(after)]
        _check_answer(task, answer, f"the column {template_fields(completion_template)[0]!r}")
    if not completion.strip():
        raise ValueError(f"the completion {completion_template!r} is empty in this row; fill its answer or drop it")
    return prompt, completion


def _check_answer(task: TaskConfig, answer: str, place: str) -> None:
    if not task.choices or answer in task.choices:
        return
    hint = "remove the spaces around it" if answer.strip() in task.choices else "add it to the choices or drop the row"
    raise ValueError(f"{place} holds {answer!r}, which is not one of task.choices {task.choices}; {hint}")


def split_messages(row: Mapping[str, Any], labelled: bool = True) -> tuple[list[dict], list[dict]]:
    """(messages of the prompt, messages of the completion, empty if the row has no answer and needs none)."""
    if "messages" in row:
        messages = clean_messages(row["messages"], "messages")
        answered = messages[-1]["role"] == "assistant"
        prompt, completion = (messages[:-1], messages[-1:]) if answered else (messages, [])
    else:
        prompt = clean_messages(row["prompt"], "prompt")
        completion = clean_messages(row["completion"], "completion") if labelled or row.get("completion") else []
    if not prompt:
        raise ValueError("the conversation has nothing before the answer; put a user's message first")
    if labelled and (not completion or completion[-1]["role"] != "assistant"):
        raise ValueError("the last message is not the assistant's, so there is nothing to learn; add the answer")
    if labelled and not completion[-1]["content"].strip():
        raise ValueError("the assistant's last message is empty; drop the row or fill its answer")
    return prompt, completion


def _too_long(task: TaskConfig, num_prompt_tokens: int, num_tokens: int) -> str:
    return (
        f"the prompt is {num_prompt_tokens} tokens and the whole example {num_tokens}, so that task.max_length = "
        f"{task.max_length} leaves nothing to learn or to answer; raise task.max_length or shorten the prompt"
    )


# Datasets


def load_split(config: DatasetConfig, role: str, *, streaming: bool = False) -> "Dataset":
    """Load one split, with its columns renamed, shuffled if a seed is set, then cut to `max_rows`.

    Class labels become their names. `path` may be a json, csv, parquet or text file. Code that comes with a dataset is
    never run. `role` ("train", "validation" or "test") names the split when the recipe does not.

    Raises:
        ValueError: the source is missing, broken, empty, gated or unreachable, with the remedy.
    """
    import datasets

    path, data_files = _source(config, role)
    split = config.split or (role if data_files is None else "train")
    try:
        dataset = datasets.load_dataset(
            path, name=config.name, data_files=data_files, split=split, revision=config.revision, streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = explain_load_error(error, path, split, data_files)
        raise ValueError(f"datasets.{role}: {config.path!r} cannot be loaded: {reason}") from error
    dataset = _name_class_labels(_rename_columns(dataset, config, role))
    if config.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=config.shuffle_seed)
    if streaming:
        return dataset if config.max_rows is None else dataset.take(config.max_rows)
    if len(dataset) == 0:
        raise ValueError(f"datasets.{role}: {config.path!r}, split {split!r} has no rows; choose another one")
    return dataset if config.max_rows is None else dataset.select(range(min(config.max_rows, len(dataset))))


def _source(config: DatasetConfig, role: str) -> tuple[str, list[str] | None]:
    """(path, data_files) for `datasets.load_dataset`; a file as path becomes a builder and a data file."""
    data_files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
    builder = BUILDERS.get(Path(config.path).suffix)
    if data_files is None and builder is not None and not Path(config.path).is_dir():
        return builder, [config.path]
    if data_files is None and config.path in BUILDERS.values():
        raise ValueError(f"datasets.{role}: path {config.path!r} reads files, and none is named; set data_files")
    return config.path, data_files


def _rename_columns(dataset: "Dataset", config: DatasetConfig, role: str) -> "Dataset":
    renames = {column: name for name, column in (config.columns or {}).items()}
    present = dataset.column_names or []
    missing = [column for column in renames if column not in present]
    if missing:
        raise ValueError(
            f"datasets.{role}.columns: {config.path!r} has no column {missing[0]!r}; choose among {', '.join(present)}"
        )
    replaced = [name for name in renames.values() if name in present and name not in renames]
    return dataset.remove_columns(replaced).rename_columns(renames) if renames else dataset


def _name_class_labels(dataset: "Dataset") -> "Dataset":
    import datasets

    features = dataset.features or {}
    names = {column: kind.names for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    if not names:
        return dataset
    named = datasets.Features({**features, **{column: datasets.Value("string") for column in names}})
    return dataset.map(partial(_class_names, names=names), batched=True, features=named)


def _class_names(batch: dict[str, list], names: dict[str, list[str]]) -> dict[str, list]:
    # -1 is how datasets writes "no label"; it becomes a missing value, which a template refuses.
    return {
        column: [None if label is None or label < 0 else known[label] for label in batch[column]]
        for column, known in names.items()
    }


def tokenize_dataset(
    dataset: "Dataset",
    task: TaskConfig,
    tokenizer: "PreTrainedTokenizerBase",
    num_proc: int | None = None,
    place: str = "",
) -> "Dataset":
    """Encode every row, in order, into exactly `input_ids` and `labels` (lists of int32); no row is dropped.

    Args:
        place: where the rows come from, such as `datasets.train`, for the messages of errors.

    Raises:
        ValueError: as `encode_example`, beginning with the place and the number of the row.
    """
    import datasets

    lists = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")})
    # Named here, because a tokenizer's own hash changes when it is used, and the cache would never be found again.
    parts = [dataset._fingerprint, asdict(task), _tokenizer_state(tokenizer), Path(__file__).read_bytes()]
    return dataset.map(
        partial(encode_row, task=task, tokenizer=tokenizer, place=place),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=lists,
        num_proc=num_proc,
        new_fingerprint=datasets.fingerprint.Hasher.hash(parts),
        desc="Tokenizing",
    )


def encode_row(
    row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, place: str = ""
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of row `index` of a dataset, as `encode_example` makes them; errors name the row."""
    try:
        example = encode_example(task, tokenizer, row)
    except ValueError as error:
        raise ValueError(f"{place}{', ' if place else ''}row {index}: {error}") from error
    return {"input_ids": example["input_ids"], "labels": example["labels"]}


def _tokenizer_state(tokenizer) -> list:
    """What decides the tokens of a text, without the padding and truncation that earlier calls left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if backend is not None:
        state.update(padding=None, truncation=None)
    digest = hashlib.sha256(json.dumps(state).encode())
    return [digest.hexdigest(), tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]


def check_disjoint(splits: dict[str, "Dataset"]) -> list[Overlap]:
    """Prompts shared between tokenised splits, one `Overlap` per pair that shares any.

    `splits` is {"train": ..., "transfer": ..., "validation": ..., and any test sets}, those that there are, in this
    order; pairs of two test sets are not compared. What to do about an overlap is the caller's decision. Rows are
    those of the datasets that were tokenised.
    """
    prompts = {name: _prompt_rows(dataset) for name, dataset in splits.items()}
    overlaps, names = [], list(splits)
    for first in (name for name in ("train", "transfer", "validation") if name in splits):
        for second in names[names.index(first) + 1 :]:
            shared = prompts[first].keys() & prompts[second].keys()
            rows = sorted((row, prompts[first][prompt][0]) for prompt in shared for row in prompts[second][prompt])
            if rows:
                overlaps.append(Overlap(first, second, len(rows), [(there, here) for here, there in rows[:5]]))
    return overlaps


def _prompt_rows(dataset: "Dataset") -> dict[bytes, list[int]]:
    """Digest of a prompt's tokens -> the rows that have it, in order."""
    rows: dict[bytes, list[int]] = {}
    for index, example in enumerate(dataset.select_columns(["input_ids", "labels"])):
        length = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        digest = hashlib.sha256(array("q", example["input_ids"][:length])).digest()
        rows.setdefault(digest, []).append(index)
    return rows

"""How a row becomes the tokens that a model learns from: the single code path that encodes an example.

Training, caching and evaluation all encode here, so the prompt that a student is tested on is the prompt that it was
trained on. The tokens of a prompt are always exactly those that inference would see: they must be a prefix of the
tokens of prompt and completion together, and a template for which they are not is refused, never repaired. This is not
a collator (batches are made by `first_trl.trainer`) and not a store (`first_trl.cache.reader`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..constants import IGNORED
from ..errors import FirstTrlError
from ..settings import TaskConfig
from ..templates import render_template, template_fields, text_around_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Set by us on every call of the chat template, so a recipe cannot set them.
_RESERVED_CHAT_KWARGS = {
    "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


class Example(TypedDict):
    """One encoded row: `labels[i] == input_ids[i]` in the completion, -100 in the prompt."""

    input_ids: list[int]
    labels: list[int]
    num_prompt_tokens: int


def encode_example(task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> Example:
    """Encode one row, prompt masked and completion supervised, cut at `task.max_length` from the end.

    A completion made by templates or by plain columns is ended by the end-of-sequence token if `task.append_eos`; a
    chat template ends its turns itself. Of `messages`, only the last one is supervised.

    Raises:
        FirstTrlError: the row does not fit the templates or the choices, has no completion, or keeps no supervised
            token within `task.max_length`; or the prompt's tokens are not a prefix of the whole example's.
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
        raise FirstTrlError(_too_long(task, len(prompt_ids), len(input_ids)))
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
        FirstTrlError: as `encode_example`; the prompt leaves no room for an answer (unless `check_length` is False).
    """
    if is_conversational(task, row):
        prompt, _ = split_messages(row, labelled=False)
        ids = chat_ids(tokenizer, prompt, task.chat_template_kwargs, add_generation_prompt=True)
    else:
        ids = text_ids(tokenizer, render_template(templates_of(task, row)[0], row))
    if check_length and len(ids) >= task.max_length:
        raise FirstTrlError(_too_long(task, len(ids), len(ids)))
    return ids


def is_conversational(task: TaskConfig, row: Mapping[str, Any]) -> bool:
    if task.prompt is not None or task.completion is not None:
        return False
    return "messages" in row or ("prompt" in row and isinstance(row["prompt"], list))


def templates_of(task: TaskConfig, row: Mapping[str, Any] | None) -> tuple[str, str]:
    if task.prompt is not None and task.completion is not None:
        return task.prompt, task.completion
    if row is not None and "prompt" not in row:
        raise FirstTrlError(
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
        raise FirstTrlError(f"the completion {completion_template!r} is empty in this row; fill its answer or drop it")
    return prompt, completion


def _check_answer(task: TaskConfig, answer: str, place: str) -> None:
    if not task.choices or answer in task.choices:
        return
    hint = "remove the spaces around it" if answer.strip() in task.choices else "add it to the choices or drop the row"
    raise FirstTrlError(f"{place} holds {answer!r}, which is not one of task.choices {task.choices}; {hint}")


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
        raise FirstTrlError("the conversation has nothing before the answer; put a user's message first")
    if labelled and (not completion or completion[-1]["role"] != "assistant"):
        raise FirstTrlError("the last message is not the assistant's, so there is nothing to learn; add the answer")
    if labelled and not completion[-1]["content"].strip():
        raise FirstTrlError("the assistant's last message is empty; drop the row or fill its answer")
    return prompt, completion


def _too_long(task: TaskConfig, num_prompt_tokens: int, num_tokens: int) -> str:
    return (
        f"the prompt is {num_prompt_tokens} tokens and the whole example {num_tokens}, so that task.max_length = "
        f"{task.max_length} leaves nothing to learn or to answer; raise task.max_length or shorten the prompt"
    )


def encode_row(
    row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, place: str = ""
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of row `index` of a dataset, as `encode_example` makes them; errors name the row."""
    try:
        example = encode_example(task, tokenizer, row)
    except ValueError as error:
        raise FirstTrlError(f"{place}{', ' if place else ''}row {index}: {error}") from error
    return {"input_ids": example["input_ids"], "labels": example["labels"]}


# The steps


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens that generation would start from: what the tokenizer puts in front, once, and nothing behind."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while ids and added[-1] and not (len(ids) == 1 and ids[0] == tokenizer.bos_token_id):
        ids.pop(), added.pop()
    if len(ids) > 1 and added[0] and ids[0] == ids[1]:  # the text itself begins with the token
        del ids[0]
    return ids


def chat_ids(tokenizer, messages: list[dict], kwargs: dict | None, **how: bool) -> list[int]:
    """Tokens of a conversation through the tokenizer's chat template.

    `kwargs` are the recipe's (`enable_thinking`, ...), `how` ours (`add_generation_prompt`, `continue_final_message`).
    FirstTrlError: there is no chat template, it refuses these messages, or `kwargs` sets what is ours to set.
    """
    from jinja2.exceptions import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise FirstTrlError(
            f"the rows are conversations and the tokenizer {Path(tokenizer.name_or_path).name!r} has no chat "
            "template; start from the chat version of the model, or write task.prompt and task.completion over columns"
        )
    kwargs = kwargs or {}
    if reserved := sorted(_RESERVED_CHAT_KWARGS & kwargs.keys()):
        raise FirstTrlError(f"task.chat_template_kwargs: {', '.join(reserved)} cannot be set here; remove it")
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how, **kwargs))
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise FirstTrlError(
            f"the chat template refuses messages with the roles {roles}: {error}; change the rows or the template"
        ) from error


def clean_messages(messages: Any, column: str) -> list[dict]:
    """Messages without the empty keys that a table adds to rows of different shapes."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise FirstTrlError(f"the column {column!r} holds no messages; write a list of {{role, content}}")
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(cleaned):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise FirstTrlError(
                f"the column {column!r}, message {number}: role and content must be text, got {message}"
            )
    return cleaned


def check_prefix(tokenizer, prompt_ids: list[int], input_ids: list[int]) -> None:
    """ValueError, with the tokens at fault, unless `input_ids` begins with `prompt_ids`."""
    if input_ids[: len(prompt_ids)] == prompt_ids:
        return
    at = next(i for i, token in enumerate(prompt_ids) if input_ids[i : i + 1] != [token])
    alone = tokenizer.convert_ids_to_tokens(prompt_ids[at : at + 3])
    joint = tokenizer.convert_ids_to_tokens(input_ids[at : at + 3])
    raise FirstTrlError(
        f"the prompt ends in the tokens {alone}, which become {joint} once the completion follows, so that the model "
        "would be trained on tokens it never sees at inference; move the space from the end of the prompt to the "
        "start of the completion (with a chat template, set what it adds to prompts in task.chat_template_kwargs)"
    )


def eos_token_id(tokenizer) -> int:
    """The token that ends a completion; ValueError if there is none."""
    if tokenizer.eos_token_id is None:
        raise FirstTrlError(
            "task.append_eos is true and the tokenizer has no end-of-sequence token; set its eos_token, or "
            "task.append_eos: false"
        )
    return tokenizer.eos_token_id

"""Conversational rows: their shapes brought to one, the chat template asked, and which turns are learned.

The shapes are those of TRL's SFTTrainer: `messages`; `prompt` and `completion` as messages; ShareGPT `conversations`,
converted by TRL's own function; contents in parts of text; `tools` and tool calls. What the template writes is never
repaired: where training and inference would see different tokens, the row is refused.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FirstTrlError
from ..settings import TaskConfig

# Set by us on every call of the chat template, so a recipe cannot set them.
_RESERVED_CHAT_KWARGS = {
    "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "tools",
}  # fmt: skip
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as trl.chat_template_utils.has_generation_markers


def is_conversational(task: TaskConfig, row: Mapping[str, Any]) -> bool:
    if task.prompt is not None or task.completion is not None:
        return False
    return message_column(row) is not None or isinstance(row.get("prompt"), list)


def message_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds whole conversations; None where prompt and completion are two columns."""
    return next((name for name in ("messages", "conversations") if row.get(name) is not None), None)


def split_messages(row: Mapping[str, Any], labelled: bool = True) -> tuple[list[dict], list[dict]]:
    """(messages of the prompt, of the completion); without an answer, where none is needed, the latter is empty."""
    if (column := message_column(row)) is not None:
        messages = clean_messages(row[column], column)
        answers = messages[-1]["role"] == "assistant"
        prompt, completion = messages[: len(messages) - answers], messages[len(messages) - answers :]
    else:
        prompt = clean_messages(row["prompt"], "prompt")
        answered = labelled or row.get("completion")
        completion = clean_messages(row.get("completion"), "completion") if answered else []
    if not prompt:
        raise FirstTrlError("the conversation has nothing before the answer; put a user's message first")
    if labelled and (not completion or completion[-1]["role"] != "assistant"):
        raise FirstTrlError("the last message is not the assistant's, so there is nothing to learn; add the answer")
    if labelled and not completion[-1]["content"].strip() and "tool_calls" not in completion[-1]:
        raise FirstTrlError("the assistant's last message is empty; drop the row or fill its answer")
    return prompt, completion


def clean_messages(messages: Any, column: str) -> list[dict]:
    """New messages of `role` and text `content`, without the empty keys that a table adds; refuses what is no text."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise FirstTrlError(f"the column {column!r} holds no messages; write a list of {{role, content}}")
    cleaned = [_without_empty(message) for message in messages]
    if any("from" in message for message in cleaned):
        from trl import maybe_convert_to_chatml

        cleaned = maybe_convert_to_chatml({"messages": cleaned})["messages"]
        cleaned = [{**message, "role": _SHAREGPT_ROLES.get(message["role"], message["role"])} for message in cleaned]
    for number, message in enumerate(cleaned):
        parts = message.get("content")
        if isinstance(parts, list) and all(isinstance(part, dict) and type(part.get("text")) is str for part in parts):
            message["content"] = "".join(part["text"] for part in parts)  # templates for text skip lists in silence
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        elif "content" not in message:
            message["content"] = ""
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise FirstTrlError(
                f"the column {column!r}, message {number}: role and content must be text (parts of other types cannot "
                f"be learned), got {str(message)[:200]}; drop the row, or keep its text"
            )
    return cleaned


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def chat_arguments(task: TaskConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is given besides the messages: the recipe's arguments, the row's, and its tools."""
    arguments = {**(task.chat_template_kwargs or {}), **_without_empty(row.get("chat_template_kwargs") or {})}
    if reserved := sorted(_RESERVED_CHAT_KWARGS & arguments.keys()):
        raise FirstTrlError(f"task.chat_template_kwargs: {', '.join(reserved)} cannot be set here; remove it")
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise FirstTrlError(f"the column 'tools' is not valid JSON ({error}); write a list of functions") from error
    return {**arguments, "tools": _without_empty(tools)} if tools else arguments


def chat_ids(tokenizer, messages: list[dict], arguments: dict[str, Any], **how: bool) -> list[int]:
    """Tokens of a conversation through the tokenizer's chat template.

    Args:
        arguments: from `chat_arguments`.
        how: `add_generation_prompt` or `continue_final_message`.

    Raises:
        FirstTrlError: there is no chat template, it refuses these messages, or it prints today's date.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise FirstTrlError(
            f"the rows are conversations and the tokenizer {Path(tokenizer.name_or_path).name!r} has no chat "
            "template; start from the chat version of the model, or write task.prompt and task.completion over columns"
        )
    template = tokenizer.get_chat_template(None, arguments.get("tools"))
    if "strftime_now(" in template:  # another date makes other tokens: of a resumed cache, of a student that is tested
        days = (template.replace("strftime_now(", f'"{day}".join(') for day in "12")
        first, second = (
            _apply(tokenizer, messages, tokenize=False, chat_template=d, **arguments, **how) for d in days
        )
        if first != second:
            remedy = "save the tokenizer with a template that writes a fixed date in the place of strftime_now(...)"
            if "date_string" in template:
                remedy = 'set task.chat_template_kwargs: {date_string: "26 Jul 2024"}'
            raise FirstTrlError(f"the chat template writes today's date, so that tomorrow's tokens differ; {remedy}")
    return list(_apply(tokenizer, messages, tokenize=True, return_dict=False, **how, **arguments))


def has_generation_marks(tokenizer, arguments: Mapping[str, Any]) -> bool:
    """Whether the chat template marks what the assistant writes, as `assistant_only_loss` of TRL needs it."""
    return _GENERATION.search(tokenizer.get_chat_template(None, arguments.get("tools"))) is not None


def _apply(tokenizer, messages: list[dict], **how):
    from jinja2.exceptions import TemplateError

    if _reads_parts_alone(tokenizer, tokenizer.get_chat_template(None, how.get("tools"))):
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError, ValueError) as error:  # TypeError: a template adds a text to nothing
        roles = [message["role"] for message in messages]
        raise FirstTrlError(
            f"the chat template refuses messages with the roles {roles}: {error}; change the rows or the template"
        ) from error


@lru_cache(maxsize=16)
def _reads_parts_alone(tokenizer, template: str) -> bool:
    """Whether a template, of a model for pictures as a rule, reads contents in parts and no plain text."""
    shown = []
    for content in ("PROBE", [{"type": "text", "text": "PROBE"}]):
        try:
            messages = [{"role": "user", "content": content}]
            shown.append("PROBE" in tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template))
        except Exception:  # whatever a template raises: it does not read this
            shown.append(False)
    return shown == [False, True]


def assistant_mask(tokenizer, messages: list[dict], arguments: dict[str, Any], input_ids: list[int]) -> list[bool]:
    """Which tokens of a whole conversation the assistant wrote: every one of its turns, with what ends it.

    By the `{% generation %}` marks of the template, as `assistant_only_loss` of TRL, without them by the difference
    that each turn makes: it begins where inference would begin, and ends where the conversation up to it ends.

    Raises:
        FirstTrlError: the template writes an earlier turn otherwise than it would be written at inference.
    """
    if has_generation_marks(tokenizer, arguments):
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return [bool(mark) for mark in _apply(tokenizer, messages, **how, **arguments)["assistant_masks"]]
    mask = [False] * len(input_ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat_ids(tokenizer, messages[:number], arguments, add_generation_prompt=True) if number else []
        until = chat_ids(tokenizer, messages[: number + 1], arguments)
        if input_ids[: len(until)] != until or until[: len(before)] != before:
            raise FirstTrlError(
                f"task.supervise: all, and the chat template writes message {number} otherwise than when it was "
                "generated (reasoning templates drop the thoughts of earlier turns). Give the tokenizer a template "
                "with {% generation %} marks, as of trl.chat_template_utils.get_training_chat_template, or set "
                "task.supervise: last"
            )
        mask[len(before) : len(until)] = [True] * (len(until) - len(before))
    return mask

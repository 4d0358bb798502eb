"""How a text or a conversation becomes the tokens that inference would see.

The pure steps under `first_trl.data.examples`: what a tokenizer adds in front (once) and behind (never, a prompt goes
on), what a chat template is asked, and the one condition that makes training and inference agree: the tokens of a
prompt are a prefix of the tokens of prompt and completion together. Nothing here knows of recipes, columns or
datasets.
"""

from pathlib import Path
from typing import Any

# Set by us on every call of the chat template, so a recipe cannot set them.
_RESERVED_CHAT_KWARGS = {
    "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


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
    ValueError: there is no chat template, it refuses these messages, or `kwargs` sets what is ours to set.
    """
    from jinja2.exceptions import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the rows are conversations and the tokenizer {Path(tokenizer.name_or_path).name!r} has no chat "
            "template; start from the chat version of the model, or write task.prompt and task.completion over columns"
        )
    kwargs = kwargs or {}
    if reserved := sorted(_RESERVED_CHAT_KWARGS & kwargs.keys()):
        raise ValueError(f"task.chat_template_kwargs: {', '.join(reserved)} cannot be set here; remove it")
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how, **kwargs))
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template refuses messages with the roles {roles}: {error}; change the rows or the template"
        ) from error


def clean_messages(messages: Any, column: str) -> list[dict]:
    """Messages without the empty keys that a table adds to rows of different shapes."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"the column {column!r} holds no messages; write a list of {{role, content}}")
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(cleaned):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"the column {column!r}, message {number}: role and content must be text, got {message}")
    return cleaned


def check_prefix(tokenizer, prompt_ids: list[int], input_ids: list[int]) -> None:
    """ValueError, with the tokens at fault, unless `input_ids` begins with `prompt_ids`."""
    if input_ids[: len(prompt_ids)] == prompt_ids:
        return
    at = next(i for i, token in enumerate(prompt_ids) if input_ids[i : i + 1] != [token])
    alone = tokenizer.convert_ids_to_tokens(prompt_ids[at : at + 3])
    joint = tokenizer.convert_ids_to_tokens(input_ids[at : at + 3])
    raise ValueError(
        f"the prompt ends in the tokens {alone}, which become {joint} once the completion follows, so that the model "
        "would be trained on tokens it never sees at inference; move the space from the end of the prompt to the "
        "start of the completion (with a chat template, set what it adds to prompts in task.chat_template_kwargs)"
    )


def eos_token_id(tokenizer) -> int:
    """The token that ends a completion; ValueError if there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "task.append_eos is true and the tokenizer has no end-of-sequence token; set its eos_token, or "
            "task.append_eos: false"
        )
    return tokenizer.eos_token_id

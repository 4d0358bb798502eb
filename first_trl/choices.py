"""The declared choices of a closed-answer task as tokens: what each is after a prompt, and what rows may be cached so.

Everything here follows from `first_trl.data`, which encodes whole rows; probabilities are `first_trl.scoring`'s.
"""

from collections.abc import Mapping
from typing import Any

from .config import TaskConfig
from .data import IGNORED, encode_prompt, encode_row, is_conversational, split_messages, templates_of
from .encoding import chat_ids, check_prefix, text_ids
from .rendering import render_template, text_around_field


def choice_token_ids(task: TaskConfig, tokenizer, prompt_row: Mapping[str, Any] | None = None) -> list[list[int]]:
    """The tokens of each choice after the prompt of `prompt_row`, in the order of `task.choices`.

    Without a row, the context is the text that ends the prompt template. Every list has one token today: choices are
    told apart by the first token of the answer.

    Raises:
        ValueError: a choice is several tokens or unknown to the tokenizer, or two choices share their token.
    """
    if not task.choices:
        raise ValueError("task.choices is not set; list the closed answers, such as choices: [good, bad]")
    answers = [_answer_ids(task, tokenizer, prompt_row, choice) for choice in task.choices]
    for choice, ids in zip(task.choices, answers, strict=True):
        names = tokenizer.convert_ids_to_tokens(ids)
        if len(ids) != 1:
            raise ValueError(
                f"task.choices: {choice!r} is {len(ids)} tokens after the prompt ({names}); choose answers that are "
                "one token each, such as letters or short words, and keep any text before the answer in the prompt"
            )
        if ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"task.choices: the tokenizer has no token for {choice!r} (it reads {names[0]!r}); choose another word"
            )
    taken: dict[int, str] = {}
    for choice, (token,) in zip(task.choices, answers, strict=True):
        if token in taken:
            raise ValueError(
                f"task.choices: {taken[token]!r} and {choice!r} are the same token "
                f"{tokenizer.convert_ids_to_tokens(token)!r}; choose answers whose first tokens differ"
            )
        taken[token] = choice
    return answers


def _answer_ids(task: TaskConfig, tokenizer, row: Mapping[str, Any] | None, choice: str) -> list[int]:
    """The tokens of one choice between its prompt and whatever is written after it."""
    if row is not None and is_conversational(task, row):
        prompt_ids = encode_prompt(task, tokenizer, row, check_length=False)
        messages = split_messages(row, labelled=False)[0] + [{"role": "assistant", "content": choice}]
        answered = chat_ids(tokenizer, messages, task.chat_template_kwargs, continue_final_message=True)
        ended = chat_ids(tokenizer, messages, task.chat_template_kwargs)
    else:
        prompt_template, completion_template = templates_of(task, row)
        before, after = text_around_field(completion_template)
        prompt = text_around_field(prompt_template)[1] if row is None else render_template(prompt_template, row)
        prompt_ids = text_ids(tokenizer, prompt)
        answered = text_ids(tokenizer, prompt + before + choice)
        ended = text_ids(tokenizer, prompt + before + choice + after)
    check_prefix(tokenizer, prompt_ids, answered)
    if ended[: len(answered)] != answered:
        raise ValueError(
            f"task.choices: {choice!r} melts into the text after it ({tokenizer.convert_ids_to_tokens(ended[-3:])}); "
            "end the completion template with the answer"
        )
    return answered[len(prompt_ids) :]


def single_token_ids(task: TaskConfig, tokenizer, prompt_row: Mapping[str, Any]) -> list[int]:
    """The token of each choice; ValueError, with the remedy, where one has several."""
    return [token for (token,) in choice_token_ids(task, tokenizer, prompt_row)]


def encode_answer_row(
    row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, choice_ids: list[int], place: str = ""
) -> dict[str, list[int]]:
    """As `encode_row`, for a cache that keeps the tokens of the choices alone: the answer is all that is supervised.

    Raises:
        ValueError: as `encode_row`; or more than the answer is supervised, or it is none of `choice_ids`.
    """
    example = encode_row(row, index, task, tokenizer, place)
    row_name = f"{place}{', ' if place else ''}row {index}"
    supervised = [label for label in example["labels"] if label != IGNORED]
    if len(supervised) != 1:
        raise ValueError(
            f"{row_name}: {len(supervised)} tokens are supervised "
            f"({tokenizer.convert_ids_to_tokens(supervised[:4])}), and cache.support: choices keeps the choices' "
            "tokens, which only the answer can be. Set task.append_eos: false and end the completion template with "
            "the answer, or set cache.support: top_k"
        )
    if supervised[0] not in choice_ids:
        raise ValueError(
            f"{row_name}: its answer is the token {tokenizer.convert_ids_to_tokens(supervised)[0]!r}, and after the "
            f"first row's prompt the choices are {tokenizer.convert_ids_to_tokens(choice_ids)}. Let every prompt end "
            "in the same text, or set cache.support: top_k"
        )
    return example

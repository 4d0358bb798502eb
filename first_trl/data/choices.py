"""Answers as tokens: what each declared choice is after a prompt, which tokens every answer shares, answers put in.

Everything here follows from `first_trl.data.encoding`, which encodes whole rows; probabilities are those of
`first_trl.scoring`.
"""

from collections.abc import Mapping
from itertools import groupby, permutations, takewhile
from typing import Any

import numpy as np

from ..constants import IGNORED
from ..errors import FirstTrlError
from ..settings import TaskConfig, WriteAnswers
from ..templates import parse_template, render_template, template_fields, text_around_field
from .conversations import chat_arguments, chat_ids, is_conversational, message_column, split_messages
from .encoding import (
    TooLongError,
    check_prefix,
    encode_example,
    encode_row,
    eos_token_id,
    last_answer,
    prompt_ids,
    prompt_of,
    templates_of,
    text_ids,
)

# Answers that differ in every token, so that what their completions share is what the template writes
_ANSWERS = ("yes", "No", "good", "bad", "a", "B", "1", "2")


def choice_token_ids(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> list[list[int]]:
    """The tokens of each of `task.choices` after the prompt of a row, which needs no answer.

    Where every choice is one token, that token is the answer. Otherwise an answer is the whole completion, as training
    supervises it, with what the template writes after the choice and the end of sequence, so that none begins another.

    Raises:
        FirstTrlError: a choice is unknown to the tokenizer, or the tokens of one choice begin or are another's.
    """
    choices, tokens = choices_of(task), tokenizer.convert_ids_to_tokens
    alone = [_answer_alone(task, tokenizer, row, choice) for choice in choices]
    whole = [last_answer(task, tokenizer, with_answer(row, task, choice)) for choice in choices]
    for choice, ids, written in zip(choices, alone, whole, strict=True):
        if tokenizer.unk_token_id in ids:
            raise FirstTrlError(f"task.choices: the tokenizer has no token for {choice!r}; choose another word")
        if written[: len(ids)] != ids:
            raise FirstTrlError(
                f"task.choices: {choice!r} is tokenised with the text after it, as {tokens(written)}; end the "
                "completion template with the answer"
            )
    answers = alone if all(len(ids) == 1 for ids in alone) else whole
    # Probabilities of whole answers sum to at most 1 only where no answer is the beginning of another
    for (first, ids), (second, longer) in permutations(zip(choices, answers, strict=True), 2):
        if longer[: len(ids)] == ids:
            raise FirstTrlError(
                f"task.choices: the tokens of {first!r} {'are' if ids == longer else 'begin'} those of {second!r} "
                f"({tokens(ids)}), so that it would always be as likely; choose others, or end both with "
                "task.append_eos: true or a text after the answer"
            )
    return answers


def _answer_alone(task: TaskConfig, tokenizer, row: Mapping[str, Any], choice: str) -> list[int]:
    """The tokens of a choice after a row's prompt, without what is written after it."""
    prompt, before = prompt_of(task, row), prompt_ids(task, tokenizer, row)
    if is_conversational(task, row):
        messages = [*prompt, {"role": "assistant", "content": choice}]
        answered = chat_ids(tokenizer, messages, chat_arguments(task, row), continue_final_message=True)
    else:
        template = templates_of(task, row)[1]
        completion = render_template(template, with_answer(row, task, choice))
        answered = text_ids(tokenizer, prompt + completion.removesuffix(text_around_field(template)[1]))
    check_prefix(tokenizer, before, answered)
    return answered[len(before) :]


def choices_of(task: TaskConfig, place: str = "task") -> list[str]:
    """The declared answers; FirstTrlError where there are none, and rows without answers would be given one."""
    if not task.choices:
        raise FirstTrlError(
            f"{place}: the rows have no answer, and task.choices is not set, of which a teacher gives one; list them, "
            "let it write its own (cache.write_answers), or give the rows their answers"
        )
    return task.choices


def single_token_ids(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> list[int]:
    """The token of each choice, where a cache keeps the choices alone; FirstTrlError where one has several."""
    answers = choice_token_ids(task, tokenizer, row)
    for choice, ids in zip(choices_of(task), answers, strict=True):
        if len(ids) > 1:
            raise FirstTrlError(
                f"task.choices: {choice!r} is the tokens {tokenizer.convert_ids_to_tokens(ids)}, and cache.support: "
                "choices keeps one for each; choose answers of one, such as letters, or set cache.support: top_k"
            )
    return [ids[0] for ids in answers]


def encode_answer_row(
    row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, choice_ids: list[int], place: str = ""
) -> dict[str, list[int]]:
    """As `encode_row`, for a cache that keeps the tokens of the choices alone; refuses a row that learns others."""
    example = encode_row(row, index, task, tokenizer, place)
    supervised = [label for label in example["labels"] if label != IGNORED]
    if len(supervised) != 1 or supervised[0] not in choice_ids:
        written, kept = tokenizer.convert_ids_to_tokens(supervised[:4]), tokenizer.convert_ids_to_tokens(choice_ids)
        raise FirstTrlError(
            f"{place}{', ' if place else ''}row {index}: the tokens {written} are supervised, and cache.support: "
            f"choices keeps one of {kept}. End every prompt in the same text and the completion with the answer, with "
            "task.append_eos: false, or set cache.support: top_k"
        )
    return example


# What the template writes around every answer


def forced_tokens(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """What every answer to this row begins and ends with, of what is learned, as plain data for a manifest.

    `opening` and `closing` are token ids, common to the completions of all the choices, or without choices to those
    of unlike answers: a reasoning template opens with `<think>`, an end of turn closes. `answer` is the number of
    learned tokens before the one that says the answer: with choices the first in which they differ, without them 0.
    """
    known = [word for word in _ANSWERS if tokenizer.unk_token_id not in text_ids(tokenizer, word)]
    answers = []
    for word in task.choices or known:
        try:
            answers.append(last_answer(task, tokenizer, with_answer(row, task, word)))
        except FirstTrlError as error:  # a word that this tokenizer joins with the end of the prompt shows nothing
            if task.choices or isinstance(error, TooLongError):
                raise
    if len(answers) < 2:  # too few to show what the template writes
        return {"opening": [], "closing": [eos_token_id(tokenizer)] if task.append_eos else [], "answer": 0}
    opening = _common_prefix(answers)
    closing = _common_prefix([ids[len(opening) :][::-1] for ids in answers])[::-1]
    return {"opening": opening, "closing": closing, "answer": len(opening) if task.choices else 0}


def _common_prefix(lists: list[list[int]]) -> list[int]:
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*lists, strict=False))]


def forced_positions(labels: np.ndarray, starts: np.ndarray, forced: Mapping[str, Any]) -> np.ndarray:
    """Which learned tokens were forced: the opening of each answer, and its end of turn with what follows it.

    Args:
        labels (T,): labels of examples one after the other, -100 where nothing is learned.
        starts (E,): where each example begins.

    Returns:
        (T,) bool. Of an opening or a closing that an answer has in part (thoughts follow `<think>`, a cut ended the
        row) that part is forced.
    """
    learned = np.concatenate([[False], labels != IGNORED, [False]])
    edges = learned[1:] != learned[:-1]
    edges[starts] |= learned[1:][starts]  # a turn never runs on from one example into the next
    begins = np.flatnonzero(edges[:-1] & learned[1:-1])
    ends = np.flatnonzero(edges[1:] & learned[1:-1]) + 1
    opening, closing, tokens = forced["opening"], forced["closing"], labels.tolist()
    result = np.zeros(len(labels), dtype=bool)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        opened = len(_common_prefix([tokens[begin:end], opening]))
        lengths = range(min(len(closing), end - begin), 0, -1)
        closed = next((length for length in lengths if tokens[end - length : end] == closing[:length]), 0)
        result[begin : begin + opened] = result[end - closed : end] = True
    return result


def refuse_forced(task: TaskConfig, tokenizer, target_ids: np.ndarray) -> None:
    """Refuse to calibrate where one token is nearly always right: that measures a template, not a teacher.

    That is 99 % of the targets, or with declared choices, whose shares may be so, all of them.
    """
    ids, counts = np.unique(target_ids, return_counts=True)
    if len(target_ids) < 20 or counts.max() < (1 if task.choices else 0.99) * len(target_ids):
        return
    remedy = "set task.chat_template_kwargs: {enable_thinking: false} where the chat template thinks"
    remedy = "give datasets.validation rows with other answers" if task.choices else remedy
    raise FirstTrlError(
        f"calibrate.positions: answer measures nothing: {counts.max():,} of {len(target_ids):,} targets of validation "
        f"are {tokenizer.decode([int(ids[counts.argmax()])])!r}; {remedy}, or calibrate.positions: all"
    )


def marked_text(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> str:
    """The text of a row as a model sees it: ⟦learned⟧, and ⟪learned, never measured⟫ where no answer could differ."""
    example = encode_example(task, tokenizer, row)
    labels = np.array(example["labels"])
    forced = forced_positions(labels, np.array([0]), forced_tokens(task, tokenizer, row))
    marks = np.where(forced, "⟪⟫", np.where(labels != IGNORED, "⟦⟧", "")).tolist()
    runs = groupby(zip(marks, example["input_ids"], strict=True), lambda pair: pair[0])
    text = "".join(mark[:1] + tokenizer.decode([token for _, token in run]) + mark[1:] for mark, run in runs)
    cut = f"; the end of its {example['cut']} is cut at task.max_length = {task.max_length}" if example["cut"] else ""
    learned = f"{(labels != IGNORED).sum()} learned ⟦⟧, of which {forced.sum()} are forced ⟪⟫"
    return f"{len(labels)} tokens, {learned}{cut}\n\n{text}"


# Rows without an answer


def has_answer(task: TaskConfig, row: Mapping[str, Any]) -> bool:
    """Whether a row says what its answer is; what the answer is, and whether it is a choice, is not looked at."""
    if not is_conversational(task, row):
        return all(row.get(name) is not None for name in template_fields(templates_of(task, row)[1]))
    if message_column(row):
        return bool(split_messages(row, labelled=False)[1])
    return row.get("completion") is not None


def with_answer(row: Mapping[str, Any], task: TaskConfig, answer: str) -> dict[str, Any]:
    """The row with this answer in the place of its own: in its last message, or in each column of the completion."""
    if is_conversational(task, row):
        message, column = {"role": "assistant", "content": answer}, message_column(row)
        return {**row, column: [*prompt_of(task, row), message]} if column else {**row, "completion": [message]}
    answered = dict(row)
    for piece in parse_template(templates_of(task, row)[1]):
        if piece.column is not None:
            answered[piece.column] = _put(answered.get(piece.column), piece.indices, answer)
    return answered


def _put(value: Any, indices: tuple[str, ...], answer: str) -> Any:
    """A column's value with the answer at these indices, and all else in it as it is: the prompt may be there, too."""
    if not indices:
        return answer
    index, *rest = indices
    if not (isinstance(value, list) and index.isdecimal()):
        value = value if isinstance(value, dict) else {}
        return {**value, index: _put(value.get(index), tuple(rest), answer)}
    padded = [*value, *[None] * (int(index) + 1 - len(value))]
    padded[int(index)] = _put(padded[int(index)], tuple(rest), answer)
    return padded


def with_stand_in(row: Mapping[str, Any], task: TaskConfig) -> dict[str, Any]:
    """The row with a short answer in the place of the one that the teacher is about to write."""
    try:
        return with_answer(row, task, _ANSWERS[0])
    except FirstTrlError:  # no prompt: its encoding says why, and `bad_rows` what becomes of it
        return dict(row)


def room_to_write(task: TaskConfig, write: WriteAnswers) -> TaskConfig:
    """The task whose rows, a stand-in included, leave `write.max_new_tokens` of `task.max_length`."""
    return task.model_copy(update={"max_length": task.max_length - write.max_new_tokens})


def unlabelled_encoder(task: TaskConfig, tokenizer, first_row: Mapping[str, Any], place: str):
    """How rows without answers become examples, and the answers that a teacher may give them.

    Returns a function from a row and its number to an example that ends in the first choice, and the answers as a
    pair: the tokens by which the choices are compared, and their completions.
    """
    choices = choices_of(task, place)
    answers = choice_token_ids(task, tokenizer, first_row)
    completions = [last_answer(task, tokenizer, with_answer(first_row, task, choice)) for choice in choices]

    def encode(row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        example = encode_row(with_answer(row, task, choices[0]), index, task, tokenizer, place)
        written = [label for label in example["labels"] if label != IGNORED]
        room = len(example["labels"]) - len(written) + max(map(len, completions))
        if written != completions[0] or room > task.max_length:
            raise FirstTrlError(
                f"{place}, row {index}: after its prompt the choices are other tokens than after the first row's, or "
                "do not fit. Let every prompt end in the same text, and raise task.max_length if it is long"
            )
        return example

    return encode, (answers, completions)

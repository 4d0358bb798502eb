"""Answers as tokens: what each declared choice is after a prompt, which tokens no answer could differ in, stand-ins.

Everything here follows from `first_trl.data.encoding`, which encodes whole rows; probabilities are those of
`first_trl.scoring`.
"""

from collections.abc import Mapping
from functools import partial
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from ..constants import IGNORED
from ..errors import FirstTrlError
from ..settings import TaskConfig, WriteAnswers
from ..templates import parse_template, render_template, text_around_field
from .conversations import chat_arguments, chat_ids, is_conversational, message_column, split_messages
from .encoding import check_prefix, encode_example, encode_prompt, encode_row, templates_of, text_ids, with_end

if TYPE_CHECKING:
    from datasets import Dataset


def choice_token_ids(task: TaskConfig, tokenizer, prompt_row: Mapping[str, Any] | None = None) -> list[list[int]]:
    """The tokens of each choice after the prompt of `prompt_row`, in the order of `task.choices`.

    Without a row, the context is the text that ends the prompt template. Where every choice is one token, that token
    is the answer. Otherwise an answer is the whole completion, as training supervises it: what the template writes
    after the choice and the end of sequence too, so that no answer is the beginning of another.

    Raises:
        FirstTrlError: a choice is unknown to the tokenizer, or the tokens of one choice begin or are another's.
    """
    if not task.choices:
        raise FirstTrlError("task.choices is not set; list the closed answers, such as choices: [good, bad]")
    both = [_answer_ids(task, tokenizer, prompt_row, choice) for choice in task.choices]
    one_token_each = all(len(answer) == 1 for answer, _ in both)
    answers = [answer if one_token_each else whole for answer, whole in both]
    for choice, (answer, _) in zip(task.choices, both, strict=True):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in answer:
            raise FirstTrlError(
                f"task.choices: the tokenizer has no token for {choice!r} (it reads "
                f"{tokenizer.convert_ids_to_tokens(answer)}); choose another word"
            )
    _refuse_prefixes(task, tokenizer, answers)
    return answers


def _refuse_prefixes(task: TaskConfig, tokenizer, answers: list[list[int]]) -> None:
    """Probabilities of whole answers sum to at most 1 only where no answer is the beginning of another."""
    taken: dict[tuple[int, ...], str] = {}
    for choice, ids in sorted(zip(task.choices or (), answers, strict=True), key=lambda pair: len(pair[1])):
        for length in range(1, len(ids) + 1):
            if (earlier := taken.get(tuple(ids[:length]))) is None:
                continue
            names = tokenizer.convert_ids_to_tokens(ids[:length])
            if length == len(ids):
                raise FirstTrlError(
                    f"task.choices: {earlier!r} and {choice!r} are the same token{'s' * (length > 1)} "
                    f"{names[0] if length == 1 else names!r}; choose answers that differ for this tokenizer"
                )
            raise FirstTrlError(
                f"task.choices: {earlier!r} is the beginning of {choice!r} (tokens {names}), so that it would always "
                "be the likelier one; end both, with task.append_eos: true or a text after the answer"
            )
        taken[tuple(ids)] = choice


def _answer_ids(
    task: TaskConfig, tokenizer, row: Mapping[str, Any] | None, choice: str
) -> tuple[list[int], list[int]]:
    """The tokens of one choice after its prompt, alone and with all that is written after it."""
    if row is not None and is_conversational(task, row):
        prompt_ids = encode_prompt(task, tokenizer, row, check_length=False)
        messages = split_messages(row, labelled=False)[0] + [{"role": "assistant", "content": choice}]
        answered = chat_ids(tokenizer, messages, chat_arguments(task, row), continue_final_message=True)
        ended = chat_ids(tokenizer, messages, chat_arguments(task, row))
    else:
        prompt_template, completion_template = templates_of(task, row)
        before, after = text_around_field(completion_template)
        prompt = text_around_field(prompt_template)[1] if row is None else render_template(prompt_template, row)
        prompt_ids = text_ids(tokenizer, prompt)
        answered = text_ids(tokenizer, prompt + before + choice)
        ended = text_ids(tokenizer, prompt + before + choice + after)
    check_prefix(tokenizer, prompt_ids, answered)
    if ended[: len(answered)] != answered:
        raise FirstTrlError(
            f"task.choices: {choice!r} is tokenised with the text after it "
            f"({tokenizer.convert_ids_to_tokens(ended[-3:])}); "
            "end the completion template with the answer"
        )
    if not (row is not None and is_conversational(task, row)):
        ended = with_end(task, tokenizer, ended)
    return answered[len(prompt_ids) :], ended[len(prompt_ids) :]


# Answers that differ in every token, so that what their completions share is what the template writes
_ANSWERS = ("yes", "No", "good", "bad", "a", "B", "1", "2")


def forced_tokens(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """What every answer after this row's prompt begins and ends with, as plain data for a manifest.

    Returns:
        `opening` and `closing`, lists of token ids: common to the completions of all the choices, or without choices
        to those of unlike answers. A reasoning template opens with `<think>`; an end of turn closes. `answer` is the
        number of completion tokens before the one that says the answer: with choices the first in which they differ,
        without them 0.
    """
    words = task.choices or [word for word in _ANSWERS if _is_known(tokenizer, word)]
    completions = [_completion_ids(task, tokenizer, row, word) for word in words]
    if not completions:
        return {"opening": [], "closing": with_end(task, tokenizer, [-1])[1:], "answer": 0}
    opening = _common_prefix(completions)
    closing = _common_prefix([ids[len(opening) :][::-1] for ids in completions])[::-1]
    return {"opening": opening, "closing": closing, "answer": len(opening) if task.choices else 0}


def refuse_forced(task: TaskConfig, tokenizer, target_ids: np.ndarray) -> None:
    """Refuse to calibrate where one token is nearly always right: that measures a template, not a teacher.

    Raises:
        FirstTrlError: one token fills 99 % of the targets; with declared choices, whose shares may be so, all of them.
    """
    ids, counts = np.unique(target_ids, return_counts=True)
    if len(target_ids) < 20 or counts.max() < (1 if task.choices else 0.99) * len(target_ids):
        return
    remedy = "set task.chat_template_kwargs: {enable_thinking: false} where the chat template thinks"
    if task.choices:
        remedy = "give datasets.validation rows with other answers"
    raise FirstTrlError(
        f"calibrate.positions: answer measures nothing: {counts.max():,} of {len(target_ids):,} targets of validation "
        f"are {tokenizer.decode([int(ids[counts.argmax()])])!r}; {remedy}, or calibrate.positions: all"
    )


def _is_known(tokenizer, word: str) -> bool:
    return tokenizer.unk_token_id not in text_ids(tokenizer, word)


def _completion_ids(task: TaskConfig, tokenizer, row: Mapping[str, Any], answer: str) -> list[int]:
    prompt_ids = encode_prompt(task, tokenizer, row, check_length=False)
    if is_conversational(task, row):
        messages = split_messages(row, labelled=False)[0] + [{"role": "assistant", "content": answer}]
        return chat_ids(tokenizer, messages, chat_arguments(task, row))[len(prompt_ids) :]
    prompt_template, completion_template = templates_of(task, row)
    before, after = parse_template(completion_template)[0].literal, text_around_field(completion_template)[1]
    ids = text_ids(tokenizer, render_template(prompt_template, row) + before + answer + after)
    return with_end(task, tokenizer, ids)[len(prompt_ids) :]


def _common_prefix(lists: list[list[int]]) -> list[int]:
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*lists, strict=False))]


def forced_positions(labels: np.ndarray, starts: np.ndarray, forced: Mapping[str, Any]) -> np.ndarray:
    """Which supervised tokens were forced: the opening of each answer, and its end of turn with what follows it.

    Args:
        labels (T,): labels of examples one after the other, -100 where nothing is learned.
        starts (E,): where each example begins.
        forced: from `forced_tokens`.

    Returns:
        (T,) bool, False outside the supervised tokens. Of an opening or a closing that an answer has in part (thoughts
        follow `<think>`, a cut ended the row) that part is forced.
    """
    learned = np.concatenate([[False], labels != IGNORED, [False]])
    edges = learned[1:] != learned[:-1]
    edges[starts] |= learned[1:][starts]  # a turn never runs on from one example into the next
    begins = np.flatnonzero(edges[:-1] & learned[1:-1])
    ends = np.flatnonzero(edges[1:] & learned[1:-1]) + 1
    result = np.zeros(len(labels), dtype=bool)
    alive = np.ones(len(begins), dtype=bool)
    for offset, token in enumerate(forced["opening"]):
        position = np.minimum(begins + offset, len(labels) - 1)
        alive &= (begins + offset < ends) & (labels[position] == token)
        result[position[alive]] = True
    found = np.zeros(len(ends), dtype=bool)
    for length in range(len(forced["closing"]), 0, -1):
        first = ends - length
        inside = first >= begins
        for offset in range(length):
            inside &= labels[np.maximum(first, 0) + offset] == forced["closing"][offset]
        for offset in range(length):
            result[(first + offset)[inside & ~found]] = True
        found |= inside
    return result


def marked_text(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> str:
    """The text that a model sees of a row: ⟦learned⟧ and, where no answer could differ, ⟪learned but never measured⟫.

    Raises:
        FirstTrlError: as `encode_example`.
    """
    example = encode_example(task, tokenizer, row)
    labels = np.array(example["labels"])
    forced = forced_positions(labels, np.array([0]), forced_tokens(task, tokenizer, row))
    kinds = [("⟪⟫" if forced[i] else "⟦⟧") if label != IGNORED else "" for i, label in enumerate(labels)]
    runs = [
        (kind, [ids for _, ids in run])
        for kind, run in groupby(zip(kinds, example["input_ids"], strict=True), lambda pair: pair[0])
    ]
    text = "".join(kind[:1] + tokenizer.decode(ids) + kind[1:] for kind, ids in runs)
    learned, measured = (labels != IGNORED).sum(), (labels != IGNORED).sum() - forced.sum()
    cut = f"; the end of its {example['cut']} is cut at task.max_length = {task.max_length}" if example["cut"] else ""
    return f"{len(labels)} tokens, {learned} learned ⟦⟧, of which {learned - measured} are forced ⟪⟫{cut}\n\n{text}"


def single_token_ids(task: TaskConfig, tokenizer, prompt_row: Mapping[str, Any]) -> list[int]:
    """The token of each choice, where a cache keeps the choices alone; ValueError where one has several."""
    answers = choice_token_ids(task, tokenizer, prompt_row)
    longest = max(range(len(answers)), key=lambda i: len(answers[i]))
    if len(answers[longest]) > 1:
        assert task.choices is not None
        raise FirstTrlError(
            f"task.choices: {task.choices[longest]!r} is {len(answers[longest])} tokens after the prompt "
            f"({tokenizer.convert_ids_to_tokens(answers[longest])}), and cache.support: choices keeps one token for "
            "each. Choose answers of one token, such as letters, or set cache.support: top_k"
        )
    return [token for (token,) in answers]


def encode_answer_row(
    row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, choice_ids: list[int], place: str = ""
) -> dict[str, list[int]]:
    """As `encode_row`, for a cache that keeps the tokens of the choices alone: the answer is all that is supervised.

    Raises:
        FirstTrlError: as `encode_row`; or more than the answer is supervised, or it is none of `choice_ids`.
    """
    example = encode_row(row, index, task, tokenizer, place)
    row_name = f"{place}{', ' if place else ''}row {index}"
    supervised = [label for label in example["labels"] if label != IGNORED]
    if len(supervised) != 1:
        raise FirstTrlError(
            f"{row_name}: {len(supervised)} tokens are supervised "
            f"({tokenizer.convert_ids_to_tokens(supervised[:4])}), and cache.support: choices keeps the choices' "
            "tokens, which only the answer can be. Set task.append_eos: false and end the completion template with "
            "the answer, or set cache.support: top_k"
        )
    if supervised[0] not in choice_ids:
        raise FirstTrlError(
            f"{row_name}: its answer is the token {tokenizer.convert_ids_to_tokens(supervised)[0]!r}, and after the "
            f"first row's prompt the choices are {tokenizer.convert_ids_to_tokens(choice_ids)}. Let every prompt end "
            "in the same text, or set cache.support: top_k"
        )
    return example


# Rows without an answer


def has_answer(task: TaskConfig, row: Mapping[str, Any]) -> bool:
    """Whether a row says what its answer is; what the answer is, and whether it is a choice, is not looked at."""
    if is_conversational(task, row) and message_column(row):
        return bool(split_messages(row, labelled=False)[1])
    return all(row.get(name) is not None for name in _answer_columns(task, row))


def _answer_columns(task: TaskConfig, row: Mapping[str, Any]) -> list[str]:
    if is_conversational(task, row):
        return ["completion"]
    return [piece.column for piece in parse_template(templates_of(task, row)[1]) if piece.column is not None]


def with_answer(row: Mapping[str, Any], task: TaskConfig, choice: str) -> dict[str, Any]:
    """The row, answered with one of the choices, or any text.

    Raises:
        FirstTrlError: the completion looks into its column, which a choice alone cannot fill.
    """
    message = {"role": "assistant", "content": choice}
    if is_conversational(task, row) and (column := message_column(row)):
        return {**row, column: [*split_messages(row, labelled=False)[0], message]}
    if is_conversational(task, row):
        return {**row, "completion": [message]}
    template = templates_of(task, row)[1]
    fields = [piece for piece in parse_template(template) if piece.column is not None]
    if inside := [piece.column for piece in fields if piece.indices]:
        raise FirstTrlError(
            f"the rows have no {inside[0]!r}, and the completion {template!r} looks into it; write the answer as a "
            "column of its own, or label datasets.transfer"
        )
    return {**row, **{piece.column: choice for piece in fields if piece.column is not None}}


def with_stand_in(row: Mapping[str, Any], task: TaskConfig) -> dict[str, Any]:
    """The row with a short answer in the place of the one that the teacher is about to write."""
    return with_answer(row, task, _ANSWERS[0])


def room_to_write(task: TaskConfig, write: WriteAnswers) -> TaskConfig:
    """The task whose rows, a stand-in included, leave `write.max_new_tokens` of `task.max_length`."""
    return task.model_copy(update={"max_length": task.max_length - write.max_new_tokens})


def with_placeholder_answers(dataset: "Dataset", task: TaskConfig, place: str = "datasets.transfer") -> "Dataset":
    """Rows without answers, with the first choice as everyone's, for where prompts matter; others as they are.

    Raises:
        FirstTrlError: there are no choices; a teacher gives rows without labels nothing else at one position.
    """
    if has_answer(task, dataset[0]):
        return dataset
    return dataset.map(partial(with_answer, task=task, choice=_choices_of(task, place)[0]))


def _choices_of(task: TaskConfig, place: str) -> list[str]:
    if not task.choices:
        raise FirstTrlError(
            f"{place}: the rows have no answer, and task.choices is not set. A teacher gives rows without labels one "
            "of the declared answers; list them, let it write its own (cache.write_answers), or give the rows answers"
        )
    return task.choices


def unlabelled_encoder(task: TaskConfig, tokenizer, first_row: Mapping[str, Any], place: str):
    """How rows without answers become examples, and the answers that a teacher may give them.

    Returns:
        A function from a row and its number to an example that ends in the first choice, and the answers as a pair:
        the tokens by which the choices are compared, and their completions.
    Raises:
        FirstTrlError: there are no choices.
    """
    choices = _choices_of(task, place)

    def completion(row: Mapping[str, Any], choice: str) -> list[int]:
        example = encode_row(with_answer(row, task, choice), 0, task, tokenizer, place)
        return [label for label in example["labels"] if label != IGNORED]

    answers = choice_token_ids(task, tokenizer, first_row)
    completions = [completion(first_row, choice) for choice in choices]

    def encode(row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        example = encode_row(with_answer(row, task, choices[0]), index, task, tokenizer, place)
        written = [label for label in example["labels"] if label != IGNORED]
        room = len(example["labels"]) - len(written) + max(map(len, completions))
        if written != completions[0] or room > task.max_length:
            raise FirstTrlError(
                f"{place}, row {index}: after its prompt the choices are not the tokens that they are after the first "
                "row's, or do not fit. Let every prompt end in the same text, and raise task.max_length if it is long."
            )
        return example

    return encode, (answers, completions)

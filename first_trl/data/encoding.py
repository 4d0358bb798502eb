"""How a row becomes the tokens that a model learns from: the single code path that encodes an example.

Training, caching and evaluation all encode here, so the prompt that a student is tested on is the prompt that it was
trained on. The tokens of a prompt are always exactly those that inference would see: they must be a prefix of the
tokens of prompt and completion together, and a template for which they are not is refused, never repaired. Rows of
messages go through `first_trl.data.conversations`, others through `first_trl.templates`.
"""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, TypedDict

from ..constants import IGNORED
from ..errors import FirstTrlError
from ..settings import TaskConfig
from ..templates import parse_template, render_template, template_fields, text_around_field
from . import conversations

# No tokenizer in use writes more characters as one token; a longer text is refused before it is tokenised
CHARACTERS_PER_TOKEN = 512


class TooLongError(FirstTrlError):
    """A row that `task.max_length` leaves nothing of to learn or to answer."""


class Example(TypedDict):
    """One encoded row: `labels[i] == input_ids[i]` where the token is learned, -100 elsewhere.

    `cut` is what `task.max_length` took away: "prompt" (the end of its longest text), "completion" (its end) or "".
    """

    input_ids: list[int]
    labels: list[int]
    num_prompt_tokens: int
    cut: str


def encode_example(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> Example:
    """Encode one row, prompt masked and completion supervised, cut at `task.max_length` from the end.

    A completion made by templates or by plain columns is ended by the end-of-sequence token if `task.append_eos`; a
    chat template ends its turns itself. Of a conversation the last turn is supervised (of `prompt` and `completion`
    all of the completion), or with `task.supervise: all` the tokens that the assistant wrote.

    Raises:
        TooLongError: nothing that can be learned is left within `task.max_length`, or not all of a closed answer; with
            `task.too_long: cut` only where the prompt cannot be cut so far.
        FirstTrlError: the row does not fit the templates or the choices or has no completion, or the prompt's tokens
            are not a prefix of the whole example's.
    """
    limit, cut = task.max_length, ""
    try:
        input_ids, num_prompt_tokens, learned = _tokens(task, tokenizer, row)
        if task.too_long == "cut" and len(input_ids) > limit:
            raise TooLongError(_too_long(task, num_prompt_tokens, len(input_ids)))
    except TooLongError:
        if task.too_long != "cut":
            raise
        cut = "prompt"
        input_ids, num_prompt_tokens, learned = _tokens(task, tokenizer, _cut_row(task, tokenizer, row))
    whole = len(input_ids) <= limit
    if num_prompt_tokens >= limit or not any(learned[:limit]) or (not whole and (cut or task.choices)):
        raise TooLongError(_too_long(task, num_prompt_tokens, len(input_ids)))
    labels = [token if known else IGNORED for token, known in zip(input_ids, learned, strict=True)]
    return Example(
        input_ids=input_ids[:limit],
        labels=labels[:limit],
        num_prompt_tokens=num_prompt_tokens,
        cut=cut or ("" if whole else "completion"),
    )


def encode_prompt(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> list[int]:
    """The tokens of the prompt alone, as `encode_example` begins; the row needs no answer.

    Raises:
        FirstTrlError: as `encode_example`; the prompt is empty, or leaves no room for an answer.
    """
    ids = prompt_ids(task, tokenizer, row)
    if len(ids) >= task.max_length:
        raise TooLongError(_too_long(task, len(ids), len(ids)))
    return ids


def last_answer(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> list[int]:
    """The tokens of the last run of a row that is learned: its completion, or the assistant's last turn; never cut."""
    input_ids, _, learned = _tokens(task, tokenizer, row)
    end = len(learned) - learned[::-1].index(True)
    return input_ids[end - sum(takewhile(bool, reversed(learned[:end]))) : end]


def _tokens(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> tuple[list[int], int, list[bool]]:
    """(the tokens of the whole row, how many are the prompt's, which of them are learned)."""
    prompt, completion = _prompt_and_completion(task, row)
    input_ids, turns = _ids(task, tokenizer, row, prompt, completion), None
    if task.supervise == "all" and conversations.is_conversational(task, row):
        arguments = conversations.chat_arguments(task, row)
        turns = conversations.assistant_mask(tokenizer, prompt + completion, arguments, input_ids)
    if turns and conversations.message_column(row) and conversations.has_generation_marks(tokenizer, arguments):
        # The marks decide alone, as in TRL: some templates begin an answer otherwise when they are asked for one
        num_prompt_tokens, learned = [*turns, True].index(True), turns
    else:
        before = prompt_ids(task, tokenizer, row)
        check_prefix(tokenizer, before, input_ids)
        num_prompt_tokens = len(before)
        learned = [position >= num_prompt_tokens for position in range(len(input_ids))]
        if turns and conversations.message_column(row):
            learned = turns
        elif turns:  # a prompt in a column of its own is not learned, whoever wrote it
            learned = [turn and completed for turn, completed in zip(turns, learned, strict=True)]
    learned[0] = False  # nothing stands before the first token, so nothing predicts it
    if not any(learned):
        raise FirstTrlError("the completion adds no token to the prompt; fill the row's answer or drop it")
    return input_ids, num_prompt_tokens, learned


def _ids(task: TaskConfig, tokenizer, row: Mapping[str, Any], prompt: Any, completion: Any) -> list[int]:
    """The tokens of a prompt and its completion, two texts or two lists of messages; or of a prompt alone."""
    chat = isinstance(prompt, list)
    texts = [message["content"] for message in prompt + completion] if chat else [prompt, completion]
    if (count := sum(map(len, texts))) > CHARACTERS_PER_TOKEN * task.max_length:
        raise TooLongError(
            f"the text is {count:,} characters, too long for task.max_length = {task.max_length} tokens; raise it, "
            "shorten the text, or set task.too_long: drop or cut"
        )
    if chat:
        arguments = conversations.chat_arguments(task, row)
        return conversations.chat_ids(tokenizer, prompt + completion, arguments, add_generation_prompt=not completion)
    ids = text_ids(tokenizer, prompt + completion)
    if completion and task.append_eos and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(eos_token_id(tokenizer))
    return ids


def prompt_ids(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> list[int]:
    """As `encode_prompt`, of any length."""
    prompt = prompt_of(task, row)
    if ids := _ids(task, tokenizer, row, prompt, prompt[:0]):
        return ids
    raise FirstTrlError("the prompt is empty, so that nothing predicts the answer; fill the prompt or drop the row")


def prompt_of(task: TaskConfig, row: Mapping[str, Any]) -> Any:
    """The text of a row's prompt, or its messages."""
    if conversations.is_conversational(task, row):
        return conversations.split_messages(row, labelled=False)[0]
    return render_template(templates_of(task, row)[0], row)


def _prompt_and_completion(task: TaskConfig, row: Mapping[str, Any]) -> tuple[Any, Any]:
    prompt: Any
    completion: Any
    if conversations.is_conversational(task, row):
        prompt, completion = conversations.split_messages(row)
        answer, place = completion[-1]["content"], "the assistant's message"
    else:
        template = templates_of(task, row)[1]
        prompt, completion = prompt_of(task, row), render_template(template, row)
        if not completion.strip():
            raise FirstTrlError(f"the completion {template!r} is empty in this row; fill its answer or drop it")
        before, after = text_around_field(template)
        answer, place = completion[len(before) : len(completion) - len(after)], f"the completion {template!r}"
    if task.choices and answer not in task.choices:
        remedy = "add it to the choices or drop the row"
        remedy = "remove the spaces around it" if answer.strip() in task.choices else remedy
        raise FirstTrlError(f"{place} holds {answer!r}, which is not one of task.choices {task.choices}; {remedy}")
    return prompt, completion


def templates_of(task: TaskConfig, row: Mapping[str, Any]) -> tuple[str, str]:
    """(template of the prompt, of the completion): those of the task, or the columns of these names."""
    if task.prompt is not None and task.completion is not None:
        return task.prompt, task.completion
    if "prompt" not in row:
        raise FirstTrlError(
            "task.prompt and task.completion are not set, and there is no column `messages` or `prompt`: the columns "
            f"are {', '.join(map(str, row))}. Write both templates, or map the columns with `columns`"
        )
    return "{prompt}", "{completion}"


def _cut_row(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the longest text of its prompt shortened from its end until all the rest fits, if it can."""
    cut: dict[str, Any] = dict(row)
    if conversations.is_conversational(task, row):
        (prompt, completion), column = conversations.split_messages(row), conversations.message_column(row)
        cut[column or "prompt"] = prompt + completion if column else prompt
        holder, key = max(prompt, key=lambda message: len(message["content"])), "content"
    else:
        template, answer = templates_of(task, row)
        whole = (piece.column for piece in parse_template(template) if not piece.indices)
        columns = [column for column in dict.fromkeys(whole) if column and column not in template_fields(answer)]
        texts = [column for column in columns if isinstance(row.get(column), str)]
        if not texts:
            raise TooLongError("there is no column of text that can be cut; raise task.max_length, or too_long: drop")
        holder, key = cut, max(texts, key=lambda column: len(row[column]))
    text = holder[key]

    def is_too_long(kept: int) -> bool:
        holder[key] = text[:kept].rstrip()
        try:
            return len(_tokens(task, tokenizer, cut)[0]) > task.max_length
        except TooLongError:  # so many characters that they are not tokenised
            return True

    longest = min(len(text), CHARACTERS_PER_TOKEN * task.max_length)
    kept = bisect_left(range(longest + 1), True, key=is_too_long) - 1
    holder[key] = text[: max(kept, 0)].rstrip()
    return cut


def _too_long(task: TaskConfig, prompt: int, whole: int) -> str:
    return (
        f"the prompt is {prompt} tokens, the whole example {whole}, and there is room for {task.max_length} "
        "(task.max_length, less what cache.write_answers may add); raise task.max_length, shorten the prompt, or set "
        "task.too_long: drop or cut (which keeps template and answer)"
    )


def encode_row(row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, place="") -> dict[str, list[int]]:
    """`input_ids` and `labels` of row `index` of a dataset, as `encode_example` makes them; errors name the row."""
    try:
        example = encode_example(task, tokenizer, row)
    except FirstTrlError as error:
        raise FirstTrlError(f"{place}{', ' if place else ''}row {index}: {error}") from error
    return {"input_ids": example["input_ids"], "labels": example["labels"]}


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens that generation would start from: what the tokenizer puts in front, once, and nothing behind."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while ids and added[-1] and not (len(ids) == 1 and ids[0] == tokenizer.bos_token_id):
        ids.pop(), added.pop()
    if len(ids) > 1 and added[0] and ids[0] == ids[1]:  # the text itself begins with the token
        del ids[0]
    return ids


def check_prefix(tokenizer, prompt: list[int], input_ids: list[int]) -> None:
    """FirstTrlError, with the tokens at fault, unless `input_ids` begins with those of the prompt."""
    if input_ids[: len(prompt)] == prompt:
        return
    at = next(i for i, token in enumerate(prompt) if input_ids[i : i + 1] != [token])
    alone = tokenizer.convert_ids_to_tokens(prompt[at : at + 3])
    joint = tokenizer.convert_ids_to_tokens(input_ids[at : at + 3])
    raise FirstTrlError(
        f"the prompt ends in the tokens {alone}, which become {joint} once the completion follows, and never at "
        "inference; move the space from the end of the prompt to the start of the completion, or set what the chat "
        "template adds to prompts in task.chat_template_kwargs"
    )


def eos_token_id(tokenizer) -> int:
    """The token that ends a completion; FirstTrlError if there is none."""
    if tokenizer.eos_token_id is None:
        raise FirstTrlError("the tokenizer has no eos_token; set it, or task.append_eos: false")
    return tokenizer.eos_token_id


# The same prompts for teacher and student


def first_row(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """{"row", "input_ids"}: the columns that a row's tokens are made from, and these, for a cache's manifest."""
    names = {"messages", "conversations", "prompt", "completion", "tools", "chat_template_kwargs"}
    if not conversations.is_conversational(task, row):
        names = {name for template in templates_of(task, row) for name in template_fields(template)}
    columns = {name: value for name, value in row.items() if name in names}
    return {"row": columns, "input_ids": encode_example(task, tokenizer, row)["input_ids"]}


def check_first_row(cached: Mapping[str, Any] | None, task: TaskConfig, tokenizer) -> None:
    """Encode `first_row` of a cache's manifest again, for its task, with the student's tokenizer and chat template.

    A vocabulary can be equal while the chat template, the token in front or the normaliser differ; the student would
    then learn on other prompts than it is asked.

    Raises:
        FirstTrlError: the tokens differ (both texts are shown), or the cache does not say its first row.
    """
    if not cached:
        raise FirstTrlError("the cache is of an older version, without its first row; make it again: first-trl cache")
    ours, theirs = encode_example(task, tokenizer, cached["row"])["input_ids"], cached["input_ids"]
    if ours == theirs:
        return
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    shown = slice(max(at - 8, 0), at + 12)
    raise FirstTrlError(
        "the student's tokenizer or chat template makes another prompt than the teacher saw: the first row of the "
        f"cache has {tokenizer.decode(theirs[shown])!r}, the student's {tokenizer.decode(ours[shown])!r}. Give the "
        "student the teacher's chat template and special tokens, or the template's arguments in "
        "task.chat_template_kwargs"
    )

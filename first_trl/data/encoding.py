"""How a row becomes the tokens that a model learns from: the single code path that encodes an example.

Training, caching and evaluation all encode here, so the prompt that a student is tested on is the prompt that it was
trained on. The tokens of a prompt are always exactly those that inference would see: they must be a prefix of the
tokens of prompt and completion together, and a template for which they are not is refused, never repaired. This is not
a collator (batches are made by `first_trl.collator`) and not a store (`first_trl.cache.reader`).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from ..constants import IGNORED
from ..errors import FirstTrlError
from ..settings import TaskConfig
from ..templates import parse_template, render_template, template_fields, text_around_field
from .conversations import (
    assistant_mask,
    chat_arguments,
    chat_ids,
    has_generation_marks,
    is_conversational,
    message_column,
    split_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class _Tokens(NamedTuple):
    """A row before it is cut: the tokens of all of it, how many are the prompt's, and which are learned."""

    input_ids: list[int]
    num_prompt_tokens: int
    learned: list[bool]


def encode_example(task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> Example:
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
    cut, limit = "", task.max_length
    try:
        tokens = _tokens(task, tokenizer, row)
        if task.too_long == "cut" and len(tokens.input_ids) > limit:
            raise TooLongError(_too_long(task, tokens))
    except TooLongError:
        if task.too_long != "cut":
            raise
        tokens, cut = _tokens_of_cut_row(task, tokenizer, row), "prompt"
    labels = [token if learned else IGNORED for token, learned in zip(tokens.input_ids, tokens.learned, strict=True)]
    whole = len(tokens.input_ids) <= limit
    if tokens.num_prompt_tokens >= limit or not any(tokens.learned[:limit]) or (task.choices and not whole):
        raise TooLongError(_too_long(task, tokens))
    return Example(
        input_ids=tokens.input_ids[:limit],
        labels=labels[:limit],
        num_prompt_tokens=tokens.num_prompt_tokens,
        cut=cut or ("" if whole else "completion"),
    )


def _tokens(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> _Tokens:
    tokens = _conversation(task, tokenizer, row) if is_conversational(task, row) else _text(task, tokenizer, row)
    tokens.learned[0] = False  # nothing stands before the first token, so nothing predicts it
    if not any(tokens.learned):
        raise FirstTrlError("the completion adds no token to the prompt; fill the row's answer or drop it")
    return tokens


def _text(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> _Tokens:
    prompt_ids = encode_prompt(task, tokenizer, row, check_length=False)
    prompt, completion = _render_pair(task, row)
    _check_characters(task, len(prompt) + len(completion))
    input_ids = text_ids(tokenizer, prompt + completion)
    check_prefix(tokenizer, prompt_ids, input_ids)
    input_ids = with_end(task, tokenizer, input_ids)
    return _Tokens(input_ids, len(prompt_ids), [position >= len(prompt_ids) for position in range(len(input_ids))])


def _conversation(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> _Tokens:
    messages, answer = split_messages(row)
    _check_answer(task, answer[-1]["content"], "the assistant's message")
    _check_characters(task, sum(len(message["content"]) for message in messages + answer))
    arguments, whole = chat_arguments(task, row), message_column(row) is not None
    input_ids = chat_ids(tokenizer, messages + answer, arguments)
    all_turns = assistant_mask(tokenizer, messages + answer, arguments, input_ids) if task.supervise == "all" else []
    if all_turns and whole and has_generation_marks(tokenizer, arguments):
        # The marks decide alone, as in TRL: some templates begin an answer otherwise when they are asked for one
        return _Tokens(input_ids, (all_turns + [True]).index(True), all_turns)
    prompt_ids = encode_prompt(task, tokenizer, row, check_length=False)
    check_prefix(tokenizer, prompt_ids, input_ids)
    learned = [position >= len(prompt_ids) for position in range(len(input_ids))]
    if all_turns and whole:
        learned = all_turns
    elif all_turns:  # a prompt in a column of its own is not learned, whoever wrote it
        learned = [turn and completion for turn, completion in zip(all_turns, learned, strict=True)]
    return _Tokens(input_ids, len(prompt_ids), learned)


def _tokens_of_cut_row(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> _Tokens:
    """The tokens of a row whose longest text of the prompt is shortened from its end until all the rest fits."""
    text, with_text = _longest_text(task, row)
    best, low, high = None, 0, min(len(text), CHARACTERS_PER_TOKEN * task.max_length)
    while low <= high:
        kept = (low + high) // 2
        try:
            tokens = _tokens(task, tokenizer, with_text(text[:kept]))
            fits = len(tokens.input_ids) <= task.max_length
        except TooLongError:
            fits = False
        if fits:
            best, low = tokens, kept + 1
        else:
            high = kept - 1
    if best is None:
        tokens = _tokens(task, tokenizer, with_text(""))
        raise TooLongError(f"{_too_long(task, tokens)} (its longest text is cut already: template and answer stay)")
    return best


def _longest_text(task: TaskConfig, row: Mapping[str, Any]) -> tuple[str, Callable[[str], dict[str, Any]]]:
    """The longest text that a prompt is made of, and the row with another in its place."""
    if is_conversational(task, row):
        prompt, completion = split_messages(row)
        at = max(range(len(prompt)), key=lambda number: len(prompt[number]["content"]))

        def with_content(text: str) -> dict[str, Any]:
            messages = [*prompt[:at], {**prompt[at], "content": text}, *prompt[at + 1 :]]
            column = message_column(row)
            return {**row, column: messages + completion} if column else {**row, "prompt": messages}

        return prompt[at]["content"], with_content
    prompt_template, completion_template = templates_of(task, row)
    pieces = [piece for piece in parse_template(prompt_template) if piece.column is not None and not piece.indices]
    columns = {str(piece.column) for piece in pieces} - set(template_fields(completion_template))
    texts = {column: row[column] for column in columns if isinstance(row.get(column), str)}
    if not texts:
        raise TooLongError(
            "the row does not fit in task.max_length, and its prompt has no column of text that can be cut; raise "
            "task.max_length, or set task.too_long: drop"
        )
    longest = max(texts, key=lambda column: len(texts[column]))
    return texts[longest], lambda text: {**row, longest: text}


def encode_prompt(
    task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any], *, check_length: bool = True
) -> list[int]:
    """The tokens of the prompt alone, as `encode_example` begins; the row needs no answer.

    Raises:
        FirstTrlError: as `encode_example`; the prompt is empty, or leaves no room for an answer (unless `check_length`
            is False).
    """
    if is_conversational(task, row):
        prompt, _ = split_messages(row, labelled=False)
        _check_characters(task, sum(len(message["content"]) for message in prompt))
        ids = chat_ids(tokenizer, prompt, chat_arguments(task, row), add_generation_prompt=True)
    else:
        text = render_template(templates_of(task, row)[0], row)
        _check_characters(task, len(text))
        ids = text_ids(tokenizer, text)
    if not ids:
        raise FirstTrlError(
            "the prompt is empty and this tokenizer puts nothing in front of it, so that nothing predicts the answer; "
            "fill the prompt or drop the row"
        )
    if check_length and len(ids) >= task.max_length:
        raise TooLongError(_too_long(task, _Tokens(ids, len(ids), [])))
    return ids


def _check_characters(task: TaskConfig, count: int) -> None:
    if count > CHARACTERS_PER_TOKEN * task.max_length:
        raise TooLongError(
            f"the text is {count:,} characters, which task.max_length = {task.max_length} tokens cannot hold; raise "
            "task.max_length, shorten the text, or set task.too_long: drop or cut"
        )


def _too_long(task: TaskConfig, tokens: _Tokens) -> str:
    return (
        f"the prompt is {tokens.num_prompt_tokens} tokens and the whole example {len(tokens.input_ids)}, so that "
        f"{task.max_length} tokens (task.max_length, less what cache.write_answers may add) leave nothing to learn or "
        "to answer; raise task.max_length, shorten the prompt, or set task.too_long: drop or cut"
    )


def first_row(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """What `check_first_row` needs of the first row of a cache: the columns that its tokens are made from, and these.

    Returns:
        {"row": ..., "input_ids": ...}, plain data for a manifest.
    """
    if is_conversational(task, row):
        names = {"messages", "conversations", "prompt", "completion", "tools", "chat_template_kwargs"}
    else:
        names = {name for template in templates_of(task, row) for name in template_fields(template)}
    columns = {name: value for name, value in row.items() if name in names}
    return {"row": columns, "input_ids": encode_example(task, tokenizer, row)["input_ids"]}


def check_first_row(cached: Mapping[str, Any] | None, task: TaskConfig, tokenizer) -> None:
    """Encode the first row of a cache again, with the student's tokenizer and chat template.

    A vocabulary can be equal while the chat template, the token in front or the normaliser differ; the student would
    then learn on other prompts than it is asked.

    Args:
        cached: `first_row` of a manifest.
        task: of the same manifest.

    Raises:
        FirstTrlError: the tokens differ (both texts are shown), or the cache does not say its first row.
    """
    if not cached:
        raise FirstTrlError(
            "the cache does not hold its first row, by which a student's prompts are compared with the teacher's; it "
            "is from an older version: make it again with `first-trl cache`"
        )
    ours, theirs = encode_example(task, tokenizer, cached["row"])["input_ids"], cached["input_ids"]
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = max(at - 8, 0)
    raise FirstTrlError(
        "the student's tokenizer or chat template makes another prompt than the teacher saw. From token "
        f"{start} on, the first row of the cache is {tokenizer.decode(theirs[start : at + 12])!r}, and the student's "
        f"is {tokenizer.decode(ours[start : at + 12])!r}. Give the student the teacher's chat template and special "
        "tokens (tokenizer.json, tokenizer_config.json, chat_template.jinja), or the arguments of the template in "
        "task.chat_template_kwargs"
    )


def with_end(task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", input_ids: list[int]) -> list[int]:
    """The tokens of a completion, ended by the end of sequence where the task asks for it and it is not there."""
    if task.append_eos and input_ids[-1] != eos_token_id(tokenizer):
        return [*input_ids, eos_token_id(tokenizer)]
    return input_ids


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


def encode_row(
    row: Mapping[str, Any], index: int, task: TaskConfig, tokenizer, place: str = ""
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of row `index` of a dataset, as `encode_example` makes them; errors name the row."""
    try:
        example = encode_example(task, tokenizer, row)
    except ValueError as error:
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

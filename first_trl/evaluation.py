"""What each arm answers on each set, and what that makes once a recalibration is laid over it.

An arm's answers to a set are kept as a file, one line per example: the K most probable tokens with their
log-probabilities and the tail, which of them is the label, and the log-probabilities of the declared choices. Every
measurement is made from those files, so a report can be redrawn without a model.

Where a choice is several tokens, an answer is the whole completion, and its probability the product of its tokens'.
Then the C choices stand where the K tokens stand elsewhere, known by their numbers, and the tail is every other text:
the prediction is the most probable choice, its confidence the probability that the model writes exactly that, not
normalised over the choices. An undeclared answer is never predicted; its probability lowers the confidence.

Shapes: N examples, K kept tokens, C choices.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from .cache.format import TAIL_POWERS
from .calibration import recalibrate
from .config import TaskConfig
from .data.choices import choice_token_ids
from .data.encoding import encode_example
from .scoring import answer_scores, sequence_log_probs

SMALLEST_TAIL = 2.0**-24  # what float32 probabilities of the choices cannot tell from a sum of 1


def answer_set(
    model,
    dataset: Dataset,
    task: TaskConfig,
    tokenizer,
    *,
    top_k: int,
    tokens_per_batch: int,
    support: str = "top_k",
    tail_knots: bool = False,
    recalibrations: Collection[str] = (),
) -> Dataset:
    """A model's answers to a labelled set: one row per example, in order, with the columns named above.

    With `support` "choices" the K tokens are those of the choices, as in such a cache, and `tail_max_log_prob` is the
    likeliest token of the tail. With `tail_knots` also `tail_power_log_sums`, without which a
    `vocabulary_temperature` cannot be laid over them. Choices of several tokens have `answer_tokens` (N,), the length
    of the label, and no sums. `recalibrations` are the families that may be laid over the answers.

    Raises:
        ValueError: as `encode_example` and `choice_token_ids`; or a choice of several tokens stands against `support`,
            `recalibrations` or a row.
    """
    examples = [encode_example(task, tokenizer, row) for row in dataset]
    prompts = [example["input_ids"][: example["num_prompt_tokens"]] for example in examples]
    answers = choice_token_ids(task, tokenizer, dataset[0]) if task.choices else []
    if any(len(ids) > 1 for ids in answers):
        if support == "choices" or "vocabulary_temperature" in recalibrations:
            setting = "cache.support: choices" if support == "choices" else "vocabulary_temperature"
            remedy = "cache.support: top_k" if support == "choices" else "calibrate.method: temperature"
            raise ValueError(f"{setting} needs answers of one token, and task.choices has longer ones; set {remedy}.")
        return _whole_answers(model, examples, prompts, answers, tokens_per_batch)
    label_ids = [example["input_ids"][example["num_prompt_tokens"]] for example in examples]
    choices = [ids[0] for ids in answers] if task.choices else None
    scores = answer_scores(
        model,
        prompts,
        label_ids,
        choices,
        top_k=min(top_k, len(tokenizer) - 1),
        tokens_per_batch=tokens_per_batch,
        keep_choices=support == "choices",
        vocab_limit=len(tokenizer),
        tail_powers=TAIL_POWERS if tail_knots else (),
    )
    columns = {name: list(values) for name, values in scores.items()} | {"label_id": label_ids}
    if choices is not None:
        columns["choice_ids"] = [choices] * len(prompts)
    return Dataset.from_dict(columns)


def _whole_answers(model, examples, prompts, answers: list[list[int]], tokens_per_batch: int) -> Dataset:
    """The columns of `answer_set` where a choice is several tokens: ids are numbers of choices."""
    number = {tuple(ids): c for c, ids in enumerate(answers)}
    written = [tuple(example["input_ids"][example["num_prompt_tokens"] :]) for example in examples]
    strange = [i for i, ids in enumerate(written) if ids not in number]
    if strange:
        raise ValueError(
            f"row {strange[0]}: the tokens of its answer, {list(written[strange[0]])}, are those of no choice after "
            "the first row's prompt. Raise task.max_length if it was cut, or let every prompt end in the same text."
        )
    labels = np.array([number[ids] for ids in written])
    choice_log_probs = sequence_log_probs(model, prompts, answers, tokens_per_batch=tokens_per_batch)
    order = np.argsort(-choice_log_probs, axis=1, kind="stable")
    tail = np.log(np.maximum(1 - np.exp(choice_log_probs.astype(np.float64)).sum(axis=1), SMALLEST_TAIL))
    sorted_log_probs = np.take_along_axis(choice_log_probs, order, axis=1)
    columns = {
        "token_ids": order,
        "log_probs": np.column_stack([sorted_log_probs, tail]).astype(np.float32),
        "target": (order == labels[:, None]).argmax(axis=1),
        "label_id": labels,
        "label_log_prob": choice_log_probs[np.arange(len(labels)), labels],
        "choice_ids": np.tile(np.arange(len(answers)), (len(labels), 1)),
        "choice_log_probs": choice_log_probs,
        "answer_tokens": np.array([len(ids) for ids in written]),
    }
    return Dataset.from_dict({name: list(values) for name, values in columns.items()})


def read_answers(path: str | Path) -> dict[str, np.ndarray]:
    """An answers file as arrays: `log_probs` (N, K+1), `token_ids` (N, K), `target` (N,), and the others, (N, ...)."""
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def recalibrated_answers(answers: dict[str, np.ndarray], method: str, value: float | None) -> dict[str, np.ndarray]:
    """The same answers after a recalibration: tokens in the row take their new value, others move along."""
    rows = torch.from_numpy(answers["log_probs"].astype(np.float32))
    mended = recalibrate(rows, method, value, **tail_of(answers)).numpy()
    # Over the whole vocabulary a token moves as the first one does, else as the tail
    power, like = (1 / value, 0) if value is not None and method == "vocabulary_temperature" else (1.0, -1)

    def moved(ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        is_token = answers["token_ids"][:, None, :] == ids[:, :, None]  # (N, C, K)
        in_row = np.take_along_axis(mended[:, None, :-1].repeat(ids.shape[1], 1), is_token.argmax(-1)[..., None], -1)
        with np.errstate(invalid="ignore"):  # -inf - -inf where neither tail has any mass
            outside = power * log_probs + mended[:, [like]] - power * answers["log_probs"][:, [like]]
        return np.where(is_token.any(-1), in_row[..., 0], outside)

    result = answers | {"log_probs": mended}
    result["label_log_prob"] = moved(answers["label_id"][:, None], answers["label_log_prob"][:, None])[:, 0]
    if "choice_log_probs" in answers:
        result["choice_log_probs"] = moved(answers["choice_ids"], answers["choice_log_probs"])
    if "tail_max_log_prob" in answers:
        with np.errstate(invalid="ignore"):
            share = answers["tail_max_log_prob"] - answers["log_probs"][:, -1]
        result["tail_max_log_prob"] = mended[:, -1] + np.where(np.isnan(share), 0, share)
    return result


def tail_of(answers: dict[str, np.ndarray]) -> dict:
    """What `recalibrate` and `search` may need of the tail, where the answers have it."""
    sums = answers.get("tail_power_log_sums")
    return {"tail_power_knots": TAIL_POWERS, "tail_power_log_sums": sums} if sums is not None else {}


def predictions(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Confidence and correctness of each answer, under the whole vocabulary and restricted to the choices.

    Returns:
        `confidence`, `correct`, `label_log_prob` (N,) for the most probable token; with declared choices also
        `choice_confidence`, `choice_correct` (N,) for the most probable choice, normalised over the choices.
    """
    rows = answers["log_probs"][:, :-1]
    # Where the K tokens are the choices, another one may be likelier than all of them: an answer, and a wrong one
    other = answers.get("tail_max_log_prob", np.full(len(rows), -np.inf))
    result = {
        "confidence": np.exp(np.maximum(rows.max(axis=1), other)).clip(0, 1),
        "correct": (answers["target"] == rows.argmax(axis=1)) & (rows.max(axis=1) >= other),
        "label_log_prob": answers["label_log_prob"],
    }
    if "choice_log_probs" in answers:
        shares = choice_shares(answers["choice_log_probs"])
        chosen = shares.argmax(axis=1)
        result["choice_confidence"] = shares.max(axis=1)
        result["choice_correct"] = answers["choice_ids"][np.arange(len(chosen)), chosen] == answers["label_id"]
    return result


def choice_shares(log_probs_NC: np.ndarray) -> np.ndarray:
    """(N, C) probabilities of the choices, normalised over them."""
    shares_NC = np.exp(log_probs_NC - log_probs_NC.max(axis=1, keepdims=True))
    return shares_NC / shares_NC.sum(axis=1, keepdims=True)


def test_task(task: TaskConfig, overrides: dict | None) -> TaskConfig:
    """The task of a test set: the recipe's, with the set's own templates and choices where it has them."""
    return dataclasses.replace(task, **(overrides or {}))

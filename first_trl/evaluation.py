"""What each arm answers on each set, and the same answers after a recalibration.

An arm's answers to a set are a file, one line per example: the K most probable tokens with their log-probabilities and
the tail, which of them is the label, and the log-probabilities of the declared choices. Every measurement is made from
those files. Where a choice is several tokens, an answer is the whole completion: the C choices stand in the place of
the K tokens, known by their numbers, and the tail is every other text. Free text is measured by each learned token
that no template forces; a resample draws its answers as wholes.

Two recalibrations are applied to answers that were already given: `teacher_recalibrated` is the teacher under the
value in `calibration.json`, `<arm>_post_hoc` a student under its closing temperature, as `predict` states it.

Shapes: N examples, K kept tokens, C choices.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset

from .calibration import choose_family, error_curve, recalibrate, search
from .constants import IGNORED, POST_HOC
from .data.choices import choice_token_ids, forced_positions, forced_tokens
from .data.encoding import encode_example
from .errors import FirstTrlError
from .files import replace_atomically
from .modeling import innermost, language_model_head, load_model, load_tokenizer
from .recipe import arm_of
from .scoring import answer_scores, sequence_log_probs, token_log_probs
from .settings import TaskConfig
from .student import VOCABULARY_TEMPERATURES, choice_shares, closing_calibration, fitted_temperature
from .training import load_arguments

VALIDATION = "validation"


# Answers of a model


def answer_set(
    model,
    dataset: Dataset,
    task: TaskConfig,
    tokenizer,
    *,
    top_k: int,
    tokens_per_batch: int,
    support: str = "top_k",
    first_row: dict | None = None,
    start: int = 0,
) -> Dataset:
    """A model's answers to a labelled set: one row per example, in order, with the columns named above.

    With `support` "choices" the K tokens are those of the choices, as in such a cache, and `tail_max_log_prob` is the
    likeliest token of the tail. Choices of several tokens have `answer_tokens` (N,), the length of the label.
    Without choices there is one row per learned token that no template forces, and `example` (N,) numbers the answer
    that it is of, from `start`. `first_row` is that of the whole set, whose prompt the choices are tokenised after.

    Raises:
        ValueError: as `encode_example` and `choice_token_ids`; or a choice of several tokens stands against `support`
            or a row.
    """
    examples = [encode_example(task, tokenizer, row) for row in dataset]
    first_row = first_row or dataset[0]
    limits = {"tokens_per_batch": tokens_per_batch, "vocab_limit": len(tokenizer)}
    limits["top_k"] = min(top_k, len(tokenizer) - 1)
    if not task.choices:
        kept, rows, places = _learned_tokens(examples, forced_tokens(task, tokenizer, first_row))
        label_ids = [row[at + 1] for row, positions in zip(rows, places, strict=True) for at in positions]
        scores = answer_scores(model, rows, label_ids, [], places=places, **limits)
        del scores["choice_log_probs"]
        numbers = np.repeat([start + i for i in kept], [len(positions) for positions in places])
        return _as_rows(scores | {"label_id": label_ids, "example": numbers})
    answers = choice_token_ids(task, tokenizer, first_row)
    prompts = [example["input_ids"][: example["num_prompt_tokens"]] for example in examples]
    written = [example["input_ids"][example["num_prompt_tokens"] :] for example in examples]
    if any(len(ids) > 1 for ids in answers):
        if support == "choices":
            raise FirstTrlError(
                "cache.support: choices needs answers of one token, and task.choices has longer ones; set "
                "cache.support: top_k."
            )
        return _whole_answers(model, prompts, written, answers, tokens_per_batch)
    labels, choices = [ids[0] for ids in written], [ids[0] for ids in answers]
    scores = answer_scores(model, prompts, labels, choices, keep_choices=support == "choices", **limits)
    return _as_rows(scores | {"label_id": labels, "choice_ids": [choices] * len(prompts)})


def _as_rows(columns: dict) -> Dataset:
    return Dataset.from_dict({name: list(values) for name, values in columns.items()})


def _learned_tokens(examples, forced: dict) -> tuple[list[int], list, list]:
    """Examples with a learned token that no template forces: their numbers, tokens, and the positions before those."""
    positions = []
    for example in examples:
        labels = np.asarray(example["labels"])
        learned = (labels != IGNORED) & ~forced_positions(labels, np.zeros(1, dtype=np.int64), forced)
        positions.append(np.flatnonzero(learned[1:]))
    kept = [i for i, places in enumerate(positions) if len(places)]
    return kept, [examples[i]["input_ids"] for i in kept], [positions[i] for i in kept]


@torch.inference_mode()
def vocabulary_closing(path: str | Path, section: dict, dataset: Dataset, recipe) -> dict | None:
    """The one temperature of all logits that makes the labels of validation likeliest, every learned token counted.

    For readers of the softmax over the vocabulary: among the choices another temperature may be best. None where the
    head has a bias or caps its logits: then dividing what it reads does not divide them.
    """
    model, tokenizer = load_model(path, device=PartialState().device, **load_arguments(section)), load_tokenizer(path)
    head = language_model_head(innermost(model))
    if head.bias is not None or head.softcap is not None:
        return None
    examples = [encode_example(recipe.task, tokenizer, row) for row in dataset]
    _, rows, places = _learned_tokens(examples, forced_tokens(recipe.task, tokenizer, dataset[0]))
    log_probs = token_log_probs(model, rows, places, VOCABULARY_TEMPERATURES, recipe.evaluate.tokens_per_batch)
    nll_NG = -np.stack([log_probs_NG.sum(axis=0) for log_probs_NG in log_probs])
    return fitted_temperature(nll_NG, VOCABULARY_TEMPERATURES, seed=recipe.evaluate.seed)


def _whole_answers(model, prompts: list, written: list, answers: list[list[int]], tokens_per_batch: int) -> Dataset:
    """The columns of `answer_set` where a choice is several tokens: ids are numbers of choices."""
    for row, ids in enumerate(written):
        if ids not in answers:
            raise FirstTrlError(
                f"row {row}: the tokens of its answer, {ids}, are those of no choice after the first row's prompt. "
                "Raise task.max_length if it was cut, or let every prompt end in the same text."
            )
    labels = np.array([answers.index(ids) for ids in written])
    choice_log_probs = sequence_log_probs(model, prompts, answers, tokens_per_batch=tokens_per_batch)
    order = np.argsort(-choice_log_probs, axis=1, kind="stable")
    columns = {
        "token_ids": order,
        "log_probs": _with_tail(np.take_along_axis(choice_log_probs, order, axis=1)),
        "target": (order == labels[:, None]).argmax(axis=1),
        "label_id": labels,
        "label_log_prob": choice_log_probs[np.arange(len(labels)), labels],
        "choice_ids": np.tile(np.arange(len(answers)), (len(labels), 1)),
        "choice_log_probs": choice_log_probs,
        "answer_tokens": [len(ids) for ids in written],
    }
    return _as_rows(columns)


def _with_tail(log_probs_NK: np.ndarray) -> np.ndarray:
    """(N, K+1) float32, log(1 - sum) joined to the rows; `log1p(-sum)` tells 1e-30 from 0, 1 - sum cannot."""
    mass_N = np.exp(log_probs_NK.astype(np.float64)).sum(axis=1)
    tail_N = np.log1p(-np.minimum(mass_N, 1 - 2.0**-24)).clip(max=-1e-37)  # float32's ends: no -inf, no 0
    return np.column_stack([log_probs_NK, tail_N]).astype(np.float32)


def answer_sets(path: str | Path, section: dict, sets: dict[str, tuple], folder: Path, recipe) -> None:
    """A model's answers to several sets, as `<folder>/<set>.parquet`; each process answers its share of the rows.

    Args:
        path: the model's id or folder.
        section: the settings that it is loaded with.
        sets: {name: (its `UsableRows`, its task)}.
    """
    state = PartialState()
    model = load_model(path, device=state.device, **load_arguments(section))
    tokenizer = load_tokenizer(path, section.get("model_revision", "main"))
    settings: dict = {"top_k": recipe.cache.top_k, "support": recipe.cache.support}
    settings["tokens_per_batch"] = recipe.evaluate.tokens_per_batch
    folder.mkdir(parents=True, exist_ok=True)
    for name, ((dataset, *_), task) in sets.items():
        size, count = len(dataset), state.num_processes
        mine = range(size * state.process_index // count, size * (state.process_index + 1) // count)
        parts = [folder / f".{name}.{index}.parquet" for index in range(count)]
        if mine:
            settings |= {"first_row": dataset[0], "start": mine.start}
            answers = answer_set(model, dataset.select(mine), task, tokenizer, **settings)
            pq.write_table(answers.data.table, parts[state.process_index])
        state.wait_for_everyone()
        if state.is_main_process:
            with replace_atomically(folder / f"{name}.parquet") as whole:
                pq.write_table(pa.concat_tables([pq.read_table(part) for part in parts if part.is_file()]), whole)
            for part in parts:
                part.unlink(missing_ok=True)


def read_answers(path: str | Path) -> dict[str, np.ndarray]:
    """An answers file as arrays: `log_probs` (N, K+1), `token_ids` (N, K), `target` (N,), and the others, (N, ...)."""
    table, arrays = pq.read_table(path), {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        values = np.array((column.flatten() if is_list else column).to_numpy(zero_copy_only=False))  # ours to write to
        arrays[name] = values.reshape(table.num_rows, -1) if is_list else values
    return arrays


# What answers say


def predictions(answers: dict[str, np.ndarray], place: str = "these answers") -> dict[str, np.ndarray]:
    """Confidence and correctness of each answer, under the whole vocabulary and restricted to the choices.

    Args:
        place: whose answers they are and to which set, for the message.

    Returns:
        `confidence`, `correct`, `label_log_prob` (N,) for the most probable token; with declared choices also
        `choice_confidence`, `choice_correct`, `choice_label_log_prob` (N,) for the most probable choice, normalised
        over the choices; -inf where the label is none of them.

    Raises:
        FirstTrlError: a probability is not a number.
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
        chosen, is_label = shares.argmax(axis=1), answers["choice_ids"] == answers["label_id"][:, None]
        result["choice_confidence"] = shares.max(axis=1)
        result["choice_correct"] = is_label[np.arange(len(chosen)), chosen]
        with np.errstate(divide="ignore"):
            result["choice_label_log_prob"] = np.log((shares * is_label).sum(axis=1))
    if "example" in answers:
        result["example"] = answers["example"]
    for name, values in result.items():
        if np.isnan(values).any():
            raise FirstTrlError(
                f"{place}: the {name} of row {int(np.isnan(values).argmax())} is not a number. The model is damaged, "
                "or its training diverged; look at its log, and train it again."
            )
    return result


def closing_of(answers: dict[str, np.ndarray], place: str, seed: int = 0) -> dict:
    """`closing_calibration` of a student's answers to validation."""
    predictions(answers, place)  # refuses what is not a number
    is_label_NC = answers["choice_ids"] == answers["label_id"][:, None]
    ids = None if "answer_tokens" in answers else answers["choice_ids"][0].tolist()
    return closing_calibration(answers["choice_log_probs"], is_label_NC, seed=seed) | {"choice_token_ids": ids}


def task_of_set(task: TaskConfig, overrides: dict | None) -> TaskConfig:
    """The task of a test set: the recipe's, with the set's own templates and choices where it has them."""
    return TaskConfig(**dict(task) | (overrides or {}))


# The same answers after a recalibration


def recalibrated_answers(answers: dict[str, np.ndarray], method: str, value: float | None) -> dict[str, np.ndarray]:
    """The same answers after a recalibration: tokens in the row take their new value, others move along.

    A map that leaves no tail gives probability 0 to a choice outside the row. It is then applied to the choices
    themselves, which `choices_outside` (N,) marks.
    """
    recalibrated = recalibrate(torch.from_numpy(answers["log_probs"].astype(np.float32)), method, value).numpy()
    with np.errstate(invalid="ignore"):  # -inf - -inf where neither tail has any mass
        tail_moved = recalibrated[:, [-1]] - answers["log_probs"][:, [-1]]

    def moved(ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        is_token = answers["token_ids"][:, None, :] == ids[:, :, None]  # (N, C, K)
        in_row = np.take_along_axis(recalibrated[:, :-1], is_token.argmax(-1), axis=1)
        return np.where(is_token.any(-1), in_row, log_probs + tail_moved)

    result = answers | {"log_probs": recalibrated}
    result["label_log_prob"] = moved(answers["label_id"][:, None], answers["label_log_prob"][:, None])[:, 0]
    if "choice_log_probs" in answers:
        own = answers["choice_log_probs"]
        choices = moved(answers["choice_ids"], own)
        outside = np.isfinite(own).all(axis=1) & ~np.isfinite(choices).all(axis=1)
        if outside.any():
            choices[outside] = recalibrate(torch.from_numpy(_with_tail(own[outside])), method, value)[:, :-1].numpy()
        result |= {"choice_log_probs": choices, "choices_outside": outside}
    if "tail_max_log_prob" in answers:
        with np.errstate(invalid="ignore"):
            share = answers["tail_max_log_prob"] - answers["log_probs"][:, -1]
        result["tail_max_log_prob"] = recalibrated[:, -1] + np.where(np.isnan(share), 0, share)
    return result


def shipped_answers(answers: dict[str, np.ndarray], temperature: float) -> dict[str, np.ndarray]:
    """A student's answers under its closing temperature: p_c^(1/T) among the choices, whose sum stays what it was."""
    own_NC, is_label = answers["choice_log_probs"], answers["choice_ids"] == answers["label_id"][:, None]
    choices_NC = np.logaddexp.reduce(own_NC, axis=1, keepdims=True) + np.log(choice_shares(own_NC, temperature))
    is_choice = (answers["token_ids"][:, :, None] == answers["choice_ids"][:, None, :]).any(-1)
    others_NK = np.where(is_choice, -np.inf, answers["log_probs"][:, :-1])
    known = is_label.any(1)
    column = np.where(known, is_label.argmax(1), is_label.shape[1])
    label_log_prob = np.where(known, np.where(is_label, choices_NC, 0).sum(1), answers["label_log_prob"])
    return answers | {
        "token_ids": np.concatenate([answers["token_ids"], answers["choice_ids"]], axis=1),
        "log_probs": _with_tail(np.concatenate([others_NK, choices_NC], axis=1)),
        "target": others_NK.shape[1] + column,
        "label_log_prob": label_log_prob,
        "choice_log_probs": choices_NC,
    }


# Arms and controls


class Collected(NamedTuple):
    """What all arms predict.

    Args:
        predictions: {model or control: {set: predictions}}.
        fitted: {recalibrated control: (method, value)}.
        omitted: {control that cannot be measured: why}.
        outside: {control: {set: rows of which a choice is outside the kept tokens}}, see `recalibrated_answers`.
    """

    predictions: dict[str, dict]
    fitted: dict[str, tuple[str, float | None]]
    omitted: dict[str, str]
    outside: dict[str, dict[str, int]]


def collect(
    folder: Path, models: list[str], closing: dict[str, float], tests: list[str], calibration: dict
) -> Collected:
    """What every arm and every recalibrated control predicts.

    Args:
        folder: holds `<model>/<set>.parquet` for validation and every test set.
        models: those that answered.
        closing: the closing temperature of every student that has one; each gets a `<arm>_post_hoc`.
        calibration: the content of the teacher's `calibration.json`.
    """
    answers = {
        model: {name: read_answers(folder / model / f"{name}.parquet") for name in (VALIDATION, *tests)}
        for model in models
    }
    found = Collected({}, {}, {}, {})
    for model, sets in answers.items():
        found.predictions[model] = {name: predictions(rows, f"{model} on {name}") for name, rows in sets.items()}
    if calibration["method"] != "none" and "teacher" in answers:
        _add_recalibrated_teacher(found, answers["teacher"], calibration)
    for model, temperature in closing.items():
        arm, slash, seed = model.partition("/")
        name = f"{arm}{POST_HOC}{slash}{seed}"
        found.fitted[name] = "temperature", temperature
        found.predictions[name] = {  # a set without choices is answered as trained: the temperature is theirs
            test: predictions(shipped_answers(rows, temperature) if "choice_log_probs" in rows else rows, name)
            for test, rows in answers[model].items()
        }
    return found


def _add_recalibrated_teacher(found: Collected, sets: dict[str, dict], calibration: dict) -> None:
    """Add `teacher_recalibrated`, or why it cannot be measured: a smoothing can be more than a row has to give."""
    name, rows = "teacher_recalibrated", sets[VALIDATION]
    method, value = calibration["method"], calibration["value"]
    if "answer_tokens" in rows:  # the value in calibration.json is for single tokens
        settings: dict = {"criterion": calibration["criterion"], "num_bins": calibration["num_bins"]}
        given = rows["log_probs"], rows["target"]
        if "choice" in calibration:
            method = choose_family(*given, list(calibration["choice"]["scores"]), **settings).method
        value = search(*given, method=method, **settings).value
    if method == "label_smoothing" and value is not None:
        least = {test: np.exp(answers["log_probs"][:, 0].min()) for test, answers in sets.items()}
        short = [f"a row of {test} has {first:.3g} there" for test, first in least.items() if first < value]
        if short:
            taken = f"label smoothing takes {value:.3g} from the first token's probability"
            found.omitted[name] = f"{taken}, and {'; '.join(short)}"
            return
    found.fitted[name], found.predictions[name], outside = (method, value), {}, {}
    for test, answers in sets.items():
        recalibrated = recalibrated_answers(answers, method, value)
        found.predictions[name][test] = predictions(recalibrated, f"{name} on {test}")
        outside[test] = int(recalibrated.get("choices_outside", np.zeros(1)).sum())
    if any(outside.values()):
        found.outside[name] = {test: count for test, count in outside.items() if count}


def by_arm(collected: dict[str, dict]) -> dict[str, dict]:
    """{arm: {set: predictions}}, with a list of predictions, one per seed, where an arm has several students."""
    grouped: dict[str, dict[str, list]] = {}
    for model, sets in collected.items():
        for name, values in sets.items():
            grouped.setdefault(arm_of(model), {}).setdefault(name, []).append(values)
    return {
        arm: {name: values if len(values) > 1 else values[0] for name, values in sets.items()}
        for arm, sets in grouped.items()
    }


def teacher_curves(folder: Path, tests: list[str], calibration: dict) -> dict[str, dict[str, list[dict]]]:
    """{method: {set: curve}}: the teacher's error on the test sets at the values that the search tried on validation.

    For the eye alone: no value is ever chosen by it. None where answers have several tokens and the search had one.
    """
    answers = {name: read_answers(folder / "teacher" / f"{name}.parquet") for name in tests}
    answers = {name: rows for name, rows in answers.items() if "answer_tokens" not in rows}
    curves: dict[str, dict[str, list[dict]]] = {}
    for method, family in calibration["families"].items():
        for name, rows in answers.items() if family["value"] is not None else ():
            tried = [point["value"] for point in family["curve"]]
            curve = error_curve(rows["log_probs"], rows["target"], method, tried, calibration["num_bins"])
            curves.setdefault(method, {})[name] = curve
    return curves

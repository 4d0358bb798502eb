"""What each arm answers on each set, the same answers after a recalibration, and the confidence above which to answer.

An arm's answers to a set are kept as a file, one line per example: the K most probable tokens with their
log-probabilities and the tail, which of them is the label, and the log-probabilities of the declared choices. Every
measurement is made from those files, so a report can be redrawn without a model.

Where a choice is several tokens, an answer is the whole completion, and its probability the product of its tokens'.
Then the C choices stand where the K tokens stand elsewhere, known by their numbers, and the tail is every other text:
the prediction is the most probable choice, its confidence the probability that the model writes exactly that, not
normalised over the choices. An undeclared answer is never predicted; its probability lowers the confidence.

`teacher_recalibrated` and `<arm>_post_hoc` are answers that were already given, after a recalibration: the teacher's
is the one in `calibration.json`, the control's is searched on its own validation answers, by the same family and
criterion. So is the teacher's where answers have several tokens: the one in `calibration.json` is for single tokens.
A smoothing can be more than an unseen row has on its first token; that control is skipped and the reason reported.

`predict.json` lies beside a student's weights and makes the folder self-contained: the task (how a row becomes a
prompt, and the closed answers), how the base model is loaded, and for each target accuracy the lowest confidence that
reached it on validation. `first_trl.prediction` reads it.

Shapes: N examples, K kept tokens, C choices.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from .calibration import choose_family, error_curve, largest_smoothing, recalibrate, search
from .constants import PREDICT_FILE
from .data.choices import choice_token_ids
from .data.encoding import encode_example
from .metrics import threshold_for_accuracy
from .recipe import arm_of
from .scoring import answer_scores, sequence_log_probs
from .settings import TaskConfig

SMALLEST_TAIL = 2.0**-24  # what float32 probabilities of the choices cannot tell from a sum of 1
VALIDATION = "validation"
SCHEMA_VERSION = 1
TARGETS = (0.8, 0.9, 0.95)
DEFAULT_TARGET = 0.9
# How far below its target a threshold may lie, with 90 % certainty, on rows like those that it was fitted on.
SLACK = 0.02
# How the base model was held in memory when the thresholds were fitted; another way moves the probabilities.
_LOADING = ("dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")


def answer_set(
    model,
    dataset: Dataset,
    task: TaskConfig,
    tokenizer,
    *,
    top_k: int,
    tokens_per_batch: int,
    support: str = "top_k",
) -> Dataset:
    """A model's answers to a labelled set: one row per example, in order, with the columns named above.

    With `support` "choices" the K tokens are those of the choices, as in such a cache, and `tail_max_log_prob` is the
    likeliest token of the tail. Choices of several tokens have `answer_tokens` (N,), the length of the label.

    Raises:
        ValueError: as `encode_example` and `choice_token_ids`; or a choice of several tokens stands against `support`
            or a row.
    """
    examples = [encode_example(task, tokenizer, row) for row in dataset]
    prompts = [example["input_ids"][: example["num_prompt_tokens"]] for example in examples]
    answers = choice_token_ids(task, tokenizer, dataset[0]) if task.choices else []
    if any(len(ids) > 1 for ids in answers):
        if support == "choices":
            raise ValueError(
                "cache.support: choices needs answers of one token, and task.choices has longer ones; set "
                "cache.support: top_k."
            )
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
    mended = recalibrate(rows, method, value).numpy()

    def moved(ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        is_token = answers["token_ids"][:, None, :] == ids[:, :, None]  # (N, C, K)
        in_row = np.take_along_axis(mended[:, None, :-1].repeat(ids.shape[1], 1), is_token.argmax(-1)[..., None], -1)
        with np.errstate(invalid="ignore"):  # -inf - -inf where neither tail has any mass
            outside = log_probs + mended[:, [-1]] - answers["log_probs"][:, [-1]]
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
    return TaskConfig(**dict(task) | (overrides or {}))


def collect(
    folder: Path, models: list[str], uncalibrated: list[str], tests: list[str], calibration: dict
) -> tuple[dict[str, dict], dict[str, tuple[str, float | None]], dict[str, str]]:
    """What every arm and every recalibrated control predicts.

    Args:
        folder: holds `<model>/<set>.parquet` for validation and every test set.
        models: those that answered.
        uncalibrated: students that learned from nothing recalibrated, each of which gets a `<arm>_post_hoc`.
        calibration: the content of `calibration.json`.

    Returns:
        {arm: {set: predictions}}, validation among the sets; {recalibrated arm: (method, value)}; and, for arms of
        the report that are in neither, {arm: why it cannot be measured}.
    """
    answers = {
        model: {name: read_answers(folder / model / f"{name}.parquet") for name in (VALIDATION, *tests)}
        for model in models
    }
    collected = {model: {name: predictions(rows) for name, rows in sets.items()} for model, sets in answers.items()}
    if calibration["method"] == "none":
        return collected, {}, {}
    own = answers["teacher"]
    recalibration = calibration["method"], calibration["value"]
    if _are_whole(own[VALIDATION]):
        recalibration = _fit(own[VALIDATION], calibration)
    controls = {"teacher_recalibrated": (own, recalibration)}
    for model in uncalibrated:
        arm, slash, seed = model.partition("/")
        recalibration = _fit(answers[model][VALIDATION], calibration)
        controls[f"{arm}_post_hoc{slash}{seed}"] = answers[model], recalibration
    fitted, omitted = {}, {}
    for name, (sets, (method, value)) in controls.items():
        if reason := _not_allowed(sets, method, value):
            omitted[arm_of(name)] = reason
    for name, (sets, (method, value)) in controls.items():
        if arm_of(name) not in omitted:  # all of its seeds, or none
            fitted[name] = method, value
            collected[name] = _recalibrated(sets, method, value)
    return collected, fitted, omitted


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


def _are_whole(rows: dict) -> bool:
    """Whether these answers are whole texts of several tokens, and not single tokens."""
    return "answer_tokens" in rows


def _fit(rows: dict, calibration: dict) -> tuple[str, float | None]:
    """(method, value) for a model's own answers: by the teacher's family, or, where that was chosen, a new choice."""
    settings: dict = {"criterion": calibration["criterion"], "num_bins": calibration["num_bins"]}
    log_probs, target = rows["log_probs"], rows["target"]
    method = calibration["method"]
    if "choice" in calibration:
        method = choose_family(log_probs, target, list(calibration["choice"]["scores"]), **settings).method
    return method, search(log_probs, target, method=method, **settings).value


def _not_allowed(sets: dict[str, dict], method: str, value: float | None) -> str | None:
    """Why a recalibration cannot be laid over some of these answers; None where it can be laid over all.

    Only label smoothing can be too much. A row that gave less than the others would be another recalibration.
    """
    if method != "label_smoothing" or value is None:
        return None
    rows = {name: torch.from_numpy(answers["log_probs"].astype(np.float32)) for name, answers in sets.items()}
    least = {name: largest_smoothing(log_probs[:, :-1]) for name, log_probs in rows.items()}
    short = [f"of the rows of {name}, one has {first:.3g} there" for name, first in least.items() if first < value]
    if not short:
        return None
    return f"label smoothing takes {value:.3g} from the first token's probability, and {'; '.join(short)}"


def _recalibrated(sets: dict[str, dict], method: str, value: float | None) -> dict[str, dict]:
    return {name: predictions(recalibrated_answers(rows, method, value)) for name, rows in sets.items()}


def teacher_curves(folder: Path, tests: list[str], calibration: dict) -> dict[str, dict[str, list[dict]]]:
    """{method: {set: curve}}: the teacher's error on the test sets at the values that the search tried on validation.

    For the eye alone: no value is ever chosen by it. None where answers have several tokens and the search had one.
    """
    answers = {name: read_answers(folder / "teacher" / f"{name}.parquet") for name in tests}
    return {
        method: {
            name: error_curve(
                rows["log_probs"],
                rows["target"],
                method,
                [point["value"] for point in family["curve"]],
                calibration["num_bins"],
            )
            for name, rows in answers.items()
            if not _are_whole(rows)
        }
        for method, family in calibration["families"].items()
        if family["value"] is not None
    }


def best_view(predictions: dict) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, correct) as `predict` states them: among the choices where a task lists them."""
    view = "choice_" if "choice_confidence" in predictions else ""
    return np.asarray(predictions[f"{view}confidence"]), np.asarray(predictions[f"{view}correct"])


def selective(confidence, correct, threshold: float | None) -> dict:
    """What answering at or above a threshold does: "coverage", the share answered, and "accuracy" of it (or None)."""
    answered = np.asarray(confidence) >= (np.inf if threshold is None else threshold)
    return {
        "coverage": float(answered.mean()),
        "accuracy": float(np.asarray(correct)[answered].mean()) if answered.any() else None,
    }


def mean_selective(fitted: list[dict]) -> dict:
    """The mean over seeds of their thresholds and of what those do; "seeds" has each where there are several.

    Args: `fitted`: one dict per seed, with "threshold", "coverage" and "accuracy".
    """
    if len(fitted) == 1:
        return fitted[0]
    mean = {}
    for name in ("threshold", "coverage", "accuracy"):
        known = [one[name] for one in fitted if one[name] is not None]
        mean[name] = float(np.mean(known)) if known else None
    return mean | {"seeds": fitted}


def fit_threshold(confidence, correct, target: float) -> float | None:
    """The lowest confidence that reaches a target accuracy on validation, and not by the luck of a few examples."""
    return threshold_for_accuracy(confidence, correct, target, SLACK)


def fit_thresholds(confidence, correct) -> list[dict]:
    """For each of `TARGETS` the lowest confidence that reaches it, None where none does, and what it does here.

    Args: `confidence`, `correct` (n,) of a validation split.
    """
    thresholds = [(target, fit_threshold(confidence, correct, target)) for target in TARGETS]
    return [
        {"target_accuracy": target, "threshold": threshold, **selective(confidence, correct, threshold)}
        for target, threshold in thresholds
    ]


def describe_student(arm: str, task: TaskConfig, section: dict, validation: dict) -> dict:
    """The content of `predict.json`.

    Args:
        section: the settings that the student was trained with.
        validation: its predictions on validation.
    """
    confidence, correct = best_view(validation)
    return {
        "schema_version": SCHEMA_VERSION,
        "arm": arm,
        "task": {key: value for key, value in vars(task).items() if value is not None},
        "loading": {key: section[key] for key in _LOADING if section.get(key) is not None},
        "validation": {"num_examples": len(confidence)},
        "thresholds": fit_thresholds(confidence, correct),
    }


def read_student(folder: str | Path) -> tuple[TaskConfig, dict]:
    """(task, the whole content) of a student's `predict.json`.

    Raises:
        ValueError: it is not there, from another version, or its task lists no closed answers.
    """
    file = Path(folder) / PREDICT_FILE
    if not file.is_file():
        raise ValueError(
            f"there is no {PREDICT_FILE} in {folder}, so neither its prompts nor its thresholds are known; run "
            "`first-trl evaluate RECIPE`, which writes it into the folder of each student"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema version {content.get('schema_version')!r}, and this version of first-trl reads "
            f"{SCHEMA_VERSION}; evaluate the student again"
        )
    try:
        task = TaskConfig(**content["task"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has a task that cannot be read ({error}); evaluate the student again") from error
    if not task.choices:
        raise ValueError(
            f"the task in {file} lists no choices: `predict` answers closed questions, of which the confidence was "
            "measured; for free text, generate with transformers, as the model card shows"
        )
    return task, content


def threshold_for(content: dict, accuracy: float) -> float | None:
    """The threshold fitted for a target accuracy; None where validation never reached it.

    Raises:
        ValueError: no threshold was fitted for this target.
    """
    fitted = {entry["target_accuracy"]: entry["threshold"] for entry in content["thresholds"]}
    if accuracy not in fitted:
        raise ValueError(
            f"no threshold was fitted for an accuracy of {accuracy}; choose among {', '.join(map(str, fitted))}"
        )
    return fitted[accuracy]

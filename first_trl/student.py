"""What a student carries to predict: its closing temperature, the thresholds, and the file that holds them.

`predict.json` lies beside a student's weights and makes the folder self-contained: the task (how a row becomes a
prompt, and the closed answers), how the base model is loaded, the temperature that its probabilities are divided by,
and for each target accuracy the lowest confidence that reached it on validation. `calibration.json` beside it says how
that temperature was found. Both are written at the end of `distill`; `first_trl.prediction` reads them.

Shapes: N examples, C choices, G temperatures.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .constants import PREDICT_FILE
from .errors import FirstTrlError
from .metrics import expected_calibration_error, risk_coverage_curve
from .settings import TaskConfig

CLOSING_FILE = "calibration.json"  # in a student's folder: its closing temperature
TARGETS = (0.8, 0.9, 0.95)
DEFAULT_TARGET = 0.9
# How far below its target a threshold may lie, with 90 % certainty, on rows like those that it was fitted on.
SLACK = 0.02
TEMPERATURES = np.exp(np.arange(-100, 131) * 0.03)  # of the closing calibration: 0.05 to 49, 3 % apart
VOCABULARY_TEMPERATURES = np.exp(np.arange(-10, 17) * 0.15)  # 0.22 to 11, 16 % apart: each costs a pass over the head
FEWEST_EXAMPLES = 50  # fewer say nothing of a temperature
LONGEST = 2**20  # tokens of a prompt that a predict.json may ask for

Share = Annotated[float, Field(ge=0, le=1)]


class Loading(BaseModel):
    """How the base model was held in memory when the thresholds were fitted; another way moves the probabilities."""

    model_config = ConfigDict(strict=True, extra="ignore")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    use_bnb_nested_quant: bool | None = None


class Threshold(BaseModel):
    """The lowest confidence that reached a target accuracy on validation (None if none did), and what it did there."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    target_accuracy: Share
    threshold: Share | None
    coverage: Share
    accuracy: Share | None


class Student(BaseModel):
    """The content of `predict.json`. What else a file holds is not read: it may come from anybody."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    schema_version: Literal[2] = 2
    arm: str
    task: TaskConfig
    loading: Loading
    base_is_local: bool
    temperature: Annotated[float, Field(ge=float(TEMPERATURES[0]), le=float(TEMPERATURES[-1]))] = 1.0
    num_examples: int
    thresholds: list[Threshold]

    @field_validator("task")
    @classmethod
    def _refuse_endless_prompts(cls, task: TaskConfig) -> TaskConfig:
        if task.max_length > LONGEST:
            raise ValueError(f"max_length is {task.max_length}, above {LONGEST}")
        return task


def choice_shares(log_probs_NC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(N, C) probabilities of the choices, normalised over them, under a temperature."""
    scaled_NC = log_probs_NC / temperature
    shares_NC = np.exp(scaled_NC - scaled_NC.max(axis=1, keepdims=True))
    return shares_NC / shares_NC.sum(axis=1, keepdims=True)


def closing_calibration(
    log_probs_NC: np.ndarray, is_label_NC: np.ndarray, bootstrap: int = 1000, seed: int = 0
) -> dict:
    """The one temperature that makes a student's own probabilities likeliest on validation: `calibration.json`.

    Args:
        log_probs_NC: a student's log-probabilities of the choices on validation, nats.
        is_label_NC: which choice is right.

    Returns:
        "temperature", what `predict` divides log-probabilities by: "fitted", the minimum of the NLL, or 1 for a reason
        that "why" gives: the bootstrap 95 % "interval" contains 1, the NLL falls towards temperature 0 (no answer is
        wrong), or too few examples. NLL (nats) and ECE, among the choices: at 1, at "temperature".
    """
    if not is_label_NC.any(axis=1).all():
        raise FirstTrlError(
            f"row {int((~is_label_NC.any(axis=1)).argmax())} of validation is answered by none of task.choices, so "
            "that no temperature can be fitted; correct the row or the choices."
        )

    def nll_at(temperature: float) -> np.ndarray:
        scaled_NC = log_probs_NC.astype(np.float64) / temperature
        return np.logaddexp.reduce(scaled_NC, axis=1) - np.where(is_label_NC, scaled_NC, 0).sum(axis=1)

    nll_NG = np.stack([nll_at(temperature) for temperature in TEMPERATURES], axis=1)
    fitted = fitted_temperature(nll_NG, TEMPERATURES, bootstrap, seed)
    temperature, num_examples = fitted["temperature"], len(log_probs_NC)
    right = is_label_NC[np.arange(num_examples), log_probs_NC.argmax(axis=1)]
    confidence = {t: choice_shares(log_probs_NC, t).max(axis=1) for t in (1.0, temperature)}
    ece = {t: expected_calibration_error(values, right) for t, values in confidence.items()}
    return {
        "schema_version": 1,
        "scope": "choices",
        **fitted,
        "criterion": "nll",
        "num_examples": num_examples,
        "accuracy": float(right.mean()),
        "nll_before": _finite(nll_at(1.0).mean()),
        "nll_after": _finite(nll_at(temperature).mean()),
        "ece_before": ece[1.0],
        "ece_after": ece[temperature],
    }


def fitted_temperature(nll_NG: np.ndarray, temperatures_G: np.ndarray, bootstrap: int = 1000, seed: int = 0) -> dict:
    """ "temperature", "fitted", "interval" and "why" of `closing_calibration`, from the NLL of each example (nats)."""
    nll_NG = nll_NG[np.isfinite(nll_NG).all(axis=1)]  # a label of probability 0 keeps it at every temperature
    fitted = _lowest(nll_NG.mean(axis=0), temperatures_G) if len(nll_NG) else 1.0
    generator, size = np.random.default_rng(seed), len(nll_NG)
    draws = [
        np.bincount(generator.integers(size, size=size), minlength=size) @ nll_NG
        for _ in range(bootstrap if size else 0)
    ]
    lowest = [_lowest(draw / size, temperatures_G) for draw in draws] or [fitted]
    low, high = map(float, np.percentile(lowest, [2.5, 97.5]))
    reasons = {
        f"there are fewer than {FEWEST_EXAMPLES} validation examples": size < FEWEST_EXAMPLES,
        "the NLL still falls at the smallest temperature tried": fitted <= temperatures_G[1],
        "the interval contains 1": low <= 1 <= high,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    temperature = fitted if why is None else 1.0
    why = why or "the interval does not contain 1"
    return {"temperature": temperature, "fitted": fitted, "interval": [low, high], "why": why}


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _lowest(nll_G: np.ndarray, temperatures_G: np.ndarray) -> float:
    """The temperature of the lowest NLL: of a parabola through the best one and its neighbours."""
    best, step = int(nll_G.argmin()), np.log(temperatures_G[1] / temperatures_G[0])
    if best in (0, len(nll_G) - 1):
        return float(temperatures_G[best])
    left, middle, right = nll_G[best - 1 : best + 2]
    bend = left - 2 * middle + right
    return float(temperatures_G[best] * np.exp(step * (left - right) / (2 * bend) if bend > 0 else 0))


def _wilson_lower_bound(share: np.ndarray, size: np.ndarray, z: float = 1.2816) -> np.ndarray:
    """Lower bound of a share seen in `size` draws (Wilson 1927); z = 1.2816 is 90 % on one side."""
    middle, spread = share + z**2 / (2 * size), z * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return (middle - spread) / (1 + z**2 / size)


def threshold_for_accuracy(confidence, correct, target_accuracy: float, slack: float | None = None) -> float | None:
    """The lowest confidence at or above which at least `target_accuracy` of the examples are right; None if none is.

    Of many thresholds the lowest does so partly by luck: with `slack` the lower bound of the accuracy (Wilson,
    one-sided, 90 %) must also reach `target_accuracy` - `slack`, which a handful of right answers cannot.
    """
    if not 0 < target_accuracy <= 1:
        raise FirstTrlError(f"target_accuracy is {target_accuracy!r}; it must be in (0, 1].")
    curve = risk_coverage_curve(confidence, correct)
    enough = 1 - curve.risk >= target_accuracy - 1e-12
    if slack is not None:
        answered = curve.coverage * len(np.asarray(correct))
        enough &= _wilson_lower_bound(1 - curve.risk, answered) >= target_accuracy - slack
    reached = np.flatnonzero(enough)
    return float(curve.threshold[reached[-1]]) if reached.size else None


def selective(confidence, correct, threshold: float | None) -> dict:
    """What answering at or above a threshold does: "coverage", the share answered, and "accuracy" of it (or None)."""
    answered = np.asarray(confidence) >= (np.inf if threshold is None else threshold)
    return {
        "coverage": float(answered.mean()),
        "accuracy": float(np.asarray(correct)[answered].mean()) if answered.any() else None,
    }


def mean_selective(fitted: list[dict]) -> dict:
    """The mean over seeds of `selective` and its "threshold"; "seeds" has each where there are several."""
    if len(fitted) == 1:
        return fitted[0]
    mean = {}
    for name in ("threshold", "coverage", "accuracy"):
        known = [one[name] for one in fitted if one[name] is not None]
        mean[name] = float(np.mean(known)) if known else None
    return mean | {"seeds": fitted}


def fit_thresholds(confidence, correct) -> list[dict]:
    """For each of `TARGETS` the lowest confidence (n,) on validation that reaches it, or None, and what it does."""
    fitted = []
    for target in TARGETS:
        threshold = threshold_for_accuracy(confidence, correct, target, SLACK)
        done = selective(confidence, correct, threshold)
        fitted.append({"target_accuracy": target, "threshold": threshold, **done})
    return fitted


def describe_student(arm: str, task: TaskConfig, section: dict, validation: dict, temperature: float = 1.0) -> dict:
    """The content of `predict.json`, from the section that the student was trained with.

    `validation` has its predictions on validation, under its closing `temperature`; among the choices, if there are.
    """
    view = "choice_" if "choice_confidence" in validation else ""
    confidence = validation[f"{view}confidence"]
    return {
        "schema_version": 2,
        "arm": arm,
        "task": {key: value for key, value in task if value is not None},
        "loading": {key: section[key] for key in Loading.model_fields if section.get(key) is not None},
        "base_is_local": Path(section["model_name_or_path"]).is_dir(),
        "temperature": temperature,
        "num_examples": len(confidence),
        "thresholds": fit_thresholds(confidence, validation[f"{view}correct"]),
    }


def read_student(folder: str | Path, closed: bool = True) -> tuple[TaskConfig, Student]:
    """(task, the whole content) of a student's `predict.json`.

    Raises:
        FirstTrlError: it is not there, not as this version writes it, or its task has closed answers against `closed`.
    """
    file = Path(folder) / PREDICT_FILE
    if not file.is_file():
        raise FirstTrlError(
            f"there is no {PREDICT_FILE} in {folder}, so neither its prompts nor its thresholds are known; run "
            "`first-trl distill RECIPE`, which writes it into the folder of each student"
        )
    try:
        student = Student.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        wrong = " ".join(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".split())
        raise FirstTrlError(
            f"{file} is not a student's description as this version of first-trl writes it ({wrong}); run `first-trl "
            "distill RECIPE` again, or fetch the folder again"
        ) from error
    if closed and not student.task.choices:
        raise FirstTrlError(f"the task in {file} lists no choices; write free text with --generate")
    if not closed and student.task.choices:
        raise FirstTrlError(f"the task in {file} lists choices, whose confidence is measured; leave --generate out")
    return student.task, student


def threshold_for(student: Student, accuracy: float) -> float | None:
    """The threshold fitted for a target accuracy, None where validation never reached it; FirstTrlError for others."""
    fitted = {entry.target_accuracy: entry.threshold for entry in student.thresholds}
    if accuracy not in fitted:
        targets = ", ".join(map(str, fitted)) or "none"
        raise FirstTrlError(f"no threshold was fitted for an accuracy of {accuracy}; choose among {targets}")
    return fitted[accuracy]

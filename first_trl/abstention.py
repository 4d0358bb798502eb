"""When to answer and when to abstain: the confidence thresholds of a student, and the file that it carries them in.

`predict.json` lies beside an adapter's weights and makes the folder self-contained: the task (how a row becomes a
prompt, and the closed answers), how the base model is loaded, and for each target accuracy the lowest confidence that
reached it on validation. `first_trl.prediction` reads it; nothing here runs a model.
"""

import json
from pathlib import Path

import numpy as np

from .config import TaskConfig
from .field_types import SettingsError
from .metrics import threshold_for_accuracy

PREDICT_FILE = "predict.json"
SCHEMA_VERSION = 1
TARGETS = (0.8, 0.9, 0.95)
DEFAULT_TARGET = 0.9
# How far below its target a threshold may lie, with 90 % certainty, on rows like those that it was fitted on.
SLACK = 0.02
# How the base model was held in memory when the thresholds were fitted; another way moves the probabilities.
_LOADING = ("dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")


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
    except (TypeError, SettingsError) as error:
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

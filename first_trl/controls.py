"""From the answers of the models to what the report measures: every arm, and the controls that are laid over them.

`teacher_recalibrated` and `<arm>_post_hoc` are answers that were already given, under a recalibration: the teacher's
is the one in `calibration.json`, the control's is searched on its own validation answers, by the same family and
criterion. So is the teacher's where answers have several tokens: the one in `calibration.json` is for single tokens.
A smoothing can be more than an unseen row has on its first token; that control is then left out, and its reason told.
Reads answers files (`first_trl.evaluation`); runs no model and measures nothing.
"""

from pathlib import Path

import numpy as np
import torch

from .calibration import error_curve, largest_smoothing, search
from .evaluation import predictions, read_answers, recalibrated_answers, tail_of
from .family import choose_family
from .recipe.loading import arm_of

VALIDATION = "validation"


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
    log_probs, target, tail = rows["log_probs"], rows["target"], tail_of(rows)
    method = calibration["method"]
    if "choice" in calibration:
        method = choose_family(log_probs, target, list(calibration["choice"]["scores"]), **settings, tail=tail).method
    return method, search(log_probs, target, method=method, **settings, **tail).value


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
                **tail_of(rows),
            )
            for name, rows in answers.items()
            if not _are_whole(rows)
        }
        for method, family in calibration["families"].items()
        if family["value"] is not None
    }

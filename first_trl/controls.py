"""From the answers of the models to what the report measures: every arm, and the controls that are laid over them.

`teacher_recalibrated` and `<arm>_post_hoc` are answers that were already given, under a recalibration: the teacher's
is the one in `calibration.json`, the control's is searched on its own validation answers, by the same family and
criterion. So is the teacher's where answers have several tokens: the one in `calibration.json` is for single tokens.
Reads answers files (`first_trl.evaluation`); runs no model and measures nothing.
"""

from pathlib import Path

from .calibration import error_curve, search
from .evaluation import predictions, read_answers, recalibrated_answers, tail_of
from .family import choose_family
from .recipe.loading import arm_of

VALIDATION = "validation"


def collect(
    folder: Path, models: list[str], uncalibrated: list[str], tests: list[str], calibration: dict
) -> tuple[dict[str, dict], dict[str, tuple[str, float | None]]]:
    """What every arm and every recalibrated control predicts.

    Args:
        folder: holds `<model>/<set>.parquet` for validation and every test set.
        models: those that answered.
        uncalibrated: students that learned from nothing recalibrated, each of which gets a `<arm>_post_hoc`.
        calibration: the content of `calibration.json`.

    Returns:
        ({arm: {set: predictions}}, validation among the sets, and {recalibrated arm: (method, value)}).
    """
    answers = {
        model: {name: read_answers(folder / model / f"{name}.parquet") for name in (VALIDATION, *tests)}
        for model in models
    }
    collected = {model: {name: predictions(rows) for name, rows in sets.items()} for model, sets in answers.items()}
    method, fitted = calibration["method"], {}
    if method != "none":
        own = answers["teacher"]
        value = calibration["value"]
        if _are_whole(own[VALIDATION]):
            method, value = _fit(own[VALIDATION], calibration)
        fitted["teacher_recalibrated"] = method, value
        collected["teacher_recalibrated"] = _recalibrated(own, method, value)
        for model in uncalibrated:
            method, value = _fit(answers[model][VALIDATION], calibration)
            arm, slash, seed = model.partition("/")
            control = f"{arm}_post_hoc{slash}{seed}"
            fitted[control] = method, value
            collected[control] = _recalibrated(answers[model], method, value)
    return collected, fitted


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

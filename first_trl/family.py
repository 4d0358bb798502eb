"""`calibrate.method: auto`: which family of recalibrations, by what each does on rows that its value has not seen.

Every family is fitted on four fifths of the validation rows and laid over the last fifth, five times; the criterion is
then taken over all rows at once, each under a value that never saw it. So a family that only fits better, for being
more flexible or luckier, does not win. The value itself is found afterwards, on all rows, by `first_trl.calibration`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from .calibration import CRITERIA, recalibrate, search
from .metrics import expected_calibration_error

FOLDS = 5


@dataclass(frozen=True)
class FamilyChoice:
    """The family that was chosen, why in a sentence, and {method: cross-validated criterion}, None where infinite."""

    method: str
    why: str
    scores: dict[str, float | None]

    def to_dict(self) -> dict:
        return {"method": self.method, "why": self.why, "folds": FOLDS, "scores": self.scores}


def choose_family(
    log_probs, target, methods: list[str], criterion: str = "ece", num_bins: int = 10, seed: int = 0
) -> FamilyChoice:
    """The family with the lowest cross-validated criterion; the earlier of `methods` where two are equal.

    Args:
        log_probs, target, criterion, num_bins: as for `calibration.search`; at least `FOLDS` rows.

    Raises:
        ValueError: fewer rows than folds, an unknown criterion, or no family whose criterion is finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}.")
    log_probs_NK1, target_N = torch.as_tensor(log_probs).float(), torch.as_tensor(target)
    if len(target_N) < FOLDS:
        raise ValueError(
            f"calibrate.method: auto needs at least {FOLDS} validation positions, one for each fold, and there are "
            f"{len(target_N)}; give a larger validation split, or name the method."
        )
    fold_N = np.random.default_rng(seed).permutation(len(target_N)) % FOLDS
    scores = {method: _score(log_probs_NK1, target_N, fold_N, method, criterion, num_bins) for method in methods}
    best = min(scores, key=lambda method: round(scores[method], 6))
    if not math.isfinite(scores[best]):
        raise ValueError(
            f"no family of {', '.join(methods)} gives every validation label a probability above 0, so criterion "
            f"{criterion!r} cannot choose; write calibrate.criterion: ece, or name the method."
        )
    told = {method: score if math.isfinite(score) else None for method, score in scores.items()}
    return FamilyChoice(best, _why(best, told, criterion), told)


def _score(log_probs_NK1, target_N, fold_N, method: str, criterion: str, num_bins: int) -> float:
    """The criterion over all rows, each recalibrated by the value that the other folds found."""
    rows_NK1 = torch.empty_like(log_probs_NK1)
    for fold in range(FOLDS):
        held, rest = torch.from_numpy(fold_N == fold), torch.from_numpy(fold_N != fold)
        settings: dict = {"method": method, "criterion": criterion, "num_bins": num_bins}
        value = search(log_probs_NK1[rest], target_N[rest], **settings).value
        rows_NK1[held] = recalibrate(log_probs_NK1[held], method, value)
    if criterion == "nll":
        return -rows_NK1.gather(1, target_N[:, None]).double().mean().item()
    top_N, predicted_N = rows_NK1[:, :-1].max(dim=-1)
    return expected_calibration_error(top_N.exp().clamp(max=1), predicted_N == target_N, num_bins)


def _why(best: str, scores: dict[str, float | None], criterion: str) -> str:
    def told(method: str) -> str:
        score = scores[method]
        if score is None:
            return f"{method} gives labels a probability of 0"
        return f"{method} {100 * score:.2f} %" if criterion == "ece" else f"{method} {score:.4f} nats"

    others = ", ".join(told(method) for method in scores if method != best)
    return f"lowest {criterion.upper()} on rows that its value was not fitted on ({FOLDS} folds): {told(best)}" + (
        f"; {others}" if others else ""
    )

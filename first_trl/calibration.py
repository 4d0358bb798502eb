"""Trustworthy maximization (the paper, section 3.3): map teacher rows to rows whose confidence is true.

One function, `recalibrate`, serves the search, the training loss and the inference of post-hoc recalibrated models,
so the value that was found is the value that is used. `search` finds that value from cached rows alone: no model, no
GPU. Which positions are passed in, and where the result is stored, is the calibrate stage's business, not ours.

Legend: N supervised positions, K kept tokens S, R bootstrap replicates, C columns of a criterion.
A row of `log_probs_NK1` holds log t_1..log t_K, most probable first, and log tau of all other tokens, in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .metrics import bin_indices, expected_calibration_error

METHODS = ("temperature", "probability", "label_smoothing", "none")
CRITERIA = ("ece", "nll")
FOLDS = 5  # of the cross-validation by which `auto` chooses a family
# Bootstrap counts are made in blocks of at most this many float32 numbers (80 MB), whatever N is.
BLOCK_SIZE = 20_000_000
# float16 rounding of K + 1 log-probabilities moves a row's sum by less than this.
ROW_SUM_TOLERANCE = 0.02


def recalibrate(log_probs: torch.Tensor, method: str, value: float | None) -> torch.Tensor:
    """Recalibrated rows (N, K+1), in float32 or better, each summing to 1.

    * "temperature": t'_i = (1 - tau) t_i^(1/T) / sum_S t_j^(1/T), tau' = tau. T = 1 is the identity; ranks are kept.
    * "probability" (the paper's formula): t'_i = exp(t_i / c) / sum_S exp(t_j / c), tau' = 0. A softmax over
      probabilities: never the identity, and the first token is capped at e^(1/c) / (e^(1/c) + K - 1).
    * "label_smoothing" (the paper's baseline): t'_1 = t_1 - d, d / (K - 1) added to each of the others, tau' = tau.
    * "none": the rows as they are; `value` is ignored.

    Raises ValueError for an unknown method and a value outside the method's range.
    """
    log_probs_NK1 = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    if method == "none":
        return log_probs_NK1
    value = _check_value(method, value)
    kept_NK, tail_N1 = log_probs_NK1[:, :-1], log_probs_NK1[:, -1:]
    if method == "temperature":
        kept_NK = _log1mexp(tail_N1) + torch.log_softmax(kept_NK / value, dim=-1)
    elif method == "probability":
        kept_NK = torch.log_softmax(kept_NK.exp() / value, dim=-1)
        tail_N1 = torch.full_like(tail_N1, -math.inf)
    else:
        kept_NK = _smooth(kept_NK, value)
    return torch.cat([kept_NK, tail_N1], dim=-1)


def _check_value(method: str, value: float | None) -> float:
    if method not in METHODS:
        raise ValueError(f"recalibration method is {method!r}; choose one of {', '.join(METHODS)}.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"recalibration value is {value!r} for method {method!r}; give a number, or run the calibrate stage, "
            "which finds it."
        )
    if method == "label_smoothing" and not 0 <= value <= 1:
        raise ValueError(f"label smoothing of {value}: the probability taken from the first token is in [0, 1].")
    if method != "label_smoothing" and value <= 0:
        raise ValueError(f"recalibration value is {value} for method {method!r}; it must be above 0.")
    return float(value)


def _log1mexp(log_x: torch.Tensor) -> torch.Tensor:
    """log(1 - x) from log x, exact at both ends (Maechler 2012)."""
    log_x = log_x.clamp(max=0)
    return torch.where(log_x > -math.log(2), (-log_x.expm1()).log(), (-log_x.exp()).log1p())


def _smooth(kept_NK: torch.Tensor, amount: float) -> torch.Tensor:
    """Label smoothing in probability space. In log space, 0.99 would become 0.991 instead of 0.89 for d = 0.1."""
    num_kept = kept_NK.shape[1]
    if num_kept < 2:
        raise ValueError("label smoothing needs at least 2 kept tokens to move probability to, but the rows keep 1.")
    probs_NK = kept_NK.exp()
    allowed = largest_smoothing(kept_NK)
    if amount > allowed:
        raise ValueError(
            f"label smoothing of {amount} would make the first token's probability negative; the largest that these "
            f"rows allow is {allowed:.4g}."
        )
    first_N1 = (probs_NK[:, :1] - amount).clamp(min=0)  # below 0 only by rounding, after the check
    return torch.cat([first_N1, probs_NK[:, 1:] + amount / (num_kept - 1)], dim=-1).log()


def largest_smoothing(kept_NK: torch.Tensor) -> float:
    """The most that label smoothing can take from the first token of all these rows (with or without tail)."""
    return kept_NK[:, 0].min().exp().item() if len(kept_NK) else 1.0


@dataclass(frozen=True)
class _Grid:
    """Candidate values `value(i)`, i in low..high: first every `step`-th, then every one around the best of those.

    `identity` is the i that changes nothing: ties go to the candidate nearest to it.
    """

    value: Callable[[int], float]
    low: int
    high: int
    step: int
    identity: int

    def coarse(self) -> range:
        return range(self.low, self.high + 1, self.step)

    def fine(self, best: int) -> range:
        return range(max(best - self.step + 1, self.low), min(best + self.step - 1, self.high) + 1)


def _grid(method: str, kept_NK: torch.Tensor, max_smoothing: float = 1.0) -> _Grid:
    if method == "temperature":  # 0.26 to 11, first 15 % apart, then 1 %
        return _Grid(lambda i: math.exp(i / 100), -135, 240, 15, identity=0)
    if method == "probability":  # the paper's: 0.1 to 1.5 by 0.1, then by 0.02; no identity, so ties go to small c
        return _Grid(lambda i: i / 50, 5, 75, 5, identity=5)
    allowed = min(0.5, max_smoothing, largest_smoothing(kept_NK))  # by 0.05, then by 0.005, as far as the rows allow
    return _Grid(lambda i: min(i / 200, allowed), 0, math.floor(allowed * 200), 10, identity=0)


@dataclass(frozen=True)
class SearchResult:
    """What `search` found. Errors are in [0, 1], NLL in nats, infinite where a label got probability 0."""

    method: str
    criterion: str
    num_bins: int
    num_positions: int
    num_labels_in_tail: int
    value: float | None
    interval: list[float] | None
    at_edge: bool  # the best value is the last of the range: a better one may lie outside
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    curve: list[dict[str, float | None]]  # by ascending value: {"value", "ece", "nll"}

    def to_dict(self) -> dict:
        """The family's entry in `calibration.json`: plain JSON, None for what is infinite."""
        names = ("value", "interval", "at_edge", "num_labels_in_tail")
        result = {name: getattr(self, name) for name in names}
        for name in ("ece_before", "ece_after", "nll_before", "nll_after"):
            result[name] = _finite(getattr(self, name))
        result["curve"] = [{name: _finite(number) for name, number in point.items()} for point in self.curve]
        return result


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


class _Evaluation:
    """Confidence, correctness and likelihood of the recalibrated rows at one value, for one method and criterion."""

    def __init__(self, log_probs_NK1, target_N, method, criterion, num_bins):
        self.log_probs_NK1, self.target_N, self.method = log_probs_NK1, target_N, method
        self.criterion, self.num_bins = criterion, num_bins
        # tau' = 0 makes every label in the tail infinitely unlikely whatever the value: those positions cannot choose.
        in_tail = target_N == log_probs_NK1.shape[1] - 1
        self.judged_N = ~in_tail if method == "probability" else torch.ones_like(in_tail)

    def rows(self, value: float | None) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """(N,) confidence, (N,) correct, (N,) negative log-likelihood of the label."""
        rows_NK1 = recalibrate(self.log_probs_NK1, self.method, value)
        top_N, predicted_N = rows_NK1[:, :-1].max(dim=-1)
        nll_N = -rows_NK1.gather(1, self.target_N[:, None])[:, 0]
        return top_N.exp().clamp(max=1).numpy(), (predicted_N == self.target_N).numpy(), nll_N

    def measure(self, value: float | None) -> dict[str, Any]:
        """{"value", "ece", "nll", "score"}: both errors over all positions, and what the criterion minimises."""
        confidence, correct, nll_N = self.rows(value)
        ece = expected_calibration_error(confidence, correct, self.num_bins)
        score = ece if self.criterion == "ece" else nll_N[self.judged_N].double().mean().item()
        return {"value": value, "ece": ece, "nll": nll_N.double().mean().item(), "score": score}

    def contributions(self, value: float) -> torch.Tensor:
        """(N, C): the criterion of a resample with counts w is sum_c |w @ column c|, up to a factor that is the same
        for every value. ECE: correct - confidence in the column of its bin. NLL: one column."""
        confidence, correct, nll_N = self.rows(value)
        if self.criterion == "nll":
            return nll_N.where(self.judged_N, torch.zeros(()))[:, None].float()
        table = torch.zeros(len(confidence), self.num_bins)
        index = torch.from_numpy(bin_indices(confidence, self.num_bins))[:, None]
        return table.scatter_(1, index, torch.from_numpy(correct - confidence)[:, None].float())


def search(
    log_probs: torch.Tensor,
    target: torch.Tensor,
    method: str = "temperature",
    criterion: str = "ece",
    num_bins: int = 10,
    bootstrap: int = 0,
    seed: int = 0,
    *,
    max_smoothing: float = 1.0,
) -> SearchResult:
    """The value of `method` that makes the confidence of cached rows true on a validation split.

    Args: `log_probs` (N, K+1) rows as cached; `target` (N,) int64, the column that holds the true label (0 the
    teacher's first token, K the tail); `criterion` "ece" (the paper's) or "nll"; `bootstrap` resamples of the
    positions for the 95 % interval of the value (0: none); `max_smoothing` the most that label smoothing may take,
    where other rows allow less than these. Raises ValueError for rows that do not sum to 1, targets out of range, no
    position, unknown names.

    A position's prediction is the most probable of its K columns after recalibration, its confidence that
    probability. Two-stage grid; ties go to the value nearest to the identity.

    The ECE is a noisy criterion: it is piecewise smooth, its minimum wanders as positions change bins, and a single
    scalar that balances two wrong bins can reach it by luck. Read the interval. The NLL is smooth and finds a planted
    temperature more exactly, but trusts a few very wrong rows more. Method "probability" gives the tail probability 0:
    there the criterion "nll" is taken over the positions whose label is in S, while the reported NLL stays infinite.
    """
    log_probs_NK1, target_N = _check_rows(log_probs, target)
    if method not in METHODS:
        raise ValueError(f"recalibration method is {method!r}; choose one of {', '.join(METHODS)}.")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}.")
    before = _Evaluation(log_probs_NK1, target_N, "none", "ece", num_bins).measure(None)
    best, curve, at_edge, interval = before, [before], False, None
    if method != "none":
        evaluation = _Evaluation(log_probs_NK1, target_N, method, criterion, num_bins)
        grid = _grid(method, log_probs_NK1[:, :-1], max_smoothing)
        points, chosen = _two_stages(evaluation, grid)
        best, curve = points[chosen], [points[i] for i in sorted(points)]
        at_edge = chosen in (grid.low, grid.high) and chosen != grid.identity
        if bootstrap:
            values = _bootstrap_values(evaluation, grid, bootstrap, seed)
            interval = [float(bound) for bound in np.percentile(values, [2.5, 97.5])]
    return SearchResult(
        method=method,
        criterion=criterion,
        num_bins=num_bins,
        num_positions=len(target_N),
        num_labels_in_tail=int((target_N == log_probs_NK1.shape[1] - 1).sum()),
        value=best["value"],
        interval=interval,
        at_edge=at_edge,
        ece_before=before["ece"],
        ece_after=best["ece"],
        nll_before=before["nll"],
        nll_after=best["nll"],
        curve=[{name: point[name] for name in ("value", "ece", "nll")} for point in curve],
    )


def error_curve(
    log_probs: torch.Tensor,
    target: torch.Tensor,
    method: str,
    values: list[float],
    num_bins: int = 10,
) -> list[dict[str, float | None]]:
    """[{"value", "ece", "nll"}] of rows at given values: how a search's curve looks on other rows, such as a test set.

    Args as for `search`; values of label smoothing that these rows do not allow are left out. Not for fitting.
    """
    log_probs_NK1, target_N = _check_rows(log_probs, target)
    if method == "label_smoothing":
        values = [value for value in values if value <= largest_smoothing(log_probs_NK1[:, :-1])]
    evaluation = _Evaluation(log_probs_NK1, target_N, method, "ece", num_bins)
    points = [evaluation.measure(value) for value in values]
    return [{name: _finite(point[name]) for name in ("value", "ece", "nll")} for point in points]


def _check_rows(log_probs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float32 or better and targets, on the CPU; ValueError for anything that is not a cache's rows."""
    log_probs_NK1 = recalibrate(torch.as_tensor(log_probs).detach().cpu(), "none", None)
    target_N = torch.as_tensor(target).detach().cpu()
    if log_probs_NK1.ndim != 2 or log_probs_NK1.shape[1] < 2 or target_N.shape != log_probs_NK1.shape[:1]:
        raise ValueError(
            f"log_probs has shape {tuple(log_probs_NK1.shape)} and target {tuple(target_N.shape)}; they must be "
            "(N, K+1) and (N,)."
        )
    if len(target_N) == 0:
        raise ValueError("there is no position to calibrate on; check the validation split and `positions`.")
    if target_N.is_floating_point() or target_N.min() < 0 or target_N.max() >= log_probs_NK1.shape[1]:
        raise ValueError(f"target must hold column numbers from 0 to {log_probs_NK1.shape[1] - 1} (the tail).")
    sums_N = log_probs_NK1.exp().sum(dim=-1)
    wrong_N = ~((sums_N - 1).abs() <= ROW_SUM_TOLERANCE)  # also true where a sum is NaN
    if wrong_N.any():
        place = int(wrong_N.int().argmax())
        raise ValueError(
            f"the probabilities of row {place} sum to {sums_N[place]:.4g}, not 1; pass log-probabilities of the K "
            "kept tokens and, in the last column, of the tail."
        )
    return log_probs_NK1, target_N.long()


def _two_stages(evaluation: _Evaluation, grid: _Grid) -> tuple[dict[int, dict], int]:
    """Every point that was measured, by its place on the grid, and the place of the best."""
    if evaluation.criterion == "nll" and not evaluation.judged_N.any():
        raise ValueError("every label lies outside the kept tokens, so criterion 'nll' cannot choose; use 'ece'.")
    points = {i: evaluation.measure(grid.value(i)) for i in grid.coarse()}
    for i in grid.fine(_best({i: point["score"] for i, point in points.items()}, grid)):
        points[i] = points.get(i) or evaluation.measure(grid.value(i))
    return points, _best({i: point["score"] for i, point in points.items()}, grid)


def _best(scores: dict[int, float], grid: _Grid) -> int:
    """The place of the lowest score; rounding away float32 noise lets equal candidates tie."""
    return min(scores, key=lambda i: (round(float(scores[i]), 6), abs(i - grid.identity), i))


def _bootstrap_values(evaluation: _Evaluation, grid: _Grid, bootstrap: int, seed: int) -> np.ndarray:
    """(R,) value found by the same two-stage search on each resample of the positions."""
    size = len(evaluation.target_N)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_SIZE // size)
    values = []
    for start in range(0, bootstrap, block):
        counts = [
            np.bincount(generator.integers(size, size=size), minlength=size).astype(np.float32)
            for _ in range(min(block, bootstrap - start))
        ]
        values.extend(_block_values(evaluation, grid, torch.from_numpy(np.stack(counts))))
    return np.array(values)


def _block_values(evaluation: _Evaluation, grid: _Grid, counts_RN: torch.Tensor) -> list[float]:
    """Two-stage search on R resamples at once: a fine candidate is scored once for all that need it."""
    score_R = {}
    for i in grid.coarse():
        score_R[i] = _scores(evaluation, grid.value(i), counts_RN)
    fine = [
        grid.fine(_best({i: score_R[i][replicate] for i in grid.coarse()}, grid))
        for replicate in range(len(counts_RN))
    ]
    for i in {i for candidates in fine for i in candidates} - score_R.keys():
        score_R[i] = _scores(evaluation, grid.value(i), counts_RN)
    best = [_best({i: score_R[i][replicate] for i in candidates}, grid) for replicate, candidates in enumerate(fine)]
    return [grid.value(i) for i in best]


def _scores(evaluation: _Evaluation, value: float, counts_RN: torch.Tensor) -> np.ndarray:
    """(R,) the criterion at one value on each resample."""
    return (counts_RN @ evaluation.contributions(value)).abs().sum(dim=-1).numpy() / counts_RN.shape[1]


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

"""Trustworthy maximization (the paper, section 3.3): map teacher rows to rows whose confidence is true.

One function, `recalibrate`, serves the search, the training loss and the inference of post-hoc recalibrated models,
so the value that was found is the value that is used. `search` finds that value from cached rows alone: no model, no
GPU. Which positions are passed in, and where the result is stored, is the calibrate stage's business, not ours.

Legend: N supervised positions, K kept tokens S, G groups of positions, R resamples of them, C columns of a criterion.
A row of `log_probs_NK1` holds log t_1..log t_K, most probable first, and log tau of all other tokens, in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from .constants import CRITERIA
from .constants import RECALIBRATION_METHODS as METHODS
from .errors import FirstTrlError
from .metrics import bin_indices, expected_calibration_error

FOLDS = 5  # of the cross-validation by which `auto` chooses a family
# A bootstrap draws single positions (or examples) up to this many, and beyond it random groups of them: sums over
# groups vary as sums over positions do, and each candidate is then measured once, whatever the number of resamples.
MOST_GROUPS = 10_000
CHUNK = 200_000  # positions that are recalibrated at a time
FEW_POSITIONS = 100  # fewer say little: the interval of a value fitted on them is wide
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
        raise FirstTrlError(f"recalibration method is {method!r}; choose one of {', '.join(METHODS)}.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FirstTrlError(
            f"recalibration value is {value!r} for method {method!r}; give a number, or run the calibrate stage, "
            "which finds it."
        )
    if method == "label_smoothing" and not 0 <= value <= 1:
        raise FirstTrlError(f"label smoothing of {value}: the probability taken from the first token is in [0, 1].")
    if method != "label_smoothing" and value <= 0:
        raise FirstTrlError(f"recalibration value is {value} for method {method!r}; it must be above 0.")
    return float(value)


def _log1mexp(log_x: torch.Tensor) -> torch.Tensor:
    """log(1 - x) from log x, exact at both ends (Maechler 2012)."""
    log_x = log_x.clamp(max=0)
    return torch.where(log_x > -math.log(2), (-log_x.expm1()).log(), (-log_x.exp()).log1p())


def _smooth(kept_NK: torch.Tensor, amount: float) -> torch.Tensor:
    """Label smoothing in probability space. In log space, 0.99 would become 0.991 instead of 0.89 for d = 0.1."""
    num_kept = kept_NK.shape[1]
    if num_kept < 2:
        raise FirstTrlError("label smoothing needs at least 2 kept tokens to move probability to; the rows keep 1.")
    probs_NK = kept_NK.exp()
    allowed = probs_NK[:, 0].min().item() if len(probs_NK) else 1.0
    if amount > allowed:
        raise FirstTrlError(
            f"label smoothing of {amount} would make the first token's probability negative; the largest that these "
            f"rows allow is {allowed:.4g}."
        )
    first_N1 = (probs_NK[:, :1] - amount).clamp(min=0)  # below 0 only by rounding, after the check
    return torch.cat([first_N1, probs_NK[:, 1:] + amount / (num_kept - 1)], dim=-1).log()


def largest_smoothing(log_probs_NK1: torch.Tensor) -> float:
    """The most that label smoothing can take from the first token of all these rows, as cached and as trained on.

    A cached row sums to 1 within the rounding of float16; the training loss sees it normalised.
    """
    if not len(log_probs_NK1):
        return 1.0
    rows_NK1 = log_probs_NK1.float()
    return min(rows[:, 0].min().exp().item() for rows in (rows_NK1, rows_NK1.log_softmax(dim=1)))


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

    def fine(self, best: int) -> range:
        return range(max(best - self.step + 1, self.low), min(best + self.step - 1, self.high) + 1)

    def best(self, scores: dict[int, float]) -> int:
        """The place of the lowest score; rounding away float32 noise lets equal candidates tie."""
        return min(scores, key=lambda i: (round(float(scores[i]), 6), abs(i - self.identity), i))

    def search(self, score: Callable[[int], np.ndarray]) -> list[int]:
        """The two-stage search of R resamples at once: the best place of each, from the (R,) scores of a place."""
        coarse = {i: score(i) for i in range(self.low, self.high + 1, self.step)}
        chosen = []
        for r in range(len(coarse[self.low])):
            nearby = self.fine(self.best({i: scores[r] for i, scores in coarse.items()}))
            chosen.append(self.best({i: score(i)[r] for i in nearby}))
        return chosen


def _grid(method: str, log_probs_NK1: torch.Tensor, max_smoothing: float = 1.0) -> _Grid:
    if method == "temperature":  # 0.26 to 11, first 15 % apart, then 1 %
        return _Grid(lambda i: math.exp(i / 100), -135, 240, 15, identity=0)
    if method == "probability":  # the paper's: 0.1 to 1.5 by 0.1, then by 0.02; no identity, so ties go to small c
        return _Grid(lambda i: i / 50, 5, 75, 5, identity=5)
    allowed = min(0.5, max_smoothing, largest_smoothing(log_probs_NK1))  # by 0.05, then by 0.005
    return _Grid(lambda i: min(i / 200, allowed), 0, math.floor(allowed * 200), 10, identity=0)


class _Measured(NamedTuple):
    """One candidate: both errors over all positions, what the criterion minimises, and its sums over the groups.

    The criterion of a resample that draws group g w_g times is sum_c |sum_g w_g sums_gc|, up to a factor that is the
    same for every candidate. ECE: correct - confidence in the column of its bin. NLL: one column.
    """

    ece: float
    nll: float
    score: float
    sums_GC: np.ndarray


@dataclass(frozen=True)
class _Positions:
    """Rows with their labels, and the group of each position."""

    log_probs_NK1: torch.Tensor
    target_N: torch.Tensor
    group_N: np.ndarray
    criterion: str
    num_bins: int

    def measure(self, method: str, value: float | None) -> _Measured:
        parts = []
        for rows_nK1, target_n in zip(self.log_probs_NK1.split(CHUNK), self.target_N.split(CHUNK), strict=True):
            rows_nK1 = recalibrate(rows_nK1, method, value)
            top_n, predicted_n = rows_nK1[:, :-1].max(dim=-1)
            nll_n = -rows_nK1.gather(1, target_n[:, None])[:, 0]
            parts.append((top_n.exp().clamp(max=1), predicted_n == target_n, nll_n))
        confidence_N, correct_N, nll_N = (torch.cat(column) for column in zip(*parts, strict=True))
        ece = expected_calibration_error(confidence_N, correct_N, self.num_bins)
        num_groups = int(self.group_N.max()) + 1
        if self.criterion == "nll":
            # tau' = 0 makes every label in the tail infinitely unlikely whatever the value: those cannot choose
            judged_N = self.judged(method)
            loss_N = nll_N.where(judged_N, torch.zeros(())).double().numpy()
            sums_GC = np.bincount(self.group_N, weights=loss_N, minlength=num_groups)[:, None]
            score = nll_N[judged_N].double().mean().item()
        else:
            column_N = self.group_N * self.num_bins + bin_indices(confidence_N.numpy(), self.num_bins)
            gap_N = (correct_N.double() - confidence_N.double()).numpy()
            sums = np.bincount(column_N, weights=gap_N, minlength=num_groups * self.num_bins)
            sums_GC, score = sums.reshape(num_groups, self.num_bins), ece
        return _Measured(ece, nll_N.double().mean().item(), score, sums_GC)

    def judged(self, method: str) -> torch.Tensor:
        """(N,) whether the likelihood of a position's label can choose among the values of a method."""
        in_tail_N = self.target_N == self.log_probs_NK1.shape[1] - 1
        return ~in_tail_N if method == "probability" else torch.ones_like(in_tail_N)


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
        result = {name: getattr(self, name) for name in ("value", "interval", "at_edge", "num_labels_in_tail")}
        for name in ("ece_before", "ece_after", "nll_before", "nll_after"):
            result[name] = _finite(getattr(self, name))
        result["curve"] = [{name: _finite(number) for name, number in point.items()} for point in self.curve]
        return result

    def warnings(self) -> list[str]:
        """What keeps the value from being trusted, a sentence each."""
        found = []
        if self.at_edge and self.value is not None:
            ends = [point["value"] for point in self.curve]
            side = "lowest" if self.value == ends[0] else "highest"
            found.append(
                f"{self.method} {self.value:.3g} is the {side} value that is searched, and a better one may lie "
                "beyond it: look at the teacher's answers on validation, or choose another calibrate.method"
            )
        if self.num_positions < FEW_POSITIONS:
            found.append(
                f"{self.num_positions} validation positions say little about a value; give datasets.validation "
                f"{FEW_POSITIONS} rows or more"
            )
        return found


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


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
    examples: np.ndarray | None = None,
) -> SearchResult:
    """The value of `method` that makes the confidence of cached rows true on a validation split.

    A position's prediction is the most probable of its K columns after recalibration, its confidence that
    probability. Two-stage grid; ties go to the value nearest to the identity. The ECE is piecewise smooth and noisy,
    and a scalar that balances two wrong bins can reach its minimum by luck: read the interval. The NLL finds a planted
    temperature more exactly, but trusts a few very wrong rows more. "probability" gives the tail probability 0: there
    the criterion "nll" is taken over the positions whose label is in S, while the reported NLL stays infinite.

    Args:
        log_probs (`torch.Tensor`): (N, K+1) rows as cached, nats, the tail last.
        target (`torch.Tensor`): (N,) int64, the column of the true label (0 the teacher's first token, K the tail).
        criterion (`str`, *optional*, defaults to `"ece"`): `"ece"` (the paper's) or `"nll"`.
        bootstrap (`int`, *optional*, defaults to 0): resamples for the 95 % interval of the value; 0 for none.
        max_smoothing (`float`, *optional*, defaults to 1.0): the most that label smoothing may take, where other rows
            allow less than these.
        examples (`np.ndarray`, *optional*): (N,) the example of each position, ascending: resamples then draw whole
            examples, for the tokens of one answer are not independent.

    Raises:
        ValueError: rows that do not sum to 1, targets out of range, no position, unknown names.
    """
    log_probs_NK1, target_N = _check_rows(log_probs, target)
    for name, found, known in (("recalibration method", method, METHODS), ("criterion", criterion, CRITERIA)):
        if found not in known:
            raise FirstTrlError(f"{name} is {found!r}; choose one of {', '.join(known)}.")
    group_N = _groups(len(target_N), examples, seed) if bootstrap else np.zeros(len(target_N), dtype=np.int64)
    positions = _Positions(log_probs_NK1, target_N, group_N, criterion, num_bins)
    before = positions.measure("none", None)
    value, interval, at_edge, measured = None, None, False, {None: before}
    if method != "none":
        value, interval, at_edge, measured = _fit(positions, method, max_smoothing, bootstrap, seed)
    return SearchResult(
        method=method,
        criterion=criterion,
        num_bins=num_bins,
        num_positions=len(target_N),
        num_labels_in_tail=int((target_N == log_probs_NK1.shape[1] - 1).sum()),
        value=value,
        interval=interval,
        at_edge=at_edge,
        ece_before=before.ece,
        ece_after=measured[value].ece,
        nll_before=before.nll,
        nll_after=measured[value].nll,
        curve=[{"value": at_value, "ece": point.ece, "nll": point.nll} for at_value, point in measured.items()],
    )


def _fit(positions: _Positions, method: str, max_smoothing: float, bootstrap: int, seed: int) -> tuple:
    """(value, its interval, whether it is the last of its range, {value: measured} by ascending value)."""
    if positions.criterion == "nll" and not positions.judged(method).any():
        raise FirstTrlError("every label lies outside the kept tokens, so criterion 'nll' cannot choose; use 'ece'.")
    grid, measured = _grid(method, positions.log_probs_NK1, max_smoothing), {}

    def at(i: int) -> _Measured:
        if i not in measured:
            measured[i] = positions.measure(method, grid.value(i))
        return measured[i]

    (chosen,) = grid.search(lambda i: np.array([at(i).score]))
    curve = {grid.value(i): measured[i] for i in sorted(measured)}
    # The end that changes nothing, as no smoothing does, is no edge
    at_edge = chosen in (grid.low, grid.high) and not (method == "label_smoothing" and chosen == grid.low)
    interval = None
    if bootstrap:
        size, generator = int(positions.group_N.max()) + 1, np.random.default_rng(seed)
        draws = [np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(bootstrap)]
        counts_RG = np.stack(draws).astype(np.float64)
        scores = cache(lambda i: np.abs(counts_RG @ at(i).sums_GC).sum(axis=1) / len(positions.target_N))
        interval = np.percentile([grid.value(i) for i in grid.search(scores)], [2.5, 97.5]).tolist()
    return grid.value(chosen), interval, at_edge, curve


def _groups(size: int, examples: np.ndarray | None, seed: int) -> np.ndarray:
    """(N,) number of the group that each position is drawn with: its own, its example's, or one of MOST_GROUPS."""
    unit_N = np.arange(size) if examples is None else np.unique(examples, return_inverse=True)[1]
    num_units = int(unit_N[-1]) + 1
    if num_units <= MOST_GROUPS:
        return unit_N
    return (np.random.default_rng(seed).permutation(num_units) % MOST_GROUPS)[unit_N]


def error_curve(
    log_probs: torch.Tensor, target: torch.Tensor, method: str, values: list[float], num_bins: int = 10
) -> list[dict[str, float | None]]:
    """[{"value", "ece", "nll"}] of rows at given values: how a search's curve looks on other rows, such as a test set.

    Args as for `search`; values of label smoothing that these rows do not allow are left out. Not for fitting.
    """
    log_probs_NK1, target_N = _check_rows(log_probs, target)
    if method == "label_smoothing":
        values = [value for value in values if value <= largest_smoothing(log_probs_NK1)]
    positions = _Positions(log_probs_NK1, target_N, np.zeros(len(target_N), dtype=np.int64), "ece", num_bins)
    points = [(value, positions.measure(method, value)) for value in values]
    return [{"value": value, "ece": point.ece, "nll": _finite(point.nll)} for value, point in points]


def _check_rows(log_probs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float32 or better and targets, on the CPU; ValueError for anything that is not a cache's rows."""
    log_probs_NK1 = recalibrate(torch.as_tensor(log_probs).detach().cpu(), "none", None)
    target_N = torch.as_tensor(target).detach().cpu()
    if log_probs_NK1.ndim != 2 or log_probs_NK1.shape[1] < 2 or target_N.shape != log_probs_NK1.shape[:1]:
        raise FirstTrlError(
            f"log_probs has shape {tuple(log_probs_NK1.shape)} and target {tuple(target_N.shape)}; they must be "
            "(N, K+1) and (N,)."
        )
    if len(target_N) == 0:
        raise FirstTrlError("there is no position to calibrate on; check the validation split and `positions`.")
    if target_N.is_floating_point() or target_N.min() < 0 or target_N.max() >= log_probs_NK1.shape[1]:
        raise FirstTrlError(f"target must hold column numbers from 0 to {log_probs_NK1.shape[1] - 1} (the tail).")
    sums_N = log_probs_NK1.exp().sum(dim=-1)
    wrong_N = ~((sums_N - 1).abs() <= ROW_SUM_TOLERANCE)  # also true where a sum is NaN
    if wrong_N.any():
        place = int(wrong_N.int().argmax())
        raise FirstTrlError(
            f"the probabilities of row {place} sum to {sums_N[place]:.4g}, not 1; pass log-probabilities of the K "
            "kept tokens and, in the last column, of the tail."
        )
    return log_probs_NK1, target_N.long()


class FamilyChoice(NamedTuple):
    """The family that was chosen, why in a sentence, and {method: cross-validated criterion}, None where infinite."""

    method: str
    why: str
    scores: dict[str, float | None]

    def to_dict(self) -> dict:
        return {"method": self.method, "why": self.why, "folds": FOLDS, "scores": self.scores}


def choose_family(
    log_probs, target, methods: list[str], criterion: str = "ece", num_bins: int = 10, seed: int = 0
) -> FamilyChoice:
    """`calibrate.method: auto`: the family with the lowest criterion on rows that its value has not seen.

    Each is fitted on four fifths of the rows and applied to the last fifth, five times; the criterion is then taken
    over all rows at once. So a family that only fits better, for being more flexible or luckier, does not win. The
    value itself is found afterwards, on all rows, by `search`; the earlier of `methods` wins where two are equal.

    Args as for `search`; at least `FOLDS` rows.

    Raises:
        ValueError: fewer rows than folds, an unknown criterion, or no family whose criterion is finite.
    """
    if criterion not in CRITERIA:
        raise FirstTrlError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}.")
    log_probs_NK1, target_N = _check_rows(log_probs, target)
    if len(target_N) < FOLDS:
        raise FirstTrlError(
            f"calibrate.method: auto needs at least {FOLDS} validation positions, one for each fold, and there are "
            f"{len(target_N)}; give a larger validation split, or name the method."
        )
    fold_N = np.random.default_rng(seed).permutation(len(target_N)) % FOLDS
    positions = _Positions(log_probs_NK1, target_N, fold_N, criterion, num_bins)
    scores = {method: _cross_validated(positions, method) for method in methods}
    best = min(scores, key=lambda method: round(scores[method], 6))
    if not math.isfinite(scores[best]):
        raise FirstTrlError(
            f"no family of {', '.join(methods)} gives every validation label a probability above 0, so criterion "
            f"{criterion!r} cannot choose; write calibrate.criterion: ece, or name the method."
        )
    finite = {method: _finite(score) for method, score in scores.items()}
    return FamilyChoice(best, _why(best, finite, criterion), finite)


def _cross_validated(positions: _Positions, method: str) -> float:
    """The criterion over all rows, each recalibrated by the value that the other folds found."""
    if positions.criterion == "nll" and not positions.judged(method).all():
        return math.inf  # a label whose probability is 0 at every value
    grid = _grid(method, positions.log_probs_NK1)
    at = cache(lambda i: positions.measure(method, grid.value(i)).sums_GC)
    others_FF = 1 - np.eye(FOLDS)
    chosen = grid.search(lambda i: np.abs(others_FF @ at(i)).sum(axis=1) / len(positions.target_N))
    return float(np.abs(sum(at(i)[fold] for fold, i in enumerate(chosen))).sum() / len(positions.target_N))


def _why(best: str, scores: dict[str, float | None], criterion: str) -> str:
    def with_score(method: str) -> str:
        score = scores[method]
        if score is None:
            return f"{method} gives labels a probability of 0"
        return f"{method} {100 * score:.2f} %" if criterion == "ece" else f"{method} {score:.4f} nats"

    reason = f"lowest {criterion.upper()} on rows that its value was not fitted on ({FOLDS} folds): {with_score(best)}"
    return "; ".join([reason, ", ".join(with_score(method) for method in scores if method != best)]).rstrip("; ")

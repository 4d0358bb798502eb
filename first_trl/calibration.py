"""Trustworthy maximization (the paper, section 3.3): map teacher rows to rows whose confidence is true.

One function, `recalibrate`, serves the search, the training loss and the answers of recalibrated models, so the value
that was found is the value that is used. `search` finds it from cached rows alone: no model, no GPU.

To add a family, write its map, give it an entry in `FAMILIES` with the values to search, and add its name to
`RECALIBRATION_METHODS` in constants.py: recipes, search, loss and report find it there.

Legend: N supervised positions, K kept tokens S, G groups of positions, R resamples of them, C columns of a criterion.
A row of `log_probs_NK1` holds log t_1..log t_K, most probable first, and log tau of all other tokens, in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .constants import CRITERIA
from .errors import FirstTrlError
from .metrics import bin_indices, expected_calibration_error

FOLDS = 5  # of the cross-validation by which `auto` chooses a family
# A bootstrap draws single positions (or examples) up to this many, and beyond it random groups of them: sums over
# groups vary as sums over positions do, and each candidate is then measured once, whatever the number of resamples.
MOST_GROUPS = 10_000
CHUNK = 200_000  # positions that are recalibrated at a time
FEW_POSITIONS = 100  # fewer say little: the interval of a value fitted on them is wide
ROW_SUM_TOLERANCE = 0.02  # float16 rounding of K + 1 log-probabilities moves a row's sum by less

Pair = tuple[torch.Tensor, torch.Tensor]


# The families. A map takes the kept tokens (N, K), the tail (N, 1) and a value, and returns both recalibrated.


def _temperature(kept_NK: torch.Tensor, tail_N1: torch.Tensor, value: float) -> Pair:
    """t'_i = (1 - tau) t_i^(1/T) / sum_S t_j^(1/T), tau' = tau. T = 1 is the identity; ranks are kept."""
    log_tau = tail_N1.clamp(max=0)
    # log(1 - tau), exact at both ends (Maechler 2012)
    mass_N1 = torch.where(log_tau > -math.log(2), (-log_tau.expm1()).log(), (-log_tau.exp()).log1p())
    return mass_N1 + torch.log_softmax(kept_NK / value, dim=-1), tail_N1


def _probability(kept_NK: torch.Tensor, tail_N1: torch.Tensor, value: float) -> Pair:
    """The paper's formula, a softmax over probabilities: t'_i = exp(t_i / c) / sum_S exp(t_j / c), tau' = 0.

    It is never the identity, and the first token is capped at e^(1/c) / (e^(1/c) + K - 1).
    """
    return torch.log_softmax(kept_NK.exp() / value, dim=-1), torch.full_like(tail_N1, -math.inf)


def _label_smoothing(kept_NK: torch.Tensor, tail_N1: torch.Tensor, value: float) -> Pair:
    """The paper's baseline: t'_1 = t_1 - d, d / (K - 1) added to each of the others, tau' = tau.

    In probability space: in log space, 0.99 would become 0.991 instead of 0.89 for d = 0.1.
    """
    probs_NK, num_kept = kept_NK.exp(), kept_NK.shape[1]
    allowed = probs_NK[:, 0].min().item() if len(probs_NK) else 1.0
    if value > allowed or num_kept < 2:
        raise FirstTrlError(
            f"label smoothing of {value} does not fit rows of {num_kept} kept tokens whose first has {allowed:.4g} to "
            f"give; take at most {allowed:.4g}, and keep at least 2 tokens."
        )
    first_N1 = (probs_NK[:, :1] - value).clamp(min=0)  # below 0 only by rounding, after the check
    return torch.cat([first_N1, probs_NK[:, 1:] + value / (num_kept - 1)], dim=-1).log(), tail_N1


def largest_smoothing(log_probs_NK1: torch.Tensor) -> float:
    """The most that label smoothing can take from the first token of all these rows, as cached and as trained on.

    A cached row sums to 1 within the rounding of float16; the training loss sees it normalised.
    """
    if not len(log_probs_NK1):
        return 1.0
    rows_NK1 = log_probs_NK1.float()
    return min(rows[:, 0].min().exp().item() for rows in (rows_NK1, rows_NK1.log_softmax(dim=1)))


class Family(NamedTuple):
    """A map, and the values to search: value(i), i in low..high, first every `step`-th, then all around the best."""

    apply: Callable[[torch.Tensor, torch.Tensor, float], Pair]
    value: Callable[[int], float | None]
    low: int
    high: int
    step: int
    identity: int  # the i that changes nothing: of equal candidates the nearest to it wins
    bounds: tuple[float, float] = (1e-6, 1e6)  # of the values that may be asked for
    largest: Callable[[torch.Tensor], float] = lambda log_probs_NK1: math.inf  # that these rows allow
    keeps_tail: bool = True  # if not, a label outside S has probability 0 whatever the value


FAMILIES = {
    # 0.26 to 11, first 15 % apart, then 1 %
    "temperature": Family(_temperature, lambda i: math.exp(i / 100), -135, 240, 15, identity=0),
    # the paper's grid: 0.1 to 1.5 by 0.1, then by 0.02; without an identity, ties go to the smallest
    "probability": Family(_probability, lambda i: i / 50, 5, 75, 5, identity=5, keeps_tail=False),
    # 0 to 0.5 by 0.05, then by 0.005
    "label_smoothing": Family(
        _label_smoothing, lambda i: i / 200, 0, 100, 10, identity=0, bounds=(0.0, 1.0), largest=largest_smoothing
    ),
    "none": Family(lambda kept_NK, tail_N1, value: (kept_NK, tail_N1), lambda i: None, 0, 0, 1, identity=0),
}


def recalibrate(log_probs: torch.Tensor, method: str, value: float | None) -> torch.Tensor:
    """Recalibrated rows (N, K+1), in float32 or better, each summing to 1; "none" gives them as they are.

    Raises ValueError for an unknown method and a value outside the method's range.
    """
    log_probs_NK1 = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    if method == "none":
        return log_probs_NK1
    family = _known("recalibration method", method, FAMILIES)
    low, high = family.bounds
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise FirstTrlError(
            f"recalibration value is {value!r} for method {method!r}; give a number from {low:g} to {high:g}, or run "
            "the calibrate stage, which finds it."
        )
    return torch.cat(family.apply(log_probs_NK1[:, :-1], log_probs_NK1[:, -1:], float(value)), dim=-1)


def _known(name: str, found: str, known: dict):
    if found not in known:
        raise FirstTrlError(f"{name} is {found!r}; choose one of {', '.join(known)}.")
    return known[found]


# The search


class _Measured(NamedTuple):
    """One candidate: its errors over all positions, and what the criterion sums over each group of them.

    Where group g is drawn w_g times the criterion is sum_c |sum_g w_g sums_gc| / N. ECE has a column for each bin, of
    correct - confidence; NLL has one.
    """

    ece: float
    nll: float
    sums_GC: np.ndarray


class _Fit:
    """One family over rows with their labels and groups; each candidate is measured once, however often it is drawn.

    Raises ValueError for anything that is not a cache's rows.
    """

    def __init__(self, log_probs, target, method: str, criterion: str, num_bins: int, largest: float = math.inf):
        self.rows_NK1 = recalibrate(torch.as_tensor(log_probs).detach().cpu(), "none", None)
        self.target_N = torch.as_tensor(target).detach().cpu()
        self.method, self.criterion, self.num_bins = method, criterion, num_bins
        self.family = _known("recalibration method", method, FAMILIES)
        _known("criterion", criterion, dict.fromkeys(CRITERIA))
        self._check_rows()
        self.group_N, self.measured = np.zeros(len(self.target_N), dtype=np.int64), dict[int, _Measured]()
        self.in_tail_N = self.target_N == self.rows_NK1.shape[1] - 1
        # tau' = 0 makes every label in the tail infinitely unlikely whatever the value: those cannot choose
        self.judged_N = ~self.in_tail_N | self.family.keeps_tail
        family, largest = self.family, min(largest, self.family.largest(self.rows_NK1))
        self.places = [i for i in range(family.low, family.high + 1) if (family.value(i) or 0) <= largest]

    def _check_rows(self) -> None:
        shape, tail, target_N = self.rows_NK1.shape, self.rows_NK1.shape[-1] - 1, self.target_N
        sound = len(shape) == 2 and tail > 0 and target_N.shape == shape[:1] and not target_N.is_floating_point()
        if not (sound and len(target_N) and 0 <= target_N.min() and target_N.max() <= tail):
            raise FirstTrlError(
                f"log_probs has shape {tuple(shape)} and target {tuple(target_N.shape)}; they must be (N, K+1) and "
                f"(N,) with one position or more, and target must hold column numbers from 0 to {tail} (the tail)."
            )
        sums_N = self.rows_NK1.exp().sum(dim=-1)
        wrong_N = ~((sums_N - 1).abs() <= ROW_SUM_TOLERANCE)  # also true where a sum is NaN
        if wrong_N.any():
            place = int(wrong_N.int().argmax())
            raise FirstTrlError(
                f"the probabilities of row {place} sum to {sums_N[place]:.4g}, not 1; pass log-probabilities of the K "
                "kept tokens and, in the last column, of the tail."
            )

    def measure(self, value: float | None) -> _Measured:
        parts = []
        for rows_nK1, target_n in zip(self.rows_NK1.split(CHUNK), self.target_N.split(CHUNK), strict=True):
            rows_nK1 = recalibrate(rows_nK1, self.method, value)
            top_n, predicted_n = rows_nK1[:, :-1].max(dim=-1)
            nll_n = -rows_nK1.gather(1, target_n[:, None].long())[:, 0]
            parts.append((top_n.exp().clamp(max=1), predicted_n == target_n, nll_n))
        confidence_N, correct_N, nll_N = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.criterion == "nll":
            columns, column_N, share_N = 1, self.group_N, nll_N.where(self.judged_N, torch.zeros(())).double()
        else:
            columns, share_N = self.num_bins, correct_N.double() - confidence_N.double()
            column_N = self.group_N * columns + bin_indices(confidence_N.numpy(), columns)
        size = (int(self.group_N.max()) + 1) * columns
        sums_GC = np.bincount(column_N, weights=share_N.numpy(), minlength=size).reshape(-1, columns)
        ece = expected_calibration_error(confidence_N, correct_N, self.num_bins)
        return _Measured(ece, nll_N.double().mean().item(), sums_GC)

    def at(self, i: int) -> _Measured:
        if i not in self.measured:
            self.measured[i] = self.measure(self.family.value(i))
        return self.measured[i]

    def best(self, weights_RG: np.ndarray) -> list[int]:
        """The two-stage search of R resamples at once, each drawing group g `weights_RG[r, g]` times."""
        scores: dict[int, np.ndarray] = {}

        def best_of(places: list[int], r: int) -> int:
            for i in places:
                if i not in scores:
                    scores[i] = np.abs(weights_RG @ self.at(i).sums_GC).sum(axis=1) / len(self.target_N)
            # rounding away float32 noise lets equal candidates tie
            return min(places, key=lambda i: (round(float(scores[i][r]), 6), abs(i - self.family.identity), i))

        step, found = self.family.step, []
        for r in range(len(weights_RG)):
            near = best_of(self.places[::step], r)
            found.append(best_of([i for i in self.places if abs(i - near) < step], r))
        return found


@dataclass(frozen=True)
class SearchResult:
    """What `search` found. Errors are in [0, 1], NLL in nats, infinite where a label got probability 0."""

    method: str
    num_positions: int
    value: float | None
    interval: list[float] | None
    at_edge: bool  # the best value is the last of the range: a better one may lie outside
    num_labels_in_tail: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    curve: list[dict[str, float | None]]  # by ascending value: {"value", "ece", "nll"}

    def to_dict(self) -> dict:
        """The family's entry in `calibration.json`: plain JSON, None for what is infinite."""
        entry = {name: value for name, value in vars(self).items() if name not in ("method", "num_positions")}
        return _finite(entry) | {"curve": [_finite(point) for point in self.curve]}

    def warnings(self) -> list[str]:
        """What keeps the value from being trusted, a sentence each."""
        found = []
        if self.at_edge:
            side = "lowest" if self.value == self.curve[0]["value"] else "highest"
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


def _finite(entries: dict) -> dict:
    """The entries with None for NaN and infinity, which JSON does not have."""
    return {key: None if isinstance(at, float) and not math.isfinite(at) else at for key, at in entries.items()}


def search(
    log_probs: torch.Tensor,
    target: torch.Tensor,
    method: str = "temperature",
    criterion: str = "ece",
    num_bins: int = 10,
    bootstrap: int = 0,
    seed: int = 0,
    *,
    max_smoothing: float = math.inf,
    examples: np.ndarray | None = None,
) -> SearchResult:
    """The value of `method` that makes the confidence of cached rows true on a validation split.

    A position's prediction is the most probable of its K columns after recalibration, its confidence that
    probability. The ECE is piecewise smooth and noisy, and a scalar that balances two wrong bins can reach its minimum
    by luck: read the interval. The NLL finds a planted temperature more exactly, but trusts a few very wrong rows
    more; for a family without a tail it is taken over the labels in S, while the reported NLL stays infinite.

    Args:
        log_probs (`torch.Tensor`): (N, K+1) rows as cached, nats, the tail last.
        target (`torch.Tensor`): (N,) int64, the column of the true label (0 the teacher's first token, K the tail).
        criterion (`str`, *optional*, defaults to `"ece"`): `"ece"` (the paper's) or `"nll"`.
        bootstrap (`int`, *optional*, defaults to 0): resamples for the 95 % interval of the value; 0 for none.
        max_smoothing (`float`, *optional*): the most that label smoothing may take, where other rows allow less.
        examples (`np.ndarray`, *optional*): (N,) the example of each position, ascending: resamples then draw whole
            examples, for the tokens of one answer are not independent.

    Raises:
        ValueError: rows that do not sum to 1, targets out of range, no position, unknown names.
    """
    largest = max_smoothing if method == "label_smoothing" else math.inf
    fit = _Fit(log_probs, target, method, criterion, num_bins, largest)
    before = _Fit(log_probs, target, "none", "ece", num_bins).at(0)
    if criterion == "nll" and not fit.judged_N.any():
        raise FirstTrlError("every label lies outside the kept tokens, so criterion 'nll' cannot choose; use 'ece'.")
    if bootstrap:
        fit.group_N = _groups(len(fit.target_N), examples, seed)
    size, interval = int(fit.group_N.max()) + 1, None
    (chosen,) = fit.best(np.ones((1, size)))
    value, after, curve = fit.family.value(chosen), fit.at(chosen), sorted(fit.measured.items())
    if bootstrap and value is not None:
        generator = np.random.default_rng(seed)
        draws = [np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(bootstrap)]
        values = [fit.family.value(i) for i in fit.best(np.stack(draws).astype(np.float64))]
        interval = np.percentile(values, [2.5, 97.5]).tolist()
    return SearchResult(
        method=method,
        num_positions=len(fit.target_N),
        value=value,
        interval=interval,
        at_edge=chosen in (fit.places[0], fit.places[-1]) and bool(value),  # no smoothing at all is no edge
        num_labels_in_tail=int(fit.in_tail_N.sum()),
        ece_before=before.ece,
        ece_after=after.ece,
        nll_before=before.nll,
        nll_after=after.nll,
        curve=[{"value": fit.family.value(i), "ece": point.ece, "nll": point.nll} for i, point in curve],
    )


def _groups(size: int, examples: np.ndarray | None, seed: int) -> np.ndarray:
    """(N,) number of the group that each position is drawn with: its own, its example's, or one of MOST_GROUPS."""
    unit_N = np.arange(size) if examples is None else np.unique(examples, return_inverse=True)[1]
    num_units = int(unit_N[-1]) + 1
    if num_units <= MOST_GROUPS:
        return unit_N
    return (np.random.default_rng(seed).permutation(num_units) % MOST_GROUPS)[unit_N]


def error_curve(log_probs, target, method: str, values: list, num_bins: int = 10) -> list[dict[str, float | None]]:
    """[{"value", "ece", "nll"}] of rows at given values: how a search's curve looks on other rows, such as a test set.

    Args as for `search`; values that these rows do not allow are left out. Not for fitting.
    """
    fit = _Fit(log_probs, target, method, "ece", num_bins)
    largest = fit.family.largest(fit.rows_NK1)
    points = {value: fit.measure(value) for value in values if value is None or value <= largest}
    return [_finite({"value": value, "ece": point.ece, "nll": point.nll}) for value, point in points.items()]


# The choice among families


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
    over all rows at once, so that a more flexible or luckier family does not win by it. The value itself is found
    afterwards, on all rows, by `search`; the earlier of `methods` wins where two are equal.

    Raises:
        ValueError: fewer rows than folds, an unknown criterion, or no family whose criterion is finite.
    """
    scores: dict[str, float] = {}
    for method in methods:
        fit = _Fit(log_probs, target, method, criterion, num_bins)
        if len(fit.target_N) < FOLDS:
            raise FirstTrlError(
                f"calibrate.method: auto needs at least {FOLDS} validation positions, and there are "
                f"{len(fit.target_N)}; give a larger validation split, or name the method."
            )
        if criterion == "nll" and not fit.judged_N.all():
            scores[method] = math.inf  # a label whose probability is 0 at every value
            continue
        fit.group_N = np.random.default_rng(seed).permutation(len(fit.target_N)) % FOLDS
        held_C = sum(fit.at(i).sums_GC[fold] for fold, i in enumerate(fit.best(1 - np.eye(FOLDS))))
        scores[method] = float(np.abs(held_C).sum() / len(fit.target_N))
    best = min(scores, key=lambda method: round(scores[method], 6))
    if not math.isfinite(scores[best]):
        raise FirstTrlError(
            f"no family of {', '.join(methods)} gives every validation label a probability above 0, so criterion "
            f"{criterion!r} cannot choose; write calibrate.criterion: ece, or name the method."
        )

    def with_score(method: str) -> str:
        if not math.isfinite(scores[method]):
            return f"{method} gives labels a probability of 0"
        return (
            f"{method} {100 * scores[method]:.2f} %" if criterion == "ece" else f"{method} {scores[method]:.4f} nats"
        )

    why = f"lowest {criterion.upper()} on rows that its value was not fitted on ({FOLDS} folds): {with_score(best)}"
    others = ", ".join(with_score(method) for method in scores if method != best)
    return FamilyChoice(best, f"{why}; {others}" if others else why, _finite(scores))

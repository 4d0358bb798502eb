"""Numbers that say whether a stated confidence is true, each defined once.

Numpy only: it knows no model, no tokenizer and no file. Examples with the same confidence enter ranks (AUROC) and risk
curves together, so that a shuffled input gives the same numbers.

Legend: n examples, M bins, B bootstrap replicates, G groups of examples with the same confidence, U units to resample.
`confidence` is the probability of the predicted token or answer; arrays, lists and torch tensors are accepted.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import FirstTrlError

COVERAGES = (0.8, 0.9, 0.95)
REPORTED = ("accuracy", "ece", "ece_15_bins", "ece_equal_mass", "trust_score", "nll", "brier", "auroc", "aurc")
ROUNDING = 1e-5  # float32 probabilities may exceed 1 by a few units in the last place
BLOCK_SIZE = 4_000_000  # numbers in a block of bootstrap weights (float64: 32 MB), whatever n is


@dataclass(frozen=True)
class ReliabilityBins:
    """Columns of a reliability diagram, all of shape (M,). Empty bins have count 0 and NaN means."""

    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


@dataclass(frozen=True)
class RiskCoverage:
    """Risk-coverage curve (G,): confidence >= `threshold` answers the share `coverage`, and errs on `risk` of them."""

    threshold: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray


def _as_array(values: Any, name: str) -> np.ndarray:
    """(n,) float64 from an array, a list or a tensor; NaN, other shapes and emptiness are errors."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy knows no bfloat16
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise FirstTrlError(f"{name} has shape {array.shape}; it must have one dimension, one entry per example.")
    if array.size == 0:
        raise FirstTrlError(f"{name} is empty; metrics need at least one example.")
    _refuse(np.isnan(array), array, name, "NaN; look for the model that produced it")
    return array


def _refuse(wrong: np.ndarray, array: np.ndarray, name: str, what: str) -> None:
    if wrong.any():
        place = int(wrong.argmax())
        value = "" if what.startswith("NaN") else f"{array[place]}, "
        raise FirstTrlError(f"{name}[{place}] is {value}{what}.")


def _check(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both inputs as (n,) float64, checked: confidence in [0, 1], correct in {0, 1}, one length."""
    confidence, correct = _as_array(confidence, "confidence"), _as_array(correct, "correct")
    if len(confidence) != len(correct):
        raise FirstTrlError(f"confidence has {len(confidence)} entries but correct has {len(correct)}; pass one each.")
    outside = (confidence < -ROUNDING) | (confidence > 1 + ROUNDING)
    _refuse(outside, confidence, "confidence", "outside [0, 1]; pass probabilities, not logits or logs")
    _refuse((correct != 0) & (correct != 1), correct, "correct", "and must be true or false (1 or 0)")
    return confidence.clip(0, 1), correct


def _check_log_prob(label_log_prob: Any, length: int) -> np.ndarray:
    """(n,) float64 log-probabilities in nats; -inf (the label was ruled out) is allowed."""
    values = _as_array(label_log_prob, "label_log_prob")
    if len(values) != length:
        raise FirstTrlError(f"label_log_prob has {len(values)} entries for {length} examples; pass one each.")
    _refuse(values > ROUNDING, values, "label_log_prob", "above 0; pass log-probabilities in nats")
    return values.clip(max=0)


def _bin_edges(confidence: np.ndarray, num_bins: int, binning: str) -> np.ndarray:
    """(M + 1,) bin edges: equal width over [0, 1], or quantiles of the confidences."""
    if isinstance(num_bins, bool) or not isinstance(num_bins, int | np.integer) or num_bins < 1:
        raise FirstTrlError(f"num_bins is {num_bins!r}; it must be a whole number of at least 1.")
    fractions = np.arange(num_bins + 1) / num_bins  # not linspace: 3 / 10 is the float that people write as 0.3
    if binning == "uniform":
        return fractions
    if binning == "equal_mass":
        return np.quantile(confidence, fractions)
    raise FirstTrlError(f"binning is {binning!r}; choose 'uniform' or 'equal_mass'.")


def bin_indices(confidence: np.ndarray, num_bins: int = 10, binning: str = "uniform") -> np.ndarray:
    """(n,) index in 0..M-1 of each confidence's bin (lower, upper]; confidence 0 goes to the first bin."""
    return np.searchsorted(_bin_edges(confidence, num_bins, binning)[1:-1], confidence, side="left")


def reliability_bins(confidence: Any, correct: Any, num_bins: int = 10, binning: str = "uniform") -> ReliabilityBins:
    """The bins that the reliability diagram draws and that the calibration error sums.

    Args: `confidence` (n,) in [0, 1]; `correct` (n,) true or false; `binning` "uniform" (equal width) or "equal_mass"
    (edges at quantiles; equal confidences stay in one bin). Bins are (lower, upper], confidence 0 goes to the first.
    """
    confidence, correct = _check(confidence, correct)
    edges = _bin_edges(confidence, num_bins, binning)
    index = bin_indices(confidence, num_bins, binning)
    count = np.bincount(index, minlength=num_bins)
    sums = [np.bincount(index, weights=values, minlength=num_bins) for values in (confidence, correct)]
    means = [np.divide(total, count, out=np.full(num_bins, np.nan), where=count > 0) for total in sums]
    return ReliabilityBins(lower=edges[:-1], upper=edges[1:], count=count, confidence=means[0], accuracy=means[1])


def expected_calibration_error(confidence: Any, correct: Any, num_bins: int = 10, binning: str = "uniform") -> float:
    """ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|, in [0, 1] (the paper, section 2.1; Guo et al. 2017).

    On a finite sample it is biased upwards: a perfectly calibrated model of 1,000 examples still shows about 0.02.
    """
    bins = reliability_bins(confidence, correct, num_bins, binning)
    return float(np.nansum(bins.count * np.abs(bins.accuracy - bins.confidence)) / bins.count.sum())


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def percent(share: float) -> str:
    """A share as people read it: `0.714` -> `71.4 %`."""
    return f"{100 * share:.1f} %"


def trust_score(confidence: Any, correct: Any, num_bins: int = 10) -> float:
    """Accuracy - ECE, in [-1, 1].

    The paper gives no formula for its trust score in any copy that we could read; this is our reading of it.
    """
    _, checked = _check(confidence, correct)
    return float(checked.mean()) - expected_calibration_error(confidence, correct, num_bins)


def negative_log_likelihood(label_log_prob: Any) -> float:
    """Mean of -log p(label), in nats; infinite if any label was ruled out (log-probability -inf)."""
    return float(-_check_log_prob(label_log_prob, len(label_log_prob)).mean())


def ece_noise_floor(confidence: Any, num_bins: int = 10, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """The ECE that perfect calibration would show with these confidences, by chance alone.

    Returns {"mean", "p95"}: an ECE below "p95" cannot be told from perfect calibration with this many examples (a
    consistency test, Broecker and Smith 2007, with normal gaps in the bins).
    """
    confidence, _ = _check(confidence, np.zeros(np.shape(confidence)))
    variance = np.bincount(bin_indices(confidence, num_bins), confidence * (1 - confidence), minlength=num_bins)
    noise = np.random.default_rng(seed).standard_normal((draws, num_bins))
    errors = np.abs(noise * np.sqrt(variance)).sum(1) / len(confidence)
    return {"mean": float(errors.mean()), "p95": float(np.percentile(errors, 95))}


def brier_score(confidence: Any, correct: Any) -> float:
    """Mean of (confidence - correct)^2, in [0, 1]: the Brier score of the stated confidence, not of the whole row."""
    confidence, correct = _check(confidence, correct)
    return float(((confidence - correct) ** 2).mean())


class _Groups:
    """Examples grouped by equal confidence, most confident first, so that bootstrap weights can be summed by group."""

    def __init__(self, confidence: np.ndarray, correct: np.ndarray):
        self.order = np.argsort(-confidence, kind="stable")
        ordered = confidence[self.order]
        self.starts = np.flatnonzero(np.r_[True, np.diff(ordered) != 0])
        self.threshold = ordered[self.starts]
        self.error = 1 - correct[self.order]

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, n) weights -> weight and weighted errors of each group, both (B, G)."""
        weights = weights[:, self.order]
        return (
            np.add.reduceat(weights, self.starts, axis=1),
            np.add.reduceat(weights * self.error, self.starts, axis=1),
        )


def _auroc(size: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(B, G) sizes and errors -> (B,) Mann-Whitney AUROC, a tie is half a win; NaN where one class is missing."""
    right = size - errors
    errors_above = errors.cumsum(1) - errors
    pairs = right.sum(1) * errors.sum(1)
    losses = (right * (errors_above + errors / 2)).sum(1)
    return 1 - np.divide(losses, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _aurc(size: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(B, G) -> (B,) mean over k = 1..n of the expected error rate of the k most confident examples.

    Within a group of m ties with e errors, after k examples with E errors, it is (E + e j / m) / (k + j) at k + j. Its
    sum over j = 1..m has a closed form in the harmonic numbers H: E dH + e / m (m - k dH), dH = H(k + m) - H(k).
    """
    before = (size.cumsum(1) - size).astype(np.int64)
    total = size.sum(1)
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, int(total.max()) + 1))]
    step = harmonic[before + size.astype(np.int64)] - harmonic[before]
    rate = np.divide(errors, size, out=np.zeros_like(size), where=size > 0)
    return ((errors.cumsum(1) - errors) * step + rate * (size - before * step)).sum(1) / total


def _accuracy_at_coverage(size: np.ndarray, errors: np.ndarray, coverage: float) -> np.ndarray:
    """(B, G) -> (B,) expected accuracy of the ceil(coverage n) most confident examples."""
    total = size[0].sum()
    kept = np.ceil(coverage * total - 1e-9)  # 0.95 * 20 is 19.000000000000004 for some coverages: stay on 19
    reached = size.cumsum(1)
    last = (reached >= kept).argmax(1)[:, None]
    last_size, last_errors, errors_reached, reached = (
        np.take_along_axis(table, last, 1)[:, 0] for table in (size, errors, errors.cumsum(1), reached)
    )
    surplus = reached - kept  # examples of the last group beyond the coverage: they err at the group's rate
    return 1 - (errors_reached - last_errors * surplus / last_size) / kept


def _groups_once(confidence: Any, correct: Any) -> tuple[_Groups, np.ndarray, np.ndarray]:
    """The groups of one sample, with their sizes and errors (1, G)."""
    confidence, correct = _check(confidence, correct)
    groups = _Groups(confidence, correct)
    return groups, *groups.sums(np.ones((1, len(confidence))))


def auroc(confidence: Any, correct: Any) -> float:
    """Probability that a right answer has more confidence than a wrong one (a tie is half); NaN without both."""
    _, size, errors = _groups_once(confidence, correct)
    return float(_auroc(size, errors)[0])


def aurc(confidence: Any, correct: Any) -> float:
    """Area under the risk-coverage curve in [0, 1]: the error rate of the k most confident, averaged over k = 1..n."""
    _, size, errors = _groups_once(confidence, correct)
    return float(_aurc(size, errors)[0])


def accuracy_at_coverage(confidence: Any, correct: Any, coverage: float) -> float:
    """Accuracy of the most confident share `coverage` of the examples (rounded up), in expectation over ties."""
    if not 0 < coverage <= 1:
        raise FirstTrlError(f"coverage is {coverage!r}; it must be in (0, 1], the share of examples answered.")
    _, size, errors = _groups_once(confidence, correct)
    return float(_accuracy_at_coverage(size, errors, coverage)[0])


def risk_coverage_curve(confidence: Any, correct: Any) -> RiskCoverage:
    """Error rate among the answered examples against the share answered, one point per distinct confidence."""
    groups, size, errors = _groups_once(confidence, correct)
    answered = size[0].cumsum()
    return RiskCoverage(groups.threshold, answered / answered[-1], errors[0].cumsum() / answered)


class _Sample:
    """One student's predictions on one set, ready to be measured under many weights at once.

    With `example` the n predictions are tokens of U answers, which are resampled whole because the tokens of an answer
    are not independent; ranks (AUROC, AURC, accuracy at coverage) then have no intervals. Otherwise U = n.
    """

    def __init__(self, values: dict, num_bins: int):
        self.confidence, self.correct = confidence, correct = _check(values["confidence"], values["correct"])
        log_prob = values.get("label_log_prob")
        self.label_log_prob = None if log_prob is None else _check_log_prob(log_prob, len(confidence))
        example = values.get("example")
        self.example = None if example is None else np.unique(np.asarray(example), return_inverse=True)[1]
        self.groups = _Groups(confidence, correct)
        self.count = self._by_unit(np.ones(len(confidence)))
        self.size = len(self.count)
        self.sums = {"accuracy": self._by_unit(correct), "brier": self._by_unit((confidence - correct) ** 2)}
        if self.label_log_prob is not None and np.isfinite(self.label_log_prob).all():
            self.sums["nll"] = self._by_unit(-self.label_log_prob)
        # (U, M): correct - confidence summed in the column of its bin; ECE = sum_m |column sum| / n
        gap, kinds = correct - confidence, {"ece": (num_bins, "uniform"), "ece_15_bins": (15, "uniform")}
        kinds["ece_equal_mass"] = num_bins, "equal_mass"
        self.gaps = {name: self._by_unit(gap, *kind) for name, kind in kinds.items()}
        self.variance = self._by_unit(confidence * (1 - confidence), num_bins, "uniform")

    def _by_unit(self, values: np.ndarray, bins: int | None = None, binning: str = "uniform") -> np.ndarray:
        """Sums of (n,) values over each of the U units: (U,), or (U, bins), each value in the column of its bin."""
        index = 0 if bins is None else bin_indices(self.confidence, bins, binning)
        unit = np.arange(len(values)) if self.example is None else self.example
        width, units = bins or 1, int(unit.max()) + 1
        table = np.bincount(unit * width + index, values, minlength=units * width)
        return table if bins is None else table.reshape(units, width)

    def measure(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """(B, U) whole weights, or None for 1 everywhere -> {metric: (B,)}."""
        is_point, weights = weights is None, np.ones((1, self.size)) if weights is None else weights
        total = weights @ self.count
        result = {name: weights @ sums / total for name, sums in self.sums.items()}
        gaps = {name: weights @ gap / total[:, None] for name, gap in self.gaps.items()}
        result |= {name: np.abs(gap).sum(1) for name, gap in gaps.items()}
        result["ece_debiased"] = _debiased(gaps["ece"], np.sqrt(weights @ self.variance) / total[:, None])
        result["trust_score"] = result["accuracy"] - result["ece"]
        if self.example is None or is_point:
            size, errors = self.groups.sums(weights if self.example is None else np.ones((1, len(self.correct))))
            result |= {"auroc": _auroc(size, errors), "aurc": _aurc(size, errors)}
            for coverage in COVERAGES:
                result[f"accuracy_at_{coverage}"] = _accuracy_at_coverage(size, errors, coverage)
        return result


def _debiased(gaps: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(B, M) gaps of the bins and their standard deviations under perfect calibration -> (B,) an ECE without its bias.

    E|gap| is too large by sqrt(2 / pi) noise where the true gap is 0, and by nothing where it is far larger: this is
    subtracted, fading as exp(-2 (gap / noise)^2), exact at 0. Otherwise the blunter of two calibrated arms, which
    fills fewer bins, would seem the better one. For differences alone: it may be slightly negative.
    """
    ratio = np.divide(gaps, noise, out=np.zeros_like(gaps), where=noise > 0)
    return (np.abs(gaps) - np.sqrt(2 / np.pi * 5) * noise * np.exp(-2 * ratio**2)).sum(1)


def _resamples(size: int, bootstrap: int, seed: int):
    """Yield blocks (b, n) of bootstrap counts, `bootstrap` rows in all; each row sums to n."""
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK_SIZE // size)
    for start in range(0, bootstrap, rows):
        block = min(rows, bootstrap - start)
        drawn = generator.integers(size, size=(block, size)) + np.arange(block)[:, None] * size
        yield np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size).astype(np.float64)


def _interval(estimate: float, replicates: np.ndarray) -> list[float] | None:
    """95 % bootstrap interval, shifted so that its mean is the estimate.

    A resample repeats examples, which inflates a calibration error: the plain percentile interval of a well calibrated
    model lies above its own estimate. None where the metric is undefined.
    """
    replicates = replicates[~np.isnan(replicates)]
    if np.isnan(estimate) or not replicates.size:
        return None
    low, high = np.percentile(replicates, [2.5, 97.5]) - (replicates.mean() - estimate)
    return [float(low), float(high)]


def _measure(seeds: list[_Sample], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{metric: (B,)}: means over the seeds, on the same resampled examples."""
    measured = [sample.measure(weights) for sample in seeds]
    return {
        name: np.mean([one[name] for one in measured], axis=0)
        for name in measured[0]
        if all(name in one for one in measured)
    }


def _summary(seeds: list[_Sample], point: dict[str, float], replicates: dict, num_bins: int, seed: int) -> dict:
    """The dict that `summarize` describes."""
    floors = [ece_noise_floor(sample.confidence, num_bins, seed=seed) for sample in seeds]
    impossible = [np.isneginf(sample.label_log_prob).sum() for sample in seeds if sample.label_log_prob is not None]
    result: dict[str, Any] = {"num_examples": seeds[0].size}
    if seeds[0].example is not None:
        result["num_tokens"] = len(seeds[0].confidence)
    result |= {name: _number(point.get(name, np.nan)) for name in REPORTED}
    if len(seeds) > 1:
        points = [{name: values[0] for name, values in sample.measure().items()} for sample in seeds]
        columns = {name: [one.get(name, np.nan) for one in points] for name in REPORTED}
        result["seeds"] = {
            name: {"values": [_number(value) for value in values], "spread": _number(np.std(values, ddof=1))}
            for name, values in columns.items()
        }
    result["ece_noise_floor"] = {name: float(np.mean([floor[name] for floor in floors])) for name in floors[0]}
    result["num_impossible_labels"] = int(sum(impossible))
    result["accuracy_at_coverage"] = {str(coverage): point[f"accuracy_at_{coverage}"] for coverage in COVERAGES}
    result["ci"] = {}
    for name, values in replicates.items():
        interval = _interval(point[name], values)
        if interval is not None and name != "ece_debiased":
            lowest, highest = {"trust_score": (-1.0, 1.0), "nll": (0.0, np.inf)}.get(name, (0.0, 1.0))
            result["ci"][name] = [max(interval[0], lowest), min(interval[1], highest)]
    return result


def compare(
    arms: Mapping[str, dict | list[dict]], num_bins: int = 10, bootstrap: int = 1000, seed: int = 0
) -> tuple[dict[str, dict], dict[str, dict[str, dict]]]:
    """Summaries of all arms on one set, and the paired difference of every arm and every other.

    Args:
        arms: {name: {"confidence", "correct" and, optionally, "label_log_prob" and "example"}}, (n,) each, for the
            same examples in the same order; or a list of those, one per seed, whose means are taken. "example" numbers
            the answer that a token belongs to. All arms are measured on the same resamples.

    Returns:
        {arm: as `summarize`}, {arm: {other: as `paired_difference` of the two}}.
    """
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int | np.integer) or bootstrap < 0:
        raise FirstTrlError(f"bootstrap is {bootstrap!r}; it must be a number of replicates, 0 for no intervals.")
    listed = {arm: values if isinstance(values, list) else [values] for arm, values in arms.items()}
    samples = {arm: [_Sample(one, num_bins) for one in values] for arm, values in listed.items()}
    sizes = {arm: sample.size for arm, seeds in samples.items() for sample in seeds}
    if len({sample.size for seeds in samples.values() for sample in seeds}) > 1:
        raise FirstTrlError(f"the arms have different numbers of examples, {sizes}; compare them on the same ones.")
    points = {arm: {name: float(v[0]) for name, v in _measure(seeds).items()} for arm, seeds in samples.items()}
    blocks: dict[str, list[dict]] = {arm: [] for arm in samples}
    for weights in _resamples(next(iter(sizes.values())), bootstrap, seed):
        for arm, seeds in samples.items():
            blocks[arm].append(_measure(seeds, weights))
    drawn = {
        arm: {name: np.concatenate([block[name] for block in found]) for name in (found[0] if found else ())}
        for arm, found in blocks.items()
    }
    summaries = {arm: _summary(seeds, points[arm], drawn[arm], num_bins, seed) for arm, seeds in samples.items()}
    differences: dict[str, dict[str, dict]] = {arm: {} for arm in samples}
    for arm, other in itertools.permutations(samples, 2):
        differences[arm][other] = {
            name: {
                "difference": value - points[other][name],
                "interval": _interval(value - points[other][name], drawn[arm][name] - drawn[other][name])
                if name in drawn[arm]
                else None,
            }
            for name, value in points[arm].items()
            if name in points[other] and not np.isnan(value - points[other][name])
        }
    return summaries, differences


def summarize(
    confidence: Any,
    correct: Any,
    label_log_prob: Any | None,
    num_bins: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Every metric of one arm on one set, in the form of `report/metrics.json`: plain numbers, no NaN, no infinity.

    Args: `confidence`, `correct` (n,) as above; `label_log_prob` (n,) log-probability of the true label in nats, or
    None; `bootstrap` replicates for the 95 % intervals under "ci" (0 for none). "nll" is None where it is not known or
    infinite; "num_impossible_labels" counts the labels of log-probability -inf. "auroc" is None where it is undefined.
    """
    arm = {"confidence": confidence, "correct": correct, "label_log_prob": label_log_prob}
    return compare({"arm": arm}, num_bins, bootstrap, seed)[0]["arm"]


def paired_difference(
    first: dict, second: dict, num_bins: int = 10, bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """`first` - `second` of every metric, for two arms that answered the same examples in the same order.

    Args: as the arms of `compare`.
    Returns {metric: {"difference": float, "interval": [low, high] or None}}; one that contains 0 is noise.
    """
    return compare({"first": first, "second": second}, num_bins, bootstrap, seed)[1]["first"]["second"]

"""Numbers that say whether a stated confidence is true, each defined once.

Numpy only: it knows no model, no tokenizer and no file. Examples with the same confidence enter ranks (AUROC) and risk
curves together, so that a shuffled input gives the same numbers.

Legend: n examples, M bins, B bootstrap replicates, G groups of examples with the same confidence, U units to resample.
`confidence` is the probability of the predicted token or answer; arrays, lists and torch tensors are accepted.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .errors import FirstTrlError

COVERAGES = (0.8, 0.9, 0.95)
REPORTED = ("accuracy", "ece", "ece_15_bins", "ece_equal_mass", "trust_score", "nll", "brier", "auroc", "aurc")
RANGES = {"trust_score": (-1.0, 1.0), "nll": (0.0, np.inf)}  # of the others: 0 to 1
ROUNDING = 1e-5  # float32 probabilities may exceed 1 by a few units in the last place
BLOCK_SIZE = 4_000_000  # numbers in a block of bootstrap weights (float64: 32 MB), whatever n is


class ReliabilityBins(NamedTuple):
    """Columns of a reliability diagram, all of shape (M,). Empty bins have count 0 and NaN means."""

    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


class RiskCoverage(NamedTuple):
    """Risk-coverage curve (G,): confidence >= `threshold` answers the share `coverage`, and errs on `risk` of them."""

    threshold: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray


# What is accepted


def _as_array(values: Any, name: str, low: float, high: float, what: str, length: int | None = None) -> np.ndarray:
    """(n,) float64 in [low, high] from an array, a list or a tensor."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy knows no bfloat16
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise FirstTrlError(f"{name} has shape {array.shape}; it must have one dimension, one entry per example.")
    if length is not None and len(array) != length:
        raise FirstTrlError(f"{name} has {len(array)} entries for {length} examples; pass one each.")
    wrong = ~((array >= low - ROUNDING) & (array <= high + ROUNDING))  # NaN is neither
    if name == "correct":
        wrong |= array != array.round()
    if wrong.any():
        raise FirstTrlError(f"{name}[{wrong.argmax()}] is {array[wrong][0]}; it must be {what}.")
    return array.clip(low, high)


def _check(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as (n,) float64, confidence in [0, 1], correct in {0, 1}."""
    confidence = _as_array(confidence, "confidence", 0, 1, "a probability in [0, 1], no logit or log")
    correct = _as_array(correct, "correct", 0, 1, "true or false (1 or 0)", len(confidence))
    return confidence, correct


def _log_probs(label_log_prob: Any, length: int | None = None) -> np.ndarray:
    """(n,) float64 in nats; -inf (the label was ruled out) is allowed."""
    return _as_array(label_log_prob, "label_log_prob", -np.inf, 0, "a log-probability in nats, at most 0", length)


# Bins


def bin_edges(confidence: np.ndarray, num_bins: int = 10, binning: str = "uniform") -> np.ndarray:
    """(M + 1,) edges: equal width over [0, 1] ("uniform"), or quantiles of the confidences ("equal_mass")."""
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
    return np.searchsorted(bin_edges(confidence, num_bins, binning)[1:-1], confidence, side="left")


def reliability_bins(confidence: Any, correct: Any, num_bins: int = 10, binning: str = "uniform") -> ReliabilityBins:
    """The bins that the reliability diagram draws and that the calibration error sums.

    Args: `confidence` (n,) in [0, 1]; `correct` (n,) true or false; `binning` "uniform" (equal width) or "equal_mass"
    (edges at quantiles; equal confidences stay in one bin). Bins are (lower, upper], confidence 0 goes to the first.
    """
    confidence, correct = _check(confidence, correct)
    edges, index = bin_edges(confidence, num_bins, binning), bin_indices(confidence, num_bins, binning)
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


def trust_score(confidence: Any, correct: Any, num_bins: int = 10) -> float:
    """Accuracy - ECE, in [-1, 1].

    The paper gives no formula for its trust score in any copy that we could read; this is our reading of it.
    """
    _, checked = _check(confidence, correct)
    return float(checked.mean()) - expected_calibration_error(confidence, correct, num_bins)


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


def negative_log_likelihood(label_log_prob: Any) -> float:
    """Mean of -log p(label), in nats; infinite if any label was ruled out (log-probability -inf)."""
    return float(-_log_probs(label_log_prob).mean())


def brier_score(confidence: Any, correct: Any) -> float:
    """Mean of (confidence - correct)^2, in [0, 1]: the Brier score of the stated confidence, not of the whole row."""
    confidence, correct = _check(confidence, correct)
    return float(((confidence - correct) ** 2).mean())


def percent(share: float) -> str:
    """A share as people read it: `0.714` -> `71.4 %`."""
    return f"{100 * share:.1f} %"


# Ranks and risk


class _Groups:
    """Examples grouped by equal confidence, most confident first, so that bootstrap weights can be summed by group."""

    def __init__(self, confidence: np.ndarray, correct: np.ndarray):
        self.order = np.argsort(-confidence, kind="stable")
        ordered = confidence[self.order]
        self.starts = np.flatnonzero(np.r_[True, np.diff(ordered) != 0])
        self.threshold = ordered[self.starts]
        self.error = 1 - correct[self.order]

    def sums(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, n) weights, or None for 1 everywhere -> weight and weighted errors of each group, both (B, G)."""
        weights = np.ones((1, len(self.order))) if weights is None else weights[:, self.order]
        return tuple(np.add.reduceat(one, self.starts, axis=1) for one in (weights, weights * self.error))


def _rank_metrics(size: np.ndarray, errors: np.ndarray) -> dict[str, np.ndarray]:
    """(B, G) sizes and errors -> AUROC (Mann-Whitney, a tie is half a win), AURC, accuracy at `COVERAGES`, (B,)."""
    right, total, reached, errors_reached = size - errors, size.sum(1), size.cumsum(1), errors.cumsum(1)
    pairs = right.sum(1) * errors.sum(1)
    losses = (right * (errors_reached - errors / 2)).sum(1)
    result = {"auroc": 1 - np.divide(losses, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)}
    # AURC: the mean over k = 1..n of the expected error rate of the k most confident. Within a group of m ties with e
    # errors, after k examples with E errors, it is (E + e j / m) / (k + j) at k + j. Its sum over j = 1..m has a
    # closed form in the harmonic numbers H: E dH + e / m (m - k dH), where dH = H(k + m) - H(k).
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, int(total.max()) + 1))]
    before = (reached - size).astype(np.int64)
    step = harmonic[before + size.astype(np.int64)] - harmonic[before]
    rate = np.divide(errors, size, out=np.zeros_like(size), where=size > 0)
    result["aurc"] = ((errors_reached - errors) * step + rate * (size - before * step)).sum(1) / total
    for coverage in COVERAGES:  # of the ceil(coverage n) most confident; the last group errs at its rate
        kept = np.ceil(coverage * total[0] - 1e-9)  # 0.95 * 20 is 19.000000000000004 for some coverages: stay on 19
        last = (reached >= kept).argmax(1)[:, None]
        surplus, wrong = (np.take_along_axis(table, last, 1)[:, 0] for table in (reached - kept, errors_reached))
        wrong = wrong - surplus * np.take_along_axis(rate, last, 1)[:, 0]
        result[f"accuracy_at_{coverage}"] = 1 - wrong / kept
    return result


def aurc(confidence: Any, correct: Any) -> float:
    """Area under the risk-coverage curve in [0, 1]: the error rate of the k most confident, averaged over k = 1..n."""
    return float(_rank_metrics(*_Groups(*_check(confidence, correct)).sums())["aurc"][0])


def risk_coverage_curve(confidence: Any, correct: Any) -> RiskCoverage:
    """Error rate among the answered examples against the share answered, one point per distinct confidence."""
    groups = _Groups(*_check(confidence, correct))
    answered, wrong = (sums[0].cumsum() for sums in groups.sums())
    return RiskCoverage(groups.threshold, answered / answered[-1], wrong / answered)


# All of them, with intervals


class _Sample:
    """One student's predictions on one set, ready to be measured under many weights at once.

    With `example` the n predictions are tokens of U answers, which are resampled whole because the tokens of an answer
    are not independent; ranks (AUROC, AURC, accuracy at coverage) then have no intervals. Otherwise U = n.
    """

    def __init__(self, values: dict, num_bins: int):
        self.confidence, correct = confidence, correct = _check(values["confidence"], values["correct"])
        example = values.get("example", np.arange(len(confidence)))
        self.unit = np.unique(np.asarray(example), return_inverse=True)[1]
        self.has_units = "example" in values
        self.groups = _Groups(confidence, correct)
        self.count = self._by_unit(np.ones(len(confidence)))
        self.size, self.num_impossible = len(self.count), 0
        self.sums = {"accuracy": self._by_unit(correct), "brier": self._by_unit((confidence - correct) ** 2)}
        if values.get("label_log_prob") is not None:
            log_prob = _log_probs(values["label_log_prob"], len(confidence))
            self.num_impossible = int(np.isneginf(log_prob).sum())
            if not self.num_impossible:
                self.sums["nll"] = self._by_unit(-log_prob)
        # (U, M): correct - confidence summed in the column of its bin; ECE = sum_m |column sum| / n
        kinds = {
            "ece": (num_bins, "uniform"),
            "ece_15_bins": (15, "uniform"),
            "ece_equal_mass": (num_bins, "equal_mass"),
        }
        self.gaps = {name: self._by_unit(correct - confidence, *kind) for name, kind in kinds.items()}
        self.variance = self._by_unit(confidence * (1 - confidence), num_bins, "uniform")

    def _by_unit(self, values: np.ndarray, bins: int | None = None, binning: str = "uniform") -> np.ndarray:
        """Sums of (n,) values over each of the U units: (U,), or (U, bins), each value in the column of its bin."""
        index = 0 if bins is None else bin_indices(self.confidence, bins, binning)
        width, units = bins or 1, int(self.unit.max()) + 1
        table = np.bincount(self.unit * width + index, values, minlength=units * width)
        return table if bins is None else table.reshape(units, width)

    def measure(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """(B, U) whole weights, or None for 1 everywhere -> {metric: (B,)}."""
        ranked = weights is None or not self.has_units
        ranks = _rank_metrics(*self.groups.sums(weights)) if ranked else {}
        weights = np.ones((1, self.size)) if weights is None else weights
        total = weights @ self.count
        result = {name: weights @ sums / total for name, sums in self.sums.items()}
        gaps = {name: weights @ gap / total[:, None] for name, gap in self.gaps.items()}
        result |= {name: np.abs(gap).sum(1) for name, gap in gaps.items()}
        result["ece_debiased"] = _debiased(gaps["ece"], np.sqrt(weights @ self.variance) / total[:, None])
        return result | {"trust_score": result["accuracy"] - result["ece"]} | ranks


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


def _interval(estimate: float, replicates: np.ndarray | None) -> list[float] | None:
    """95 % bootstrap interval, shifted so that its mean is the estimate; None where the metric is undefined.

    A resample repeats examples, which inflates a calibration error: the plain percentile interval of a well calibrated
    model lies above its own estimate.
    """
    replicates = np.empty(0) if replicates is None else replicates[~np.isnan(replicates)]
    if np.isnan(estimate) or not replicates.size:
        return None
    low, high = np.percentile(replicates, [2.5, 97.5]) - (replicates.mean() - estimate)
    return [float(low), float(high)]


def _measure(seeds: list[_Sample], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{metric: (B,)}: means over the seeds, on the same resampled examples."""
    measured = [sample.measure(weights) for sample in seeds]
    shared = [name for name in measured[0] if all(name in one for one in measured)]
    return {name: np.mean([one[name] for one in measured], axis=0) for name in shared}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _summary(seeds: list[_Sample], point: dict[str, float], replicates: dict, num_bins: int, seed: int) -> dict:
    """The dict that `summarize` describes."""
    result: dict[str, Any] = {"num_examples": seeds[0].size}
    if seeds[0].has_units:
        result["num_tokens"] = len(seeds[0].confidence)
    result |= {name: _number(point.get(name, np.nan)) for name in REPORTED}
    if len(seeds) > 1:
        points = [{name: values[0] for name, values in sample.measure().items()} for sample in seeds]
        columns = {name: [one.get(name, np.nan) for one in points] for name in REPORTED}
        result["seeds"] = {
            name: {"values": [_number(value) for value in values], "spread": _number(np.std(values, ddof=1))}
            for name, values in columns.items()
        }
    floors = [ece_noise_floor(sample.confidence, num_bins, seed=seed) for sample in seeds]
    result["ece_noise_floor"] = {name: float(np.mean([floor[name] for floor in floors])) for name in floors[0]}
    result["num_impossible_labels"] = sum(sample.num_impossible for sample in seeds)
    result["accuracy_at_coverage"] = {str(coverage): point[f"accuracy_at_{coverage}"] for coverage in COVERAGES}
    intervals = {name: _interval(point[name], drawn) for name, drawn in replicates.items() if name != "ece_debiased"}
    result["ci"] = {
        name: [float(bound) for bound in np.clip(interval, *RANGES.get(name, (0.0, 1.0)))]
        for name, interval in intervals.items()
        if interval is not None
    }
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
    sizes = {sample.size: arm for arm, seeds in samples.items() for sample in seeds}
    if len(sizes) > 1:
        raise FirstTrlError(f"the arms have different numbers of examples, e.g. {sizes}; compare the same ones.")
    points = {arm: {name: float(v[0]) for name, v in _measure(seeds).items()} for arm, seeds in samples.items()}
    blocks: dict[str, list[dict]] = {arm: [] for arm in samples}
    for weights in _resamples(next(iter(sizes)), bootstrap, seed):
        for arm, seeds in samples.items():
            blocks[arm].append(_measure(seeds, weights))
    drawn = {
        arm: {name: np.concatenate([block[name] for block in found]) for name in (found[0] if found else ())}
        for arm, found in blocks.items()
    }
    differences: dict[str, dict[str, dict]] = {arm: {} for arm in samples}
    for arm, other in itertools.permutations(samples, 2):
        pair = differences[arm][other] = {}
        for name, value in points[arm].items():
            difference = value - points[other].get(name, np.nan)
            if not np.isnan(difference):
                replicates = drawn[arm][name] - drawn[other][name] if name in drawn[arm] else None
                pair[name] = {"difference": difference, "interval": _interval(difference, replicates)}
    summaries = {arm: _summary(seeds, points[arm], drawn[arm], num_bins, seed) for arm, seeds in samples.items()}
    return summaries, differences


def summarize(
    confidence: Any, correct: Any, label_log_prob: Any | None, num_bins: int = 10, bootstrap: int = 1000, seed: int = 0
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
    """`first` - `second` of every metric, for two arms (as those of `compare`) that answered the same examples.

    Returns {metric: {"difference": float, "interval": [low, high] or None}}; one that contains 0 is noise.
    """
    return compare({"first": first, "second": second}, num_bins, bootstrap, seed)[1]["first"]["second"]

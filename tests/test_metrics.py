import json
import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from first_trl.metrics import (
    aurc,
    brier_score,
    compare,
    ece_noise_floor,
    expected_calibration_error,
    negative_log_likelihood,
    paired_difference,
    reliability_bins,
    risk_coverage_curve,
    summarize,
    trust_score,
)
from first_trl.student import threshold_for_accuracy


def slow_ece(confidence, correct, num_bins):
    """The definition, looking at every bin (lower, upper]; confidence 0 belongs to the first."""
    error = 0.0
    for m in range(num_bins):
        inside = (m / num_bins < confidence) & (confidence <= (m + 1) / num_bins) | (m == 0) & (confidence == 0)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def random_cases(count):
    """(confidence, correct, num_bins): one example or many, edges of bins, exactly 0 and 1, ties, empty bins."""
    generator = np.random.default_rng(0)
    for case in range(count):
        size, num_bins = int(generator.choice([1, 2, 7, 60])), int(generator.choice([1, 5, 10, 15]))
        confidence = generator.random(size)
        if case % 4 == 1:
            confidence = generator.integers(num_bins + 1, size=size) / num_bins
        elif case % 4 == 2:
            confidence = generator.choice([0.0, 1.0, 0.3, 0.95], size=size)
        elif case % 4 == 3:
            confidence = 0.9 + confidence / 10
        yield confidence, generator.random(size) < confidence, num_bins


def test_calibration_error_bins_and_brier_agree_with_the_definition_and_scikit_learn():
    cases = 0
    for confidence, correct, num_bins in random_cases(400):
        ece = expected_calibration_error(confidence, correct, num_bins)
        assert ece == pytest.approx(slow_ece(confidence, correct, num_bins), abs=1e-9)
        on_edges = (np.abs(confidence * num_bins - np.rint(confidence * num_bins)) < 1e-9).any()
        for strategy, binning in (("uniform", "uniform"), ("quantile", "equal_mass")):
            bins = reliability_bins(confidence, correct, num_bins, binning)
            assert bins.count.sum() == len(confidence)
            if strategy == "uniform" and on_edges:
                continue  # its linspace edges are not the decimals
            accuracy, mean = calibration_curve(correct, confidence, n_bins=num_bins, strategy=strategy)
            np.testing.assert_allclose(bins.accuracy[bins.count > 0], accuracy, atol=1e-9)
            np.testing.assert_allclose(bins.confidence[bins.count > 0], mean, atol=1e-9)
        brier = sklearn_metrics.brier_score_loss(correct, confidence, pos_label=True)
        assert brier_score(confidence, correct) == pytest.approx(brier, abs=1e-9)
        cases += 1
    assert cases == 400


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_zero_to_the_first():
    bins = reliability_bins([0.0, 0.1, 0.3, 0.6, 0.7, 1.0], [1] * 6)
    assert bins.count.tolist() == [2, 0, 1, 0, 0, 1, 1, 0, 0, 1]
    assert (bins.lower[3], bins.upper[3]) == (0.3, 0.4)
    assert np.isnan(bins.accuracy[1]) and np.isnan(bins.confidence[1])


def test_equal_mass_bins_share_the_examples_and_do_not_depend_on_their_order():
    generator = np.random.default_rng(0)
    confidence = generator.random(1000)
    assert reliability_bins(confidence, confidence > 0.5, 10, "equal_mass").count.tolist() == [100] * 10
    confidence, correct = generator.choice([0.2, 0.5, 0.8], 100), generator.random(100) < 0.5
    order = generator.permutation(100)
    ece = partial(expected_calibration_error, binning="equal_mass")
    assert ece(confidence, correct) == pytest.approx(ece(confidence[order], correct[order]))


def test_known_values():
    assert expected_calibration_error([0.9] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.4)
    assert trust_score([0.9] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.1)
    assert expected_calibration_error([1.0000001, 1.0], [True, True]) == 0, "rounding above 1 is accepted"
    assert negative_log_likelihood(np.log([0.5, 0.25])) == pytest.approx(1.5 * math.log(2))
    assert math.isinf(negative_log_likelihood([-math.inf, -1.0]))
    curve = risk_coverage_curve([0.9, 0.9, 0.5, 0.2], [1, 0, 1, 0])
    assert curve.threshold.tolist() == [0.9, 0.5, 0.2]
    np.testing.assert_allclose(curve.coverage, [0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0.5, 1 / 3, 0.5])


def test_auroc_agrees_with_scikit_learn_with_ties_and_is_undefined_for_one_class():
    generator = np.random.default_rng(0)
    for _ in range(100):
        size = int(generator.integers(2, 60))
        confidence = generator.random(size).round(int(generator.integers(1, 4)))
        correct = generator.random(size) < 0.6
        auroc = summarize(confidence, correct, None, bootstrap=0)["auroc"]
        if correct.all() or not correct.any():
            assert auroc is None
        else:
            assert auroc == pytest.approx(sklearn_metrics.roc_auc_score(correct, confidence))


@pytest.mark.parametrize(("size", "digits", "shuffles"), [(20, 8, 1), (20, 1, 4000), (7, 0, 4000)])
def test_risk_and_accuracy_at_coverage_agree_with_the_average_over_orders_of_ties(size, digits, shuffles):
    generator = np.random.default_rng(0)
    confidence, correct = generator.random(size).round(digits), generator.random(size) < 0.6
    orders = [np.lexsort((generator.random(size), -confidence)) for _ in range(shuffles)]
    risks = np.mean([np.cumsum(~correct[order]) / np.arange(1, size + 1) for order in orders], axis=0)
    tolerance = 1e-9 if shuffles == 1 else 0.02
    assert aurc(confidence, correct) == pytest.approx(risks.mean(), abs=tolerance)
    for coverage, accuracy in summarize(confidence, correct, None, bootstrap=0)["accuracy_at_coverage"].items():
        kept = math.ceil(round(float(coverage) * size, 6))
        assert accuracy == pytest.approx(1 - risks[kept - 1], abs=tolerance)


# Thresholds


def test_the_threshold_for_an_accuracy_answers_as_many_as_possible():
    confidence, correct = [0.99, 0.9, 0.8, 0.7, 0.6], [0, 1, 1, 1, 0]
    for target, threshold in ((0.75, 0.7), (0.6, 0.6), (0.9, None)):
        assert threshold_for_accuracy(confidence, correct, target) == threshold
    assert threshold_for_accuracy(confidence, [1] * 5, 1) == 0.6


def test_with_slack_a_threshold_does_not_rest_on_the_luck_of_a_few():
    lucky = np.r_[np.full(5, 0.99), np.full(100, 0.5)], np.r_[np.ones(5), np.zeros(50), np.ones(50)]
    assert threshold_for_accuracy(*lucky, 0.9) == 0.99 and threshold_for_accuracy(*lucky, 0.9, slack=0.02) is None
    many = np.r_[np.full(500, 0.99), np.full(100, 0.5)], np.r_[np.ones(455), np.zeros(95), np.ones(50)]
    assert threshold_for_accuracy(*many, 0.9, slack=0.02) == 0.99  # 91 % of 500: at least 89 %, with 90 % certainty
    generator, broken = np.random.default_rng(0), {None: 0, 0.02: 0}
    for _ in range(100):
        confidence = generator.random(1500)
        correct = generator.random(1500) < 0.4 + 0.45 * confidence  # at most 85 % right, however sure
        for slack in broken:
            broken[slack] += threshold_for_accuracy(confidence, correct, 0.9, slack) is not None
    assert broken[0.02] < 25 and broken[None] > 80


def test_a_threshold_fitted_on_validation_holds_on_test():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, (2, 4000))
    correct = generator.random((2, 4000)) < confidence
    answered = confidence[1] >= threshold_for_accuracy(confidence[0], correct[0], 0.9)
    assert 0.3 < answered.mean() < 0.6 and correct[1][answered].mean() > 0.88


# Input


HALF, BRAIN = (partial(torch.tensor, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))


@pytest.mark.parametrize("convert", [list, np.array, HALF, BRAIN, partial(torch.tensor, requires_grad=True)])
def test_lists_arrays_and_tensors_of_any_precision_give_the_same_numbers(convert):
    correct = [True, False, True, False]
    assert expected_calibration_error(convert([0.75, 0.5, 1.0, 0.25]), correct) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], r"confidence has shape \(0,\)"),
        ([0.5, float("nan")], [1, 1], r"confidence\[1\] is nan"),
        ([0.5, 1.2], [1, 1], r"confidence\[1\] is 1.2; it must be a probability"),
        ([-3.0], [1], r"confidence\[0\] is -3.0"),
        ([0.5], [1, 0], "correct has 2 entries for 1 examples"),
        ([0.5], [2], r"correct\[0\] is 2.0; it must be true or false"),
        ([0.5], [0.5], r"correct\[0\] is 0.5; it must be true or false"),
        ([[0.5]], [1], r"confidence has shape \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("metric", [reliability_bins, trust_score, partial(summarize, label_log_prob=None)])
def test_bad_input_is_named(metric, confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        metric(confidence, correct)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error([0.5], [1], num_bins=0), "num_bins is 0"),
        (lambda: expected_calibration_error([0.5], [1], num_bins=2.5), "num_bins is 2.5"),
        (lambda: expected_calibration_error([0.5], [1], binning="quantile"), "'uniform' or 'equal_mass'"),
        (lambda: threshold_for_accuracy([0.5], [1], 90), "target_accuracy is 90"),
        (lambda: summarize([0.5], [1], [0.5]), r"label_log_prob\[0\] is 0.5.*nats"),
        (lambda: summarize([0.5], [1], [-1, -1]), "2 entries for 1 examples"),
        (lambda: summarize([0.5], [1], None, bootstrap=-1), "bootstrap is -1"),
        (
            lambda: compare({"a": arm([0.5], [1], [0]), "b": arm([0.5] * 2, [1] * 2, [0] * 2)}),
            "different numbers of exam",
        ),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Summaries, intervals, differences


def sample(size, overconfidence=1.0, seed=0):
    generator = np.random.default_rng(seed)
    truth = generator.uniform(0.4, 1, size)
    correct = generator.random(size) < truth
    confidence = truth ** (1 / overconfidence)
    return confidence, correct, np.log(np.where(correct, confidence, 1 - confidence))


def arm(*values):
    return dict(zip(("confidence", "correct", "label_log_prob"), values, strict=True))


def test_the_summary_repeats_the_single_metrics_and_is_plain_json():
    confidence, correct, log_prob = sample(500, 2)
    summary = summarize(confidence, correct, log_prob, bootstrap=50)
    for name, value in {
        "num_examples": 500,
        "accuracy": correct.mean(),
        "ece": expected_calibration_error(confidence, correct),
        "ece_15_bins": expected_calibration_error(confidence, correct, 15),
        "ece_equal_mass": expected_calibration_error(confidence, correct, 10, "equal_mass"),
        "trust_score": trust_score(confidence, correct),
        "nll": negative_log_likelihood(log_prob),
        "brier": brier_score(confidence, correct),
        "aurc": aurc(confidence, correct),
    }.items():
        assert summary[name] == pytest.approx(value), name
    for name, (low, high) in summary["ci"].items():
        value = summary.get(name, summary["accuracy_at_coverage"].get(name.removeprefix("accuracy_at_")))
        assert low <= value <= high, name
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_summary_of_extreme_samples_is_plain_json():
    everything_right = summarize([1.0], [1], [0.0], bootstrap=20)
    assert everything_right["auroc"] is None and everything_right["ece"] == 0 and everything_right["nll"] == 0
    ruled_out = summarize([0.9, 0.8], [1, 0], [-0.1, -math.inf], bootstrap=20)
    assert ruled_out["nll"] is None and ruled_out["num_impossible_labels"] == 1
    assert summarize([0.9], [1], None, bootstrap=0)["ci"] == {}
    json.dumps([everything_right, ruled_out], allow_nan=False)


def test_bootstrap_replicates_are_the_metrics_of_the_resampled_examples():
    confidence, correct, log_prob = sample(80, 2)
    confidence = confidence.round(1)
    summary = summarize(confidence, correct, log_prob, bootstrap=40, seed=5)
    drawn = np.random.default_rng(5).integers(80, size=(40, 80))
    for name in ("accuracy", "ece", "trust_score", "brier", "auroc", "aurc"):
        points = [summarize(confidence[i], correct[i], None, bootstrap=0)[name] for i in [np.arange(80), *drawn]]
        expected = np.percentile(points[1:], [2.5, 97.5]) - np.mean(points[1:]) + points[0]
        assert summary["ci"][name] == pytest.approx(expected.clip(-1 if name == "trust_score" else 0, 1)), name


def test_intervals_cover_the_truth_as_often_as_they_say():
    seeds = range(100)
    found = [summarize(*sample(200, seed=seed), bootstrap=200, seed=seed)["ci"]["accuracy"] for seed in seeds]
    assert 88 <= sum(low <= 0.7 <= high for low, high in found) <= 99
    truth = expected_calibration_error(*sample(400_000, 2)[:2])
    found = [summarize(*sample(500, 2, seed=seed), bootstrap=200, seed=seed)["ci"]["ece"] for seed in seeds]
    assert sum(low <= truth <= high for low, high in found) >= 88


def test_the_noise_floor_tells_calibrated_from_overconfident():
    below = 0
    for seed in range(40):
        calibrated, overconfident = sample(500, 1, seed), sample(500, 2, seed)
        below += expected_calibration_error(*calibrated[:2]) <= ece_noise_floor(calibrated[0])["p95"]
        assert expected_calibration_error(*overconfident[:2]) > ece_noise_floor(overconfident[0])["p95"]
    assert below >= 34


def test_a_paired_difference_is_tighter_than_two_intervals_and_antisymmetric():
    arms = [arm(*sample(1000, sharpness)) for sharpness in (1.0, 2.0)]
    forward, backward = paired_difference(*arms, bootstrap=300), paired_difference(*arms[::-1], bootstrap=300)
    assert forward["ece"]["difference"] < -0.05 and forward["ece"]["interval"][1] < 0
    assert backward["ece"]["difference"] == pytest.approx(-forward["ece"]["difference"])
    assert forward["accuracy"] == {"difference": 0, "interval": [0, 0]}
    widths = [np.diff(summarize(**one, bootstrap=300)["ci"]["brier"])[0] for one in arms]
    assert np.diff(forward["brier"]["interval"])[0] < sum(widths)
    result = paired_difference(
        arm([0.9, 0.8], [1, 1], [-math.inf, -1]), arm([0.9, 0.8], [1, 0], [-1, -1]), bootstrap=0
    )
    assert result.keys().isdisjoint({"nll", "auroc"}), "undefined in one of the two"
    assert result["accuracy"] == {"difference": 0.5, "interval": None}


@pytest.mark.parametrize(("size", "over"), [(500, 0.0), (2000, 0.0), (2000, 0.1)])
def test_two_arms_of_equal_calibration_and_unequal_sharpness_are_rarely_called_different(size, over):
    generator, called, draws = np.random.default_rng(0), 0, 80
    for _ in range(draws):
        arms = [
            {"confidence": stated, "correct": generator.random(size) < stated - over, "example": np.arange(size)}
            for stated in (generator.uniform(0.4, 1, size), np.full(size, 0.7))
        ]
        low, high = paired_difference(*arms, bootstrap=100)["ece_debiased"]["interval"]
        called += low > 0 or high < 0
    assert called <= (0.05 if over == 0 else 0.1) * draws


def test_tokens_of_one_answer_are_resampled_together():
    generator = np.random.default_rng(0)
    answers = generator.uniform(0.3, 1, 300)  # 20 tokens an answer, all right or all wrong
    tokens = {"confidence": np.repeat(answers, 20), "correct": np.repeat(generator.random(300) < answers, 20)}
    whole = compare({"a": tokens | {"example": np.repeat(np.arange(300), 20)}}, bootstrap=200)[0]["a"]
    naive = compare({"a": tokens}, bootstrap=200)[0]["a"]
    assert (whole["num_examples"], whole["num_tokens"], naive["num_examples"]) == (300, 6000, 6000)
    for name in ("accuracy", "ece", "brier", "auroc", "aurc"):
        assert whole[name] == pytest.approx(naive[name])
    width, narrow = (np.diff(one["ci"]["accuracy"])[0] for one in (whole, naive))
    assert 3.5 < width / narrow < 5.5  # sqrt(20)
    assert "auroc" not in whole["ci"] and "auroc" in naive["ci"]


def test_an_arm_of_several_seeds_is_measured_by_the_mean_of_its_seeds_and_their_spread():
    seeds = [arm(*sample(400, 2, seed)) for seed in range(3)]
    other = arm(*sample(400, 1, 9))
    summaries, differences = compare({"arm": seeds, "other": other}, bootstrap=200)
    alone = [summarize(**seed, bootstrap=0) for seed in seeds]
    for name in ("accuracy", "ece", "trust_score", "nll", "brier", "auroc", "aurc"):
        values, found = [one[name] for one in alone], summaries["arm"]["seeds"][name]
        assert summaries["arm"][name] == pytest.approx(np.mean(values))
        assert found["values"] == pytest.approx(values) and found["spread"] == pytest.approx(np.std(values, ddof=1))
    low, high = summaries["arm"]["ci"]["ece"]
    assert low < summaries["arm"]["ece"] < high
    gap = np.mean([one["ece"] for one in alone]) - summaries["other"]["ece"]
    assert differences["arm"]["other"]["ece"]["difference"] == pytest.approx(gap)
    assert "seeds" not in summaries["other"] and json.dumps(summaries, allow_nan=False)
    assert compare({"arm": seeds[:1]}, bootstrap=0)[0]["arm"] == alone[0]


def test_a_thousand_replicates_of_three_thousand_examples_take_two_seconds():
    values, start = sample(3000), time.process_time()
    summarize(*values, bootstrap=1000)
    assert time.process_time() - start < 2

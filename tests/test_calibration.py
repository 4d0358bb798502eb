import json
import math
import time

import numpy as np
import pytest
import torch

from first_trl.calibration import METHODS, error_curve, recalibrate, search
from first_trl.metrics import expected_calibration_error

# A value that each family accepts on the rows below.
VALUES = {"temperature": 2.5, "probability": 0.3, "label_smoothing": 0.05, "none": None}


def make_rows(size, num_kept=5, seed=0, dtype=torch.float32, scale=2.5):
    """Rows sorted by probability, with a tail of about 2 %."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(size, num_kept, generator=generator, dtype=torch.float64) * scale).sort(descending=True)[0]
    tail = torch.sigmoid(torch.randn(size, 1, generator=generator, dtype=torch.float64) - 4)
    return torch.cat([torch.log_softmax(logits, -1) + torch.log1p(-tail), tail.log()], dim=1).to(dtype)


def plant(size, temperature, seed=0, **kwargs):
    """An over- or under-confident teacher and labels: recalibrating by `temperature` gives the true probabilities."""
    true = make_rows(size, seed=seed, **kwargs)
    target = torch.multinomial(true.exp(), 1, generator=torch.Generator().manual_seed(seed + 1))[:, 0]
    return recalibrate(true, "temperature", 1 / temperature), target


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("num_kept", [2, 5, 17])
def test_recalibrated_rows_sum_to_one(method, num_kept):
    rows = recalibrate(make_rows(200, num_kept), method, VALUES[method])
    assert rows.shape == (200, num_kept + 1)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(200))


def test_the_neutral_values_are_identities():
    rows = make_rows(200)
    for method, value in (("temperature", 1), ("label_smoothing", 0), ("none", None), ("none", 7)):
        torch.testing.assert_close(recalibrate(rows, method, value), rows, msg=method)


@pytest.mark.parametrize("method,value", [("temperature", 0.3), ("temperature", 9.0), ("probability", 0.2)])
def test_ranking_is_kept(method, value):
    rows = recalibrate(make_rows(500, dtype=torch.float64), method, value)[:, :-1]
    assert (rows.diff(dim=1) <= 0).all()


def test_temperature_follows_its_formula_and_leaves_the_tail_alone():
    rows = make_rows(50, dtype=torch.float64)
    t, tail = rows[:, :-1].exp(), rows[:, -1:].exp()
    power = t ** (1 / 1.7)
    expected = torch.cat([(1 - tail) * power / power.sum(1, keepdim=True), tail], 1)
    torch.testing.assert_close(recalibrate(rows, "temperature", 1.7).exp(), expected)


def test_temperature_is_exact_for_tails_near_nothing_and_near_everything():
    for tail in (1e-30, 1e-8, 1 - 1e-6):
        rows = torch.log(torch.tensor([[0.75 * (1 - tail), 0.25 * (1 - tail), tail]], dtype=torch.float64)).float()
        result = recalibrate(rows, "temperature", 2.0)[0, :2].double()
        kept = torch.tensor([3**0.5, 1.0], dtype=torch.float64) / (3**0.5 + 1) * (1 - tail)
        torch.testing.assert_close(result.exp(), kept, rtol=2e-2 if tail > 0.5 else 1e-6, atol=0)


def test_probability_reproduces_the_caps_of_the_papers_map():
    certain = torch.tensor([[1.0, 0, 0, 0, 0, 0]]).log()
    assert recalibrate(certain, "probability", 0.3)[0, 0].exp().item() == pytest.approx(0.875, abs=5e-4)
    assert recalibrate(certain, "probability", 1.0)[0, 0].exp().item() == pytest.approx(0.405, abs=5e-4)


def test_probability_is_a_softmax_over_probabilities_and_empties_the_tail():
    rows = make_rows(50, dtype=torch.float64)
    result = recalibrate(rows, "probability", 0.4)
    torch.testing.assert_close(result[:, :-1].exp(), torch.softmax(rows[:, :-1].exp() / 0.4, -1))
    assert torch.isneginf(result[:, -1]).all()


def test_label_smoothing_works_in_probability_space():
    rows = torch.tensor([[0.99, 0.004, 0.003, 0.002, 0.0005, 0.0005]]).log()
    result = recalibrate(rows, "label_smoothing", 0.1)[0].exp()
    expected = torch.tensor([0.89, 0.029, 0.028, 0.027, 0.0255, 0.0005])
    torch.testing.assert_close(result, expected)


def test_label_smoothing_beyond_the_first_probability_names_the_largest_allowed():
    rows = torch.tensor([[0.99, 0.005, 0.005], [0.5, 0.25, 0.25]]).log()
    with pytest.raises(ValueError, match=r"label smoothing of 0.6 .* largest .* allow is 0.5"):
        recalibrate(rows, "label_smoothing", 0.6)
    result = recalibrate(rows, "label_smoothing", 0.5)
    assert not result.isnan().any() and torch.isneginf(result[1, 0])


def test_the_search_offers_only_smoothing_that_the_rows_allow():
    rows = torch.tensor([[0.034, 0.033, 0.033, 0.9]]).log().repeat(100, 1)
    result = search(rows, torch.zeros(100, dtype=torch.long), "label_smoothing")
    assert [point["value"] for point in result.curve] == pytest.approx([0.005 * i for i in range(7)])


@pytest.mark.parametrize(
    "method,value,message",
    [
        ("temprature", 1.0, "'temprature'; choose one of temperature, probability"),
        ("temperature", 0.0, "is 0.0 for method 'temperature'; it must be above 0"),
        ("probability", -1, "above 0"),
        ("temperature", None, "None.*run the calibrate stage"),
        ("temperature", float("nan"), "nan"),
        ("temperature", True, "True"),
        ("label_smoothing", 1.5, r"1.5.*\[0, 1\]"),
    ],
)
def test_a_bad_method_or_value_is_named(method, value, message):
    with pytest.raises(ValueError, match=message):
        recalibrate(make_rows(3), method, value)


def test_rows_in_half_precision_come_back_in_float32():
    rows = make_rows(100)
    result = recalibrate(rows.half(), "temperature", 1.5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.exp(), recalibrate(rows, "temperature", 1.5).exp(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.0, 3.0])
def test_a_planted_temperature_is_recovered_within_two_percent_by_likelihood(planted):
    result = search(*plant(50_000, planted), criterion="nll")
    assert result.value == pytest.approx(planted, rel=0.02)
    assert result.nll_after <= result.nll_before + 1e-6


@pytest.mark.parametrize("planted", [0.5, 2.0, 3.0])
def test_a_planted_temperature_is_recovered_within_five_percent_by_calibration_error(planted):
    result = search(*plant(50_000, planted), criterion="ece")
    assert result.value == pytest.approx(planted, rel=0.05)
    assert result.ece_before > 0.1 and result.ece_after < 0.01


def test_the_recovered_value_makes_the_confidence_of_other_rows_true():
    value = search(*plant(20_000, 2.5)).value
    rows, target = plant(20_000, 2.5, seed=10)
    confidence, predicted = recalibrate(rows, "temperature", value)[:, :-1].exp().max(-1)
    assert expected_calibration_error(confidence, predicted == target) < 0.015


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("criterion", ["ece", "nll"])
def test_the_value_is_the_best_of_the_curve_and_agrees_with_recalibrate(method, criterion):
    rows, target = plant(3000, 2.0)
    result = search(rows, target, method, criterion, num_bins=7)
    confidence, predicted = recalibrate(rows, method, result.value)[:, :-1].exp().max(-1)
    assert result.ece_after == pytest.approx(expected_calibration_error(confidence, predicted == target, 7))
    assert result.value in [point["value"] for point in result.curve]
    if method not in ("probability", "none"):
        assert min(point[criterion] for point in result.curve) == pytest.approx(getattr(result, criterion + "_after"))
    if method != "none":
        values = [point["value"] for point in result.curve]
        assert values == sorted(set(values)) and len(values) > 15


def test_the_probability_grid_is_the_papers():
    values = [point["value"] for point in search(*plant(2000, 2.0), "probability").curve]
    assert {round(0.1 * i, 10) for i in range(1, 16)} <= {round(value, 10) for value in values}
    best = search(*plant(2000, 2.0), "probability").value
    assert any(abs(value - best) == pytest.approx(0.02) for value in values)


def test_a_perfect_teacher_is_left_alone_because_ties_go_to_the_identity():
    rows = torch.tensor([[1.0, 0.0, 0.0]]).log().repeat(50, 1)
    for method in ("temperature", "label_smoothing"):
        for criterion in ("ece", "nll"):
            result = search(rows, torch.zeros(50, dtype=torch.long), method, criterion)
            assert result.value == (1.0 if method == "temperature" else 0.0) and not result.at_edge


def test_a_value_at_the_end_of_the_range_is_marked():
    rows, _ = plant(2000, 1.0)
    assert search(rows, rows[:, :-1].argmax(-1), "temperature", "nll").at_edge


def test_probability_judges_likelihood_only_where_the_label_was_kept_and_reports_infinity():
    rows, target = plant(4000, 2.0)
    assert (target == 5).any()
    result = search(rows, target, "probability", "nll")
    inside = target != 5
    assert result.value == search(rows[inside], target[inside], "probability", "nll").value
    assert math.isinf(result.nll_after) and math.isfinite(result.nll_before)
    assert result.num_labels_in_tail == int((~inside).sum())
    assert result.to_dict()["nll_after"] is None
    with pytest.raises(ValueError, match="every label lies outside"):
        search(rows, torch.full_like(target, 5), "probability", "nll")


def test_the_entry_for_calibration_json_is_plain_json():
    for method in VALUES:
        entry = search(*plant(500, 2.0), method, bootstrap=5).to_dict()
        assert json.loads(json.dumps(entry, allow_nan=False)) == entry
        assert {"value", "interval", "ece_before", "ece_after", "nll_before", "nll_after", "curve"} <= set(entry)
        assert set(entry["curve"][0]) == {"value", "ece", "nll"}


@pytest.mark.parametrize("method", ["temperature", "probability", "label_smoothing"])
@pytest.mark.parametrize("criterion", ["ece", "nll"])
def test_bootstrap_replicates_repeat_the_search_on_the_resampled_rows(method, criterion, monkeypatch):
    rows, target = plant(300, 2.0)
    result = search(rows, target, method, criterion, bootstrap=6, seed=3)
    generator = np.random.default_rng(3)
    values = []
    for _ in range(6):
        drawn = torch.from_numpy(generator.integers(300, size=300))
        values.append(search(rows[drawn], target[drawn], method, criterion).value)
    # Label smoothing of a resample may be allowed more, when the least certain row was not drawn.
    if method != "label_smoothing":
        assert result.interval == pytest.approx(list(np.percentile(values, [2.5, 97.5])))
    monkeypatch.setattr("first_trl.calibration.CHUNK", 70)
    assert search(rows, target, method, criterion, bootstrap=6, seed=3) == result


@pytest.mark.parametrize("groups", [250, 1000])
def test_random_groups_of_positions_give_the_interval_of_single_ones(groups, monkeypatch):
    rows, target = plant(4000, 2.0)
    exact = search(rows, target, criterion="nll", bootstrap=200).interval
    monkeypatch.setattr("first_trl.calibration.MOST_GROUPS", groups)
    low, high = search(rows, target, criterion="nll", bootstrap=200).interval
    assert 0.7 < (high - low) / (exact[1] - exact[0]) < 1.4 and abs(low - exact[0]) < 0.05


def test_resamples_draw_whole_examples_where_positions_have_them():
    rows, target = plant(500, 2.0)
    alone = search(rows, target, criterion="nll", bootstrap=200).interval
    rows, target = rows.repeat_interleave(8, 0), target.repeat_interleave(8, 0)  # eight tokens that say one thing
    examples = np.arange(500).repeat(8)
    assert search(rows, target, criterion="nll", bootstrap=200, examples=examples).interval == alone
    low, high = search(rows, target, criterion="nll", bootstrap=200).interval
    assert high - low < 0.6 * (alone[1] - alone[0])  # as if they were independent


@pytest.mark.parametrize(
    ("probs", "target", "method", "side"),
    [
        ([0.6, 0.2, 0.1, 0.05, 0.03, 0.02], 0, "temperature", "lowest"),
        ([0.6, 0.2, 0.1, 0.05, 0.03, 0.02], 4, "temperature", "highest"),
        ([0.6, 0.2, 0.1, 0.05, 0.03, 0.02], 0, "probability", "lowest"),
        ([0.6, 0.2, 0.1, 0.05, 0.03, 0.02], 0, "label_smoothing", None),  # no smoothing is no edge
    ],
)
def test_a_value_at_the_edge_of_its_grid_and_few_positions_are_said(probs, target, method, side):
    rows, targets = torch.tensor([probs]).log().repeat(200, 1), torch.full((200,), target)
    result = search(rows, targets, method, "nll")
    assert result.at_edge is (side is not None)
    assert [f"{method} {result.value:.3g} is the {side} value" in text for text in result.warnings()] == [True] * bool(
        side
    )
    (few,) = [text for text in search(rows[:99], targets[:99], method).warnings() if "validation positions" in text]
    assert few.startswith("99 validation positions") and "datasets.validation" in few


def test_smoothing_at_its_edge_is_allowed_of_the_rows_that_training_sees():
    exact = torch.distributions.Dirichlet(torch.ones(6)).sample((4000,)).sort(dim=1, descending=True).values
    exact = exact[exact[:, 0] < 0.24].log()
    for rows in exact.half().float().split(1):
        value = search(rows, torch.ones(1, dtype=torch.long), "label_smoothing", "nll").value
        for given in (rows, rows.log_softmax(dim=1)):  # as cached, and as training normalises them
            assert recalibrate(given, "label_smoothing", value).isfinite().any(dim=1).all()


def test_the_error_curve_of_the_searched_rows_is_the_searchs_own():
    rows, target = plant(1000, 2.0)
    curve = search(rows, target).to_dict()["curve"]
    assert error_curve(rows, target, "temperature", [point["value"] for point in curve]) == curve
    allowed = rows[:, 0].min().exp().item()
    curve = error_curve(rows, target, "label_smoothing", [0.0, 0.9 * allowed, 1.1 * allowed])
    assert [point["value"] for point in curve] == [0.0, 0.9 * allowed]


def test_the_interval_holds_the_planted_temperature():
    result = search(*plant(5000, 2.0), criterion="nll", bootstrap=100)
    assert result.interval[0] <= 2.0 <= result.interval[1]
    assert 0.02 < result.interval[1] - result.interval[0] < 0.5


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda rows, target: (rows.exp(), target), "sum to .*, not 1; pass log-probabilities"),
        (lambda rows, target: (rows.where(rows < 0, torch.nan) * torch.nan, target), "row 0 sum to nan"),
        (lambda rows, target: (rows, target + 4), "column numbers from 0 to 5"),
        (lambda rows, target: (rows, target - 9), "column numbers from 0 to 5"),
        (lambda rows, target: (rows, target[:-1]), r"\(10, 6\) and target \(9,\)"),
        (lambda rows, target: (rows[:0], target[:0]), "no position to calibrate on"),
        (lambda rows, target: (rows, target.float()), "column numbers"),
    ],
)
def test_rows_that_are_not_a_caches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        search(*change(make_rows(10), torch.arange(10) % 6))


def test_unknown_names_are_refused():
    rows, target = plant(10, 1.0)
    with pytest.raises(ValueError, match="'platt'; choose one of " + ", ".join(METHODS)):
        search(rows, target, "platt")
    with pytest.raises(ValueError, match="criterion is 'brier'; choose one of ece, nll"):
        search(rows, target, criterion="brier")


def test_a_hundred_thousand_positions_take_two_seconds_on_one_core():
    rows, target = plant(100_000, 2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        search(rows, target)
        middle = time.process_time()
        search(rows, target, bootstrap=200)
        end = time.process_time()
    finally:
        torch.set_num_threads(threads)
    assert middle - start < 2
    assert end - middle < 20

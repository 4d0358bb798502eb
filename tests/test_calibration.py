import json
import math
import time

import numpy as np
import pytest
import torch

from first_trl.calibration import FAMILIES, FOLDS, choose_family, error_curve, recalibrate, search
from first_trl.constants import RECALIBRATION_METHODS
from first_trl.metrics import expected_calibration_error

# A value that each family accepts on the rows below.
VALUES = {"temperature": 2.5, "probability": 0.3, "label_smoothing": 0.05, "none": None}
CHOICES = ["temperature", "probability"]


def make_rows(size, num_kept=5, seed=0, dtype=torch.float32, scale=2.5):
    """Rows sorted by probability, with a tail of about 2 %."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(size, num_kept, generator=generator, dtype=torch.float64) * scale).sort(descending=True)[0]
    tail = torch.sigmoid(torch.randn(size, 1, generator=generator, dtype=torch.float64) - 4)
    return torch.cat([torch.log_softmax(logits, -1) + torch.log1p(-tail), tail.log()], dim=1).to(dtype)


def draw(true, seed=0):
    return torch.multinomial(true.exp(), 1, generator=torch.Generator().manual_seed(seed + 1))[:, 0]


def plant(size, temperature, seed=0):
    """An over- or under-confident teacher and labels: recalibrating by `temperature` gives the true probabilities."""
    true = make_rows(size, seed=seed)
    return recalibrate(true, "temperature", 1 / temperature), draw(true, seed)


def plant_family(size, method, value):
    """Over-confident rows whose recalibration by (method, value) gives the true probabilities of the labels."""
    rows = recalibrate(make_rows(size), "temperature", 1 / 3)
    return rows, draw(recalibrate(rows, method, value))


# The maps


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("num_kept", [2, 5, 17])
def test_recalibrated_rows_sum_to_one_and_keep_their_ranking(method, num_kept):
    assert tuple(FAMILIES) == tuple(VALUES) == RECALIBRATION_METHODS
    rows = recalibrate(make_rows(200, num_kept), method, VALUES[method])
    assert rows.shape == (200, num_kept + 1)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(200))
    assert method == "label_smoothing" or (rows[:, :-1].diff(dim=1) <= 0).all()


def test_the_neutral_values_are_identities():
    rows = make_rows(200)
    for method, value in (("temperature", 1), ("label_smoothing", 0), ("none", None), ("none", 7)):
        torch.testing.assert_close(recalibrate(rows, method, value), rows, msg=method)


def test_temperature_follows_its_formula_and_leaves_the_tail_alone():
    rows = make_rows(50, dtype=torch.float64)
    t, tail = rows[:, :-1].exp(), rows[:, -1:].exp()
    power = t ** (1 / 1.7)
    expected = torch.cat([(1 - tail) * power / power.sum(1, keepdim=True), tail], 1)
    torch.testing.assert_close(recalibrate(rows, "temperature", 1.7).exp(), expected)
    half = recalibrate(rows.half(), "temperature", 1.7)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.exp(), expected.float(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("tail", [1e-30, 1e-8, 1 - 1e-6])
def test_temperature_is_exact_for_tails_near_nothing_and_near_everything(tail):
    rows = torch.log(torch.tensor([[0.75 * (1 - tail), 0.25 * (1 - tail), tail]], dtype=torch.float64)).float()
    result = recalibrate(rows, "temperature", 2.0)[0, :2].double()
    kept = torch.tensor([3**0.5, 1.0], dtype=torch.float64) / (3**0.5 + 1) * (1 - tail)
    torch.testing.assert_close(result.exp(), kept, rtol=2e-2 if tail > 0.5 else 1e-6, atol=0)


def test_probability_is_the_papers_map_with_its_caps():
    certain, rows = torch.tensor([[1.0, 0, 0, 0, 0, 0]]).log(), make_rows(50)
    assert recalibrate(certain, "probability", 0.3)[0, 0].exp().item() == pytest.approx(0.875, abs=5e-4)
    assert recalibrate(certain, "probability", 1.0)[0, 0].exp().item() == pytest.approx(0.405, abs=5e-4)
    result = recalibrate(rows, "probability", 0.3)
    torch.testing.assert_close(result[:, :-1].exp(), torch.softmax(rows[:, :-1].exp() / 0.3, -1))
    assert torch.isneginf(result[:, -1]).all()


def test_label_smoothing_works_in_probability_space_as_far_as_the_rows_allow():
    rows = torch.tensor([[0.99, 0.004, 0.003, 0.002, 0.0005, 0.0005]]).log()
    expected = torch.tensor([0.89, 0.029, 0.028, 0.027, 0.0255, 0.0005])
    torch.testing.assert_close(recalibrate(rows, "label_smoothing", 0.1)[0].exp(), expected)
    rows = torch.tensor([[0.99, 0.005, 0.005], [0.5, 0.25, 0.25]]).log()
    with pytest.raises(ValueError, match=r"label smoothing of 0.6 .* at most 0.5"):
        recalibrate(rows, "label_smoothing", 0.6)
    result = recalibrate(rows, "label_smoothing", 0.5)
    assert not result.isnan().any() and torch.isneginf(result[1, 0])


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("temprature", 1.0, "'temprature'; choose one of temperature, probability"),
        ("temperature", 0.0, "is 0.0 for method 'temperature'; give a number from .* calibrate stage"),
        ("probability", -1, "is -1"),
        ("temperature", None, "is None"),
        ("temperature", float("nan"), "is nan"),
        ("temperature", float("inf"), "is inf"),
        ("temperature", True, "is True"),
        ("label_smoothing", 1.5, "1.5 .* from 0 to 1"),
    ],
)
def test_a_bad_method_or_value_is_named(method, value, message):
    with pytest.raises(ValueError, match=message):
        recalibrate(make_rows(3), method, value)


# The search


@pytest.mark.parametrize(
    ("planted", "criterion", "within"),
    [(0.5, "nll", 0.02), (1.0, "nll", 0.02), (3.0, "nll", 0.02), (0.5, "ece", 0.05), (3.0, "ece", 0.05)],
)
def test_a_planted_temperature_is_recovered_and_true_on_other_rows(planted, criterion, within):
    result = search(*plant(50_000, planted), criterion=criterion)
    assert result.value == pytest.approx(planted, rel=within)
    assert result.nll_after <= result.nll_before + 1e-6 and result.ece_after < 0.01
    rows, target = plant(20_000, planted, seed=10)
    confidence, predicted = recalibrate(rows, "temperature", result.value)[:, :-1].exp().max(-1)
    assert expected_calibration_error(confidence, predicted == target) < 0.015


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("criterion", ["ece", "nll"])
def test_the_value_is_the_best_of_the_curve_and_agrees_with_recalibrate(method, criterion):
    rows, target = plant(3000, 2.0)
    result = search(rows, target, method, criterion, num_bins=7, bootstrap=5)
    confidence, predicted = recalibrate(rows, method, result.value)[:, :-1].exp().max(-1)
    assert result.ece_after == pytest.approx(expected_calibration_error(confidence, predicted == target, 7))
    values = [point["value"] for point in result.curve]
    assert result.value in values
    if method not in ("probability", "none"):
        assert min(point[criterion] for point in result.curve) == pytest.approx(getattr(result, criterion + "_after"))
    if method != "none":
        assert values == sorted(set(values)) and len(values) > 15
    entry = result.to_dict()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert {"value", "interval", "ece_before", "ece_after", "nll_before", "nll_after", "curve"} <= set(entry)


def test_the_grids_are_the_papers_and_only_what_the_rows_allow():
    result = search(*plant(2000, 2.0), "probability")
    values = [point["value"] for point in result.curve]
    assert {round(0.1 * i, 10) for i in range(1, 16)} <= {round(value, 10) for value in values}
    assert any(abs(value - result.value) == pytest.approx(0.02) for value in values)
    rows = torch.tensor([[0.034, 0.033, 0.033, 0.9]]).log().repeat(100, 1)
    result = search(rows, torch.zeros(100, dtype=torch.long), "label_smoothing")
    assert [point["value"] for point in result.curve] == pytest.approx([0.005 * i for i in range(7)])
    result = search(rows, torch.zeros(100, dtype=torch.long), "label_smoothing", max_smoothing=0.01)
    assert [point["value"] for point in result.curve] == pytest.approx([0, 0.005, 0.01])


@pytest.mark.parametrize("method", ["temperature", "label_smoothing"])
@pytest.mark.parametrize("criterion", ["ece", "nll"])
def test_a_perfect_teacher_is_left_alone_because_ties_go_to_the_identity(method, criterion):
    rows = torch.tensor([[1.0, 0.0, 0.0]]).log().repeat(50, 1)
    result = search(rows, torch.zeros(50, dtype=torch.long), method, criterion)
    assert result.value == (1.0 if method == "temperature" else 0.0) and not result.at_edge


def test_probability_judges_likelihood_only_where_the_label_was_kept_and_reports_infinity():
    rows, target = plant(4000, 2.0)
    result, inside = search(rows, target, "probability", "nll"), target != 5
    assert result.value == search(rows[inside], target[inside], "probability", "nll").value
    assert math.isinf(result.nll_after) and math.isfinite(result.nll_before)
    assert result.num_labels_in_tail == int((~inside).sum()) > 0
    assert result.to_dict()["nll_after"] is None
    with pytest.raises(ValueError, match="every label lies outside"):
        search(rows, torch.full_like(target, 5), "probability", "nll")


@pytest.mark.parametrize("method", CHOICES)
@pytest.mark.parametrize("criterion", ["ece", "nll"])
def test_bootstrap_replicates_repeat_the_search_on_the_resampled_rows(method, criterion, monkeypatch):
    rows, target = plant(300, 2.0)
    result, generator, values = search(rows, target, method, criterion, bootstrap=6, seed=3), None, []
    generator = np.random.default_rng(3)
    for _ in range(6):
        drawn = torch.from_numpy(generator.integers(300, size=300))
        values.append(search(rows[drawn], target[drawn], method, criterion).value)
    assert result.interval == pytest.approx(list(np.percentile(values, [2.5, 97.5])))
    monkeypatch.setattr("first_trl.calibration.CHUNK", 70)
    assert search(rows, target, method, criterion, bootstrap=6, seed=3) == result


def test_resamples_draw_random_groups_of_many_positions_and_whole_examples(monkeypatch):
    def interval(rows, target, **settings):
        low, high = search(rows, target, criterion="nll", bootstrap=100, **settings).interval
        return low, high - low

    rows, target = plant(2000, 2.0)
    low, width = interval(rows, target)
    assert low <= 2.0 <= low + width and 0.02 < width < 0.8
    repeated, labels = rows.repeat_interleave(8, 0), target.repeat_interleave(8, 0)  # eight tokens that say one thing
    assert interval(repeated, labels, examples=np.arange(2000).repeat(8)) == (low, width)
    assert interval(repeated, labels)[1] < 0.6 * width  # as if they were independent
    monkeypatch.setattr("first_trl.calibration.MOST_GROUPS", 250)
    grouped = interval(rows, target)
    assert 0.7 < grouped[1] / width < 1.4 and abs(grouped[0] - low) < 0.08


@pytest.mark.parametrize(
    ("target", "method", "side"),
    [
        (0, "temperature", "lowest"),
        (4, "temperature", "highest"),
        (0, "probability", "lowest"),
        (0, "label_smoothing", None),  # no smoothing is no edge
    ],
)
def test_a_value_at_the_edge_of_its_grid_and_few_positions_are_reported(target, method, side):
    rows, targets = torch.tensor([[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]]).log().repeat(200, 1), torch.full((200,), target)
    result = search(rows, targets, method, "nll")
    assert result.at_edge is (side is not None)
    edge = [text for text in result.warnings() if f"{method} {result.value:.3g} is the {side} value" in text]
    assert len(edge) == len(result.warnings()) == int(result.at_edge)
    (few,) = [text for text in search(rows[:99], targets[:99], method).warnings() if "validation positions" in text]
    assert few.startswith("99 validation positions") and "datasets.validation" in few


def test_smoothing_at_its_edge_is_allowed_of_the_rows_that_training_sees():
    torch.manual_seed(0)
    exact = torch.distributions.Dirichlet(torch.ones(6)).sample((1500,)).sort(dim=1, descending=True).values
    exact = exact[exact[:, 0] < 0.24].log()
    assert len(exact) > 10
    for rows in exact.half().float().split(1):
        value = search(rows, torch.ones(1, dtype=torch.long), "label_smoothing", "nll").value
        for given in (rows, rows.log_softmax(dim=1)):  # as cached, and as training normalises them
            assert recalibrate(given, "label_smoothing", value).isfinite().any(dim=1).all()


def test_the_error_curve_of_the_searched_rows_is_the_searchs_own():
    rows, target = plant(1000, 2.0)
    for method in ("temperature", "none"):
        curve = search(rows, target, method).to_dict()["curve"]
        assert error_curve(rows, target, method, [point["value"] for point in curve]) == curve
    allowed = rows[:, 0].min().exp().item()
    curve = error_curve(rows, target, "label_smoothing", [0.0, 0.9 * allowed, 1.1 * allowed])
    assert [point["value"] for point in curve] == [0.0, 0.9 * allowed]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, target: (rows.exp(), target), "sum to .*, not 1; pass log-probabilities"),
        (lambda rows, target: (rows * torch.nan, target), "row 0 sum to nan"),
        (lambda rows, target: (rows, target + 4), "column numbers from 0 to 5"),
        (lambda rows, target: (rows, target - 9), "column numbers from 0 to 5"),
        (lambda rows, target: (rows, target[:-1]), r"\(10, 6\) and target \(9,\)"),
        (lambda rows, target: (rows[:0], target[:0]), "one position or more"),
        (lambda rows, target: (rows, target.float()), "column numbers"),
        (lambda rows, target: (rows, target, "platt"), "'platt'; choose one of temperature, "),
        (lambda rows, target: (rows, target, "temperature", "brier"), "criterion is 'brier'; choose one of ece, nll"),
    ],
)
def test_what_is_not_a_caches_rows_and_unknown_names_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        search(*change(make_rows(10), torch.arange(10) % 6))


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


# The choice among families


@pytest.mark.parametrize("planted", [("temperature", 3.0), ("probability", 0.3)])
def test_the_family_that_made_the_labels_is_chosen_and_the_sentence_gives_the_reason(planted):
    choice = choose_family(*plant_family(8000, *planted), CHOICES)
    assert choice.method == planted[0]
    assert choice.scores[choice.method] == min(choice.scores.values()) < 0.02
    other = next(method for method in CHOICES if method != choice.method)
    assert f"{choice.method} {100 * choice.scores[choice.method]:.2f} %; {other}" in choice.why
    assert json.loads(json.dumps(choice.to_dict()))["folds"] == FOLDS


def test_a_family_that_gives_labels_no_probability_never_wins_by_likelihood():
    rows, target = plant_family(4000, "temperature", 3.0)
    choice = choose_family(rows, target, CHOICES, criterion="nll")
    assert choice.method == "temperature" and choice.scores["probability"] is None
    assert "probability gives labels a probability of 0" in choice.why
    with pytest.raises(ValueError, match="criterion: ece"):
        choose_family(rows, target, ["probability"], criterion="nll")


def test_the_score_of_a_family_is_measured_on_rows_that_its_value_did_not_see():
    rows, target = plant_family(103, "temperature", 2.0)
    fold, held = np.random.default_rng(0).permutation(103) % FOLDS, torch.empty_like(rows)
    for number in range(FOLDS):
        rest, own = torch.from_numpy(fold != number), torch.from_numpy(fold == number)
        held[own] = recalibrate(rows[own], "temperature", search(rows[rest], target[rest]).value)
    confidence, predicted = held[:, :-1].max(dim=1)
    expected = expected_calibration_error(confidence.exp(), predicted == target)
    assert choose_family(rows, target, ["temperature"]).scores["temperature"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs at least 5 validation positions.*there are 3"):
        choose_family(rows[:3], target[:3], CHOICES)

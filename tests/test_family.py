"""The choice among families: the one that the labels were drawn from wins, on rows that its value did not see."""

import json

import numpy as np
import pytest
import torch

from first_trl.calibration import FOLDS, choose_family, recalibrate, search
from first_trl.metrics import expected_calibration_error
from tests.test_calibration import make_rows

FAMILIES = ["temperature", "probability"]


def drawn(size, method, value, seed=0, power=3.0):
    """Over-confident rows whose recalibration by (method, value) gives the true probabilities of the labels."""
    rows = recalibrate(make_rows(size, seed=seed), "temperature", 1 / power)
    true = recalibrate(rows, method, value)
    return rows, torch.multinomial(true.exp(), 1, generator=torch.Generator().manual_seed(seed + 1))[:, 0]


@pytest.mark.parametrize("planted", [("temperature", 3.0), ("probability", 0.3)])
def test_the_family_that_made_the_labels_is_chosen_and_the_sentence_says_why(planted):
    choice = choose_family(*drawn(8000, *planted), FAMILIES)
    assert choice.method == planted[0]
    assert choice.scores[choice.method] == min(choice.scores.values()) < 0.02
    other = next(method for method in FAMILIES if method != choice.method)
    assert f"{choice.method} {100 * choice.scores[choice.method]:.2f} %; {other}" in choice.why
    assert json.loads(json.dumps(choice.to_dict()))["folds"] == FOLDS


def test_a_family_that_gives_labels_no_probability_never_wins_by_likelihood():
    rows, target = drawn(4000, "temperature", 3.0)
    assert (target == 5).any()
    choice = choose_family(rows, target, FAMILIES, criterion="nll")
    assert choice.method == "temperature" and choice.scores["probability"] is None
    assert "probability gives labels a probability of 0" in choice.why
    with pytest.raises(ValueError, match="criterion: ece"):
        choose_family(rows, target, ["probability"], criterion="nll")


def test_the_score_of_a_family_is_measured_on_rows_that_its_value_did_not_see():
    rows, target = drawn(103, "temperature", 2.0)
    fold, held = np.random.default_rng(0).permutation(103) % FOLDS, torch.empty_like(rows)
    for number in range(FOLDS):
        rest, own = torch.from_numpy(fold != number), torch.from_numpy(fold == number)
        held[own] = recalibrate(rows[own], "temperature", search(rows[rest], target[rest]).value)
    confidence, predicted = held[:, :-1].max(dim=1)
    expected = expected_calibration_error(confidence.exp(), predicted == target)
    assert choose_family(rows, target, ["temperature"]).scores["temperature"] == pytest.approx(expected)


def test_too_few_rows_and_an_unknown_criterion_are_refused():
    with pytest.raises(ValueError, match="needs at least 5 validation positions.*there are 3"):
        choose_family(*drawn(3, "temperature", 2.0), FAMILIES)
    with pytest.raises(ValueError, match="criterion is 'brier'"):
        choose_family(*drawn(9, "temperature", 2.0), FAMILIES, criterion="brier")

"""The recalibrated controls, from answers worked out by hand."""

import numpy as np
import pytest
from datasets import Dataset

from first_trl.controls import collect

SETTINGS = {"criterion": "ece", "num_bins": 10, "families": {}}


def write_answers(folder, first_probs, right):
    """Answers of two kept tokens and a tail of 0.02; `right` says whether the first or the second is the label."""
    probs = np.array([[first, 0.98 - first, 0.02] for first in first_probs])
    target = np.where(right, 0, 1)
    columns = {
        "token_ids": [[3, 4]] * len(probs),
        "log_probs": list(np.log(probs)),
        "target": target,
        "label_id": 3 + target,
        "label_log_prob": np.log(probs[np.arange(len(probs)), target]),
    }
    folder.parent.mkdir(exist_ok=True)
    Dataset.from_dict(columns).to_parquet(f"{folder}.parquet")


@pytest.fixture
def answered(tmp_path):
    """Models that are right half the time at confidence 0.9, so that smoothing by 0.4 mends them; one test row of
    `low` and of `seeded/seed-2` has less than that on its first token."""
    lowest = {"teacher": 0.5, "fits": 0.5, "low": 0.35, "seeded/seed-1": 0.5, "seeded/seed-2": 0.35}
    for model, first in lowest.items():
        (tmp_path / model).mkdir(parents=True)
        write_answers(tmp_path / model / "validation", [0.9] * 20, [True, False] * 10)
        write_answers(tmp_path / model / "easy", [0.9] * 4, [True] * 4)
        write_answers(tmp_path / model / "hard", [0.9, first], [True, False])
    return tmp_path, list(lowest)


def test_a_control_is_left_out_where_a_row_has_less_on_its_first_token_than_smoothing_takes(answered):
    folder, models = answered
    calibration = {"method": "label_smoothing", "value": 0.4, **SETTINGS}
    collected, fitted, omitted = collect(folder, models, models[1:], ["easy", "hard"], calibration)
    assert set(collected) == {*models, "teacher_recalibrated", "fits_post_hoc"}
    assert set(fitted) == {"teacher_recalibrated", "fits_post_hoc"} and fitted["fits_post_hoc"][1] > 0.35
    assert set(omitted) == {"low_post_hoc", "seeded_post_hoc"}, "a mean over some of the seeds is no mean over all"
    for reason in omitted.values():
        assert "of the rows of hard, one has 0.35 there" in reason and "easy" not in reason
    _, _, omitted = collect(folder, ["teacher"], [], ["hard"], calibration | {"value": 0.6})
    assert "label smoothing takes 0.6 from the first token's probability" in omitted["teacher_recalibrated"]


@pytest.mark.parametrize("method", ["temperature", "probability"])
def test_other_families_serve_every_row(answered, method):
    folder, models = answered
    collected, _, omitted = collect(folder, models, models[1:], ["hard"], {"method": method, "value": 0.5, **SETTINGS})
    assert omitted == {} and "low_post_hoc" in collected and "seeded_post_hoc/seed-2" in collected

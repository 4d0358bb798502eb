"""Calibration rows pair each teacher row with the column of its own label."""

import json

import numpy as np
import pytest
from datasets import Dataset

from first_trl.cache.arrays import calibration_rows
from first_trl.stages import cache, calibrate
from tests.cache_recipe import write_recipe

CACHE = Dataset.from_dict(
    {
        "labels": [[-100, 7, 0], [5, -100, 8, 9, 0], [-100, 6]],
        "teacher_ids": [[[7, 3], [0, 1]], [[1, 8], [2, 3], [0, 4]], [[1, 2]]],
        "teacher_log_probs": [[[-0.1, -3], [-0.01, -6]], [[-0.7, -0.8], [-1, -2], [-0.02, -5]], [[-0.5, -1.5]]],
        "teacher_tail_log_prob": [[-3.5, -7.0], [-2.5, -0.7, -4.5], [-1.8]],
    }
)


def test_answer_positions_are_the_first_supervised_token_of_each_example():
    rows = calibration_rows(CACHE, "answer", eos_token_id=0)
    np.testing.assert_allclose(rows.log_probs, [[-0.1, -3, -3.5], [-0.7, -0.8, -2.5], [-0.5, -1.5, -1.8]], atol=1e-6)
    assert rows.target.tolist() == [0, 1, 2]  # the teacher's first, its second, and neither


def test_all_positions_leave_out_the_end_of_sequence_unless_asked():
    assert calibration_rows(CACHE, "all", eos_token_id=0).target.tolist() == [0, 1, 2, 2]
    assert calibration_rows(CACHE, "all").target.tolist() == [0, 0, 1, 2, 0, 2]


@pytest.mark.parametrize(("include_eos", "num_positions"), [("false", 43), ("true", 86)])
def test_the_stage_leaves_out_the_end_of_sequence_unless_it_is_asked_for(
    tmp_path, monkeypatch, include_eos, num_positions
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = str(write_recipe(tmp_path))  # 43 validation rows of one answer token and the end of sequence
    cache.main([path])
    calibrate.main([path, "--positions=all", f"--include_eos={include_eos}", "--bootstrap=0"])
    assert json.loads((tmp_path / "runs/tiny/calibration.json").read_text())["num_positions"] == num_positions


def test_a_selection_of_rows_reads_its_own_teacher():
    rows = calibration_rows(CACHE.select([2, 0]), "answer")
    np.testing.assert_allclose(rows.log_probs[0], [-0.5, -1.5, -1.8], atol=1e-6)
    assert rows.target.tolist() == [2, 0]


def test_the_summary_is_accuracy_beside_confidence():
    summary = calibration_rows(CACHE, "answer").summary()
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["confidence"] == pytest.approx(np.exp([-0.1, -0.7, -0.5]).mean(), abs=1e-6)


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="positions is 'last'; choose one of answer, all"):
        calibration_rows(CACHE, "last")

"""Calibration rows pair each teacher row with the column of its own label."""

import json

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from first_trl.cache import arrays
from first_trl.cache.arrays import Rows, calibration_rows, row_blocks, summary
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


FORCED = {"opening": [], "closing": [0], "answer": 0}


def test_answer_positions_are_the_first_supervised_token_of_each_example():
    rows = calibration_rows(CACHE, "answer", FORCED)
    np.testing.assert_allclose(rows.log_probs, [[-0.1, -3, -3.5], [-0.7, -0.8, -2.5], [-0.5, -1.5, -1.8]], atol=1e-6)
    assert rows.target.tolist() == [0, 1, 2]  # the teacher's first, its second, and neither
    assert rows.label_ids.tolist() == [7, 8, 6] and rows.examples.tolist() == [0, 1, 2]


def test_answer_positions_are_those_in_which_the_choices_differ():
    rows = calibration_rows(CACHE, "answer", {"opening": [8], "closing": [0], "answer": 1})
    assert rows.label_ids.tolist() == [0, 9] and rows.examples.tolist() == [0, 1]  # the last has no second token


def test_all_positions_leave_out_what_the_template_forces():
    assert calibration_rows(CACHE, "all", FORCED).target.tolist() == [0, 1, 2, 2]
    assert calibration_rows(CACHE, "all", FORCED).examples.tolist() == [0, 1, 1, 2]
    assert calibration_rows(CACHE, "all", {"opening": [8], "closing": [0], "answer": 1}).target.tolist() == [0, 2, 2]
    assert calibration_rows(CACHE, "all").target.tolist() == [0, 0, 1, 2, 0, 2]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("choices", [None, ["good", "bad"]])
def test_the_stage_measures_answers_of_closed_questions_and_every_free_token(tmp_path, on_cpu, choices):
    completion = " {label}" if choices else " it is {label}"
    task = {"prompt": "Review : {text} Sentiment :", "completion": completion, "max_length": 60, "choices": choices}
    path = str(write_recipe(tmp_path, task=task))  # 43 validation rows
    cache.main([path])
    calibrate.main([path, "--bootstrap=20"])
    found = json.loads((tmp_path / "runs/tiny/calibration.json").read_text())
    assert found["positions"] == ("answer" if choices else "all")
    assert found["num_positions"] == 43, "the words before the answer are forced, and so is the end of sequence"
    assert any("43 validation positions" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("choices", "remedy"),
    [(None, "chat_template_kwargs: {enable_thinking: false}"), (["good", "bad"], "rows with other answers")],
)
def test_a_token_that_is_always_right_is_refused_by_name(tmp_path, on_cpu, capsys, choices, remedy):
    task = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "max_length": 60, "choices": choices}
    path = write_recipe(tmp_path, task=task)
    file = tmp_path / "validation.jsonl"
    file.write_text(file.read_text().replace('"bad"', '"good"'))
    cache.main([str(path)])
    with pytest.raises(SystemExit, match=r"43 of 43 targets of validation are 'good'") as raised:
        calibrate.main([str(path), "--positions=answer"])
    assert remedy in str(raised.value) and "positions: all" in str(raised.value)


def test_a_selection_of_rows_reads_its_own_teacher():
    rows = calibration_rows(CACHE.select([2, 0]), "answer")
    np.testing.assert_allclose(rows.log_probs[0], [-0.5, -1.5, -1.8], atol=1e-6)
    assert rows.target.tolist() == [2, 0]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_the_summary_is_accuracy_beside_confidence(monkeypatch, size):
    monkeypatch.setattr(arrays, "BLOCK", size)
    found = summary(row_blocks(CACHE, "answer"))
    assert found["num_positions"] == 3 and found["accuracy"] == pytest.approx(1 / 3)
    assert found["confidence"] == pytest.approx(np.exp([-0.1, -0.7, -0.5]).mean(), abs=1e-6)
    assert summary(row_blocks(CACHE, "answer"), labelled=False)["accuracy"] is None


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocks_are_the_rows_in_their_order_whatever_their_size(monkeypatch, positions, size):
    without_answer = {
        "labels": [[-100]],
        "teacher_ids": [[]],
        "teacher_log_probs": [[]],
        "teacher_tail_log_prob": [[]],
    }
    empty = Dataset.from_dict(without_answer, features=CACHE.features)
    dataset = concatenate_datasets([CACHE, empty, empty, empty, CACHE.select([2, 0])])
    whole = calibration_rows(dataset, positions, FORCED)
    monkeypatch.setattr(arrays, "BLOCK", size)
    blocks = list(row_blocks(dataset, positions, FORCED))
    assert len(blocks) > 1 and max(len(block.target) for block in blocks) <= 3 * size
    again = calibration_rows(dataset, positions, FORCED)
    for rows in (again, *(Rows(*map(np.concatenate, zip(*blocks, strict=True))),)):
        np.testing.assert_array_equal(rows.log_probs, whole.log_probs)
        np.testing.assert_array_equal(rows.target, whole.target)


def test_no_position_that_is_left_is_an_error_after_the_last_block():
    with pytest.raises(ValueError, match="No supervised position is left under positions='all'"):
        list(row_blocks(CACHE.select([2]), "all", {**FORCED, "closing": [6]}))


@pytest.mark.parametrize("smoothed", [False, True])
def test_the_stage_never_has_the_rows_to_learn_from_in_memory_at_once(tmp_path, monkeypatch, smoothed):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arms = {"first": {"recalibration_method": "label_smoothing"} if smoothed else {}}
    path = str(write_recipe(tmp_path, arms=arms, calibrate={"bootstrap": 0}))
    cache.main([path])
    read, iterate, file = [], Dataset.iter, tmp_path / "runs/tiny/calibration.json"

    def counted(self, batch_size, **options):
        for batch in iterate(self, batch_size, **options):
            read.append(len(batch))
            yield batch

    def refuse(self, key):
        raise AssertionError(f"rows {key} are read at once")

    monkeypatch.setattr(Dataset, "iter", counted)
    monkeypatch.setattr(Dataset, "__getitem__", refuse)
    calibrate.main([path])
    expected = json.loads(file.read_text())
    file.unlink()
    read.clear()
    monkeypatch.setattr(arrays, "BLOCK", 4)
    calibrate.main([path])
    assert max(read) == 4 and sum(read) == (40 + 43) * (1 + smoothed), "another pass is for label smoothing alone"
    found = json.loads(file.read_text())
    assert found["teacher"].pop("cached_rows") == pytest.approx(expected["teacher"].pop("cached_rows"))
    assert found["teacher"].pop("validation") == pytest.approx(expected["teacher"].pop("validation"))
    assert found == expected


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="positions is 'last'; choose one of answer, all"):
        calibration_rows(CACHE, "last")

"""Calibration rows pair each teacher row with the column of its own label."""

import json

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from first_trl.cache import arrays
from first_trl.cache.arrays import Rows, calibration_rows, row_blocks, summary
from first_trl.errors import FirstTrlError
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
OPENED = {"opening": [8], "closing": [0], "answer": 1}


@pytest.mark.parametrize(
    ("positions", "forced", "targets", "examples"),
    [
        ("answer", FORCED, [0, 1, 2], [0, 1, 2]),  # the teacher's first, its second, and neither
        ("answer", OPENED, [0, 2], [0, 1]),  # where the choices differ; the last has no second token
        ("all", FORCED, [0, 1, 2, 2], [0, 1, 1, 2]),
        ("all", OPENED, [0, 2, 2], [0, 1, 2]),
        ("all", None, [0, 0, 1, 2, 0, 2], [0, 0, 1, 1, 1, 2]),
    ],
)
def test_positions_are_the_answers_or_every_learned_token_that_no_template_forces(
    positions, forced, targets, examples
):
    rows = calibration_rows(CACHE, positions, forced)
    assert rows.target.tolist() == targets and rows.examples.tolist() == examples
    if forced is FORCED and positions == "answer":
        expected = [[-0.1, -3, -3.5], [-0.7, -0.8, -2.5], [-0.5, -1.5, -1.8]]
        np.testing.assert_allclose(rows.log_probs, expected, atol=1e-6)
        assert rows.label_ids.tolist() == [7, 8, 6]
        selected = calibration_rows(CACHE.select([2, 0]), "answer")
        np.testing.assert_array_equal(selected.log_probs, rows.log_probs[[2, 0]])


def test_no_position_that_is_left_and_unknown_ones_are_refused():
    with pytest.raises(FirstTrlError, match="No supervised position is left under positions='all'"):
        list(row_blocks(CACHE.select([2]), "all", {**FORCED, "closing": [6]}))
    with pytest.raises(FirstTrlError, match="positions is 'last'; choose one of answer, all"):
        calibration_rows(CACHE, "last")


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
    columns = ("teacher_ids", "teacher_log_probs", "teacher_tail_log_prob")
    without_answer = {"labels": [[-100]], **{name: [[]] for name in columns}}
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

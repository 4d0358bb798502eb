"""Answers, what a recalibration makes of them, and the two views of confidence, against values worked out by hand."""

import numpy as np
import pytest
from datasets import Dataset

from first_trl.evaluation import answer_set, collect, predictions, read_answers, recalibrated_answers
from first_trl.evaluation import test_task as task_of_a_set
from first_trl.settings import TaskConfig

# Two examples over tokens 3..7: K = 2 kept tokens and the tail. The first label is kept, the second is in the tail.
ANSWERS = {
    "token_ids": np.array([[3, 4], [5, 3]]),
    "log_probs": np.log(np.array([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3]])),
    "label_id": np.array([4, 7]),
    "target": np.array([1, 2]),
    "label_log_prob": np.log(np.array([0.3, 0.03])),
    "choice_ids": np.array([[3, 4, 7], [3, 4, 7]]),
    "choice_log_probs": np.log(np.array([[0.6, 0.3, 0.02], [0.2, 0.1, 0.03]])),
}


def test_confidence_is_of_the_first_token_and_choices_are_normalised_apart():
    found = predictions(ANSWERS)
    np.testing.assert_allclose(found["confidence"], [0.6, 0.5])
    assert found["correct"].tolist() == [False, False]
    np.testing.assert_allclose(found["choice_confidence"], [0.6 / 0.92, 0.2 / 0.33])
    assert found["choice_correct"].tolist() == [False, False]


def test_a_temperature_moves_kept_tokens_and_leaves_the_tail():
    mended = recalibrated_answers(ANSWERS, "temperature", 2.0)
    kept = np.sqrt([[0.6, 0.3], [0.5, 0.2]])
    kept *= np.array([[0.9], [0.7]]) / kept.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(mended["log_probs"][:, :2]), kept, rtol=1e-5)
    np.testing.assert_allclose(np.exp(mended["label_log_prob"]), [kept[0, 1], 0.03], rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(mended["choice_log_probs"]), [[*kept[0], 0.02], [kept[1, 1], 0.1, 0.03]], rtol=1e-5
    )


def test_no_recalibration_changes_nothing():
    same = recalibrated_answers(ANSWERS, "none", None)
    for name in ("log_probs", "label_log_prob", "choice_log_probs"):
        np.testing.assert_allclose(same[name], ANSWERS[name], rtol=1e-5)


def test_probability_recalibration_leaves_nothing_to_the_tail():
    mended = recalibrated_answers(ANSWERS, "probability", 0.3)
    assert mended["label_log_prob"][1] == -np.inf
    assert predictions(mended)["confidence"] == pytest.approx(
        np.exp(np.array([0.6, 0.5]) / 0.3) / (np.exp(np.array([0.6, 0.5]) / 0.3) + np.exp(np.array([0.3, 0.2]) / 0.3)),
        rel=1e-5,
    )


def test_answers_survive_their_file(make_model, tokenizer, tmp_path):
    rows = Dataset.from_dict(
        {"text": ["the film is great", "a dull plot", "so slow"], "label": ["good", "bad", "bad"]}
    )
    task = TaskConfig(prompt="Review : {text} Sentiment :", completion=" {label}", choices=["good", "bad"])
    model = make_model(vocab_size=len(tokenizer)).eval()
    answers = answer_set(model, rows, task, tokenizer, top_k=5, tokens_per_batch=32)
    answers.to_parquet(tmp_path / "answers.parquet")
    read = read_answers(tmp_path / "answers.parquet")
    assert read["log_probs"].shape == (3, 6) and read["choice_log_probs"].shape == (3, 2)
    np.testing.assert_allclose(np.exp(read["log_probs"]).sum(axis=1), 1, atol=1e-5)
    assert [tokenizer.decode(int(i)) for i in read["label_id"]] == ["good", "bad", "bad"]


def test_a_test_set_can_have_templates_of_its_own():
    task = TaskConfig(prompt="{text}", completion=" {label}", choices=["good", "bad"])
    other = task_of_a_set(task, {"prompt": "{question}", "choices": ["A", "B"]})
    assert (other.prompt, other.completion, other.choices) == ("{question}", " {label}", ["A", "B"])


# Recalibrated controls

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

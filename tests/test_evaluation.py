"""Answers, what a recalibration makes of them, and the two views of confidence, against values worked out by hand."""

import numpy as np
import pytest
from datasets import Dataset

from first_trl.config import TaskConfig
from first_trl.evaluation import answer_set, predictions, read_answers, recalibrated_answers
from first_trl.evaluation import test_task as task_of_a_set

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

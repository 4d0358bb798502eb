from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from first_trl.errors import FirstTrlError
from first_trl.evaluation import (
    answer_set,
    closing_of,
    collect,
    predictions,
    read_answers,
    recalibrated_answers,
    shipped_answers,
    vocabulary_closing,
)
from first_trl.evaluation import task_of_set as task_of_a_set
from first_trl.settings import TaskConfig
from tests.tiny import WORDS, build_model, build_tokenizer

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
    recalibrated = recalibrated_answers(ANSWERS, "temperature", 2.0)
    kept = np.sqrt([[0.6, 0.3], [0.5, 0.2]])
    kept *= np.array([[0.9], [0.7]]) / kept.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(recalibrated["log_probs"][:, :2]), kept, rtol=1e-5)
    np.testing.assert_allclose(np.exp(recalibrated["label_log_prob"]), [kept[0, 1], 0.03], rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(recalibrated["choice_log_probs"]), [[*kept[0], 0.02], [kept[1, 1], 0.1, 0.03]], rtol=1e-5
    )
    same = recalibrated_answers(ANSWERS, "none", None)
    for name in ("log_probs", "label_log_prob", "choice_log_probs"):
        np.testing.assert_allclose(same[name], ANSWERS[name], rtol=1e-5)


def test_probability_recalibration_leaves_nothing_to_the_tail():
    recalibrated = recalibrated_answers(ANSWERS, "probability", 0.3)
    assert recalibrated["label_log_prob"][1] == -np.inf
    odds = np.exp(np.array([[0.6, 0.3], [0.5, 0.2]]) / 0.3)
    assert predictions(recalibrated)["confidence"] == pytest.approx(odds[:, 0] / odds.sum(axis=1), rel=1e-5)


REVIEWS = {"text": ["the film is great", "a dull plot", "so slow"], "label": ["good", "bad", "bad"]}


def test_answers_survive_their_file(make_model, tokenizer, tmp_path):
    task = TaskConfig(prompt="Review : {text} Sentiment :", completion=" {label}", choices=["good", "bad"])
    model = make_model(vocab_size=len(tokenizer)).eval()
    answers = answer_set(model, Dataset.from_dict(REVIEWS), task, tokenizer, top_k=5, tokens_per_batch=32)
    answers.to_parquet(tmp_path / "answers.parquet")
    read = read_answers(tmp_path / "answers.parquet")
    assert read["log_probs"].shape == (3, 6) and read["choice_log_probs"].shape == (3, 2)
    np.testing.assert_allclose(np.exp(read["log_probs"]).sum(axis=1), 1, atol=1e-5)
    assert tokenizer.convert_ids_to_tokens(read["label_id"]) == REVIEWS["label"]


def test_a_test_set_can_have_templates_of_its_own():
    task = TaskConfig(prompt="{text}", completion=" {label}", choices=["good", "bad"])
    other = task_of_a_set(task, {"prompt": "{question}", "choices": ["A", "B"]})
    assert (other.prompt, other.completion, other.choices) == ("{question}", " {label}", ["A", "B"])


def test_free_text_is_measured_by_every_learned_token_but_the_end_and_resampled_by_answer(make_model, tokenizer):
    rows = Dataset.from_dict(
        {"text": ["the film", "a dull plot", "so"], "answer": ["is great fun", "bad", "slow and sad"]}
    )
    task = TaskConfig(prompt="Review : {text} Sentiment :", completion=" {answer}")
    model = make_model(vocab_size=len(tokenizer)).eval()
    answers = answer_set(model, rows, task, tokenizer, top_k=5, tokens_per_batch=16, start=7)
    found = {name: np.array(answers[name][:]) for name in answers.column_names}
    written = [tokenizer(answer).input_ids for answer in rows["answer"]]
    assert found["label_id"].tolist() == sum(written, []), "no end of sequence"
    assert found["example"].tolist() == [7] * 3 + [8] + [9] * 3
    ids = tokenizer("Review : the film Sentiment : is great fun").input_ids
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, -4:-1].log_softmax(-1).numpy()
    np.testing.assert_allclose(found["label_log_prob"][:3], log_probs[range(3), ids[-3:]], atol=1e-4)
    said = predictions(found)
    np.testing.assert_allclose(said["confidence"][:3], np.exp(log_probs.max(-1)), atol=1e-4)
    assert said["correct"][:3].tolist() == (log_probs.argmax(-1) == ids[-3:]).tolist() and "choice_correct" not in said
    assert said["example"].tolist() == found["example"].tolist()


# Answers that a map or float32 cannot hold


def test_choices_outside_the_kept_tokens_keep_shares_where_a_map_leaves_no_tail():
    one = {
        "token_ids": np.array([[1, 2, 3, 4, 5], [7, 2, 3, 4, 5]]),
        "log_probs": np.log([[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]] * 2),
        "target": np.array([5, 0]),
        "label_id": np.array([7, 7]),
        "label_log_prob": np.array([-6.0, np.log(0.6)]),
        "choice_ids": np.array([[7, 8], [7, 8]]),
        "choice_log_probs": np.array([[-6.0, -7.0], [np.log(0.6), -5.0]]),
    }
    moved = recalibrated_answers(one, "probability", 0.3)
    assert moved["choices_outside"].tolist() == [True, True]
    found = predictions(moved)
    odds = np.exp(np.array([np.exp(-6) - np.exp(-7), 0.6 - np.exp(-5)]) / 0.3)
    np.testing.assert_allclose(found["choice_confidence"], odds / (1 + odds), rtol=1e-4)
    assert not recalibrated_answers(one, "temperature", 2.0)["choices_outside"].any()


@pytest.mark.parametrize("mass", [1e-10, 1e-17, 1e-30])
def test_whole_answers_that_a_model_finds_very_unlikely_keep_their_shares(monkeypatch, tokenizer, mass):
    log_probs = np.log(np.array([[0.75, 0.25]]) * mass).astype(np.float32)
    monkeypatch.setattr("first_trl.evaluation.sequence_log_probs", lambda *_, **__: log_probs)
    task = TaskConfig(prompt="{text} :", completion=" {label}", choices=["good film", "bad"], append_eos=False)
    rows = Dataset.from_dict({"text": ["the plot"], "label": ["good film"]})
    answers = answer_set(None, rows, task, tokenizer, top_k=5, tokens_per_batch=32)
    arrays = {name: np.array(answers[name][:]) for name in answers.column_names}
    for method, value in (("none", None), ("temperature", 1.0)):
        found = predictions(recalibrated_answers(arrays, method, value))
        assert found["choice_confidence"] == pytest.approx(0.75, rel=1e-3)


def test_a_model_that_answers_nan_is_named_with_the_set_and_the_row():
    broken = ANSWERS | {"choice_log_probs": np.array([[-1.0, -2, -3], [np.nan, -1, -2]])}
    with pytest.raises(FirstTrlError, match="first on reviews: the choice_confidence of row 1 is not a number"):
        predictions(broken, "first on reviews")


# Controls, and the closing temperature


def write_answers(folder, first_probs, right):
    """Answers of two kept tokens, which are the choices, and a tail of 0.02; `right` says whether the first is it."""
    probs = np.array([[first, 0.98 - first, 0.02] for first in first_probs])
    target = np.where(right, 0, 1)
    columns = {
        "token_ids": [[3, 4]] * len(probs),
        "log_probs": list(np.log(probs)),
        "target": target,
        "label_id": 3 + target,
        "label_log_prob": np.log(probs[np.arange(len(probs)), target]),
        "choice_ids": [[3, 4]] * len(probs),
        "choice_log_probs": list(np.log(probs[:, :2])),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(f"{folder}.parquet")


def sampled(size, temperature, seed=0):
    """Answers whose probabilities are true once they are divided by `temperature`, and whether the first is right."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(0, 2, size)
    right = generator.random(size) < 1 / (1 + np.exp(-truth))
    stated = 1 / (1 + np.exp(-truth * temperature))
    return 0.98 * stated, right


@pytest.mark.parametrize(
    ("size", "planted", "why"),
    [
        (3000, 0.6, "not contain 1"),
        (3000, 8.0, "not contain 1"),
        (3000, 1.0, "contains 1"),
        (40, 3.0, "fewer than 50"),
    ],
)
def test_the_closing_temperature_finds_what_was_planted_and_stays_1_where_it_cannot_tell(tmp_path, size, planted, why):
    write_answers(tmp_path / "validation", *sampled(size, planted))
    closing = closing_of(read_answers(tmp_path / "validation.parquet"), "first")
    assert why in closing["why"] and closing["temperature"] == (closing["fitted"] if why == "not contain 1" else 1.0)
    low, high = closing["interval"]
    assert low < planted < high and closing["nll_after"] <= closing["nll_before"] and closing["scope"] == "choices"
    assert size < 50 or closing["fitted"] == pytest.approx(planted, rel=0.12)


def test_the_temperature_of_all_logits_is_that_which_the_labels_were_drawn_at(tmp_path):
    model, tokenizer, planted, words = build_model(initializer_range=0.2), build_tokenizer(), 1.8, WORDS.split()[:18]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"text": " ".join(words[(i * k) % 18] for k in (1, 5, 7, 11))} for i in range(400)]
    torch.manual_seed(0)
    for row in rows:
        ids = tokenizer(f"Review : {row['text']} Sentiment :", return_tensors="pt").input_ids
        with torch.no_grad():
            shares = (model(ids).logits[0, -1, 3:] / planted).softmax(-1)
        row["label"] = tokenizer.convert_ids_to_tokens(3 + int(shares.multinomial(1)))
    task = TaskConfig(prompt="Review : {text} Sentiment :", completion=" {label}", append_eos=False)
    recipe = SimpleNamespace(task=task, evaluate=SimpleNamespace(tokens_per_batch=512, seed=0))
    closing = vocabulary_closing(tmp_path, {"model_name_or_path": str(tmp_path)}, Dataset.from_list(rows), recipe)
    low, high = closing["interval"]
    assert 1 < low < planted < high and closing["temperature"] == closing["fitted"]


def test_shipped_answers_are_powers_of_the_shares_and_keep_the_mass_of_the_choices():
    shipped = shipped_answers(ANSWERS, 2.0)
    own = np.exp(ANSWERS["choice_log_probs"])
    shares = np.sqrt(own) / np.sqrt(own).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(shipped["choice_log_probs"]), shares * own.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.exp(shipped["log_probs"]).sum(axis=1), 1, rtol=1e-6)
    found, before = predictions(shipped), predictions(ANSWERS)
    np.testing.assert_allclose(found["choice_confidence"], shares.max(axis=1))
    assert found["correct"].tolist() == before["correct"].tolist()
    assert found["confidence"][1] == pytest.approx(0.5), "the likeliest token is none of the choices"
    same = predictions(shipped_answers(ANSWERS, 1.0))
    for name in before:
        np.testing.assert_allclose(same[name], before[name], rtol=1e-6)


def test_every_student_has_a_control_under_its_closing_temperature(tmp_path):
    for model in ("teacher", "fine_tuned", "first/seed-1", "first/seed-2"):
        for name in ("validation", "easy"):
            write_answers(tmp_path / model / name, *sampled(80, 2.0))
    closing = {"fine_tuned": 1.0, "first/seed-1": 2.0, "first/seed-2": 1.5}
    calibration = {"method": "temperature", "value": 0.5}
    found = collect(tmp_path, ["teacher", *closing], closing, ["easy"], calibration)
    controls = {"teacher_recalibrated", "fine_tuned_post_hoc", "first_post_hoc/seed-1", "first_post_hoc/seed-2"}
    assert set(found.predictions) == {"teacher", *closing, *controls} and found.omitted == {} == found.outside
    assert found.fitted["first_post_hoc/seed-2"] == ("temperature", 1.5)


def test_a_recalibrated_teacher_is_left_out_where_a_row_has_less_on_its_first_token_than_smoothing_takes(tmp_path):
    for name, first in (("validation", 0.9), ("easy", 0.9), ("hard", 0.5)):
        write_answers(tmp_path / "teacher" / name, [0.9, first], [True, False])
    calibration = {"method": "label_smoothing", "value": 0.6}
    found = collect(tmp_path, ["teacher"], {}, ["easy", "hard"], calibration)
    assert set(found.predictions) == {"teacher"} and found.fitted == {}
    reason = found.omitted["teacher_recalibrated"]
    assert "label smoothing takes 0.6" in reason and "a row of hard has 0.5 there" in reason and "easy" not in reason
    found = collect(tmp_path, ["teacher"], {}, ["easy"], calibration | {"value": 0.4})
    assert "teacher_recalibrated" in found.predictions

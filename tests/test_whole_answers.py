"""Answers of several tokens: the probability of the whole, in every view, against sums worked out one at a time."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from first_trl.evaluation import answer_set, collect, predictions, read_answers, recalibrated_answers
from first_trl.scoring import sequence_log_probs
from first_trl.settings import TaskConfig
from tests.test_trainer import random_examples

ROWS = {
    "text": ["the film is great", "a dull plot", "so slow", "a long cast , a funny book"],
    "label": ["good film", "bad", "bad plot", "bad"],
}
TASK = TaskConfig(
    prompt="Review : {text} Sentiment :",
    completion=" {label}",
    choices=["good film", "bad", "bad plot"],
    max_length=40,
)


def summed_log_probs(model, prompts, sequences):
    """(N, C), by a forward pass of its own for every pair."""
    result = np.zeros((len(prompts), len(sequences)))
    for n, prompt in enumerate(prompts):
        for c, sequence in enumerate(sequences):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *sequence]])).logits[0].double()
            log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            result[n, c] = log_probs.gather(1, torch.tensor(sequence)[:, None]).sum().item()
    return result


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_a_sequence_is_as_likely_as_its_tokens_one_after_the_other(make_model, tokens_per_batch):
    model = make_model(vocab_size=50).eval()
    prompts = [example["input_ids"] for example in random_examples(7, 50)]
    sequences = [[4], [4, 9, 2], [4, 9], [30, 30, 30, 30], [11, 4]]
    found = sequence_log_probs(model, prompts, sequences, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(found, summed_log_probs(model, prompts, sequences), atol=5e-5)


@pytest.fixture
def answers(make_model, tokenizer, tmp_path):
    model = make_model(vocab_size=len(tokenizer)).eval()
    answered = answer_set(model, Dataset.from_dict(ROWS), TASK, tokenizer, top_k=5, tokens_per_batch=64)
    answered.to_parquet(tmp_path / "answers.parquet")
    prompts = [tokenizer(f"Review : {text} Sentiment :")["input_ids"] for text in ROWS["text"]]
    sequences = [[*tokenizer(choice)["input_ids"], tokenizer.eos_token_id] for choice in TASK.choices]
    return read_answers(tmp_path / "answers.parquet"), summed_log_probs(model, prompts, sequences)


def test_confidence_is_that_of_the_whole_answer_and_is_normalised_in_the_restricted_view(answers):
    rows, expected = answers
    labels = np.array([TASK.choices.index(label) for label in ROWS["label"]])
    found, probs = predictions(rows), np.exp(expected)
    np.testing.assert_allclose(found["confidence"], probs.max(1), rtol=1e-4)
    assert found["correct"].tolist() == (probs.argmax(1) == labels).tolist()
    np.testing.assert_allclose(found["label_log_prob"], expected[np.arange(4), labels], atol=1e-4)
    shares = probs / probs.sum(1, keepdims=True)
    np.testing.assert_allclose(found["choice_confidence"], shares.max(1), rtol=1e-4)
    assert found["choice_correct"].tolist() == found["correct"].tolist()
    np.testing.assert_allclose(np.exp(rows["log_probs"][:, -1]), 1 - probs.sum(1), rtol=1e-4)


def test_a_temperature_moves_mass_among_whole_answers_and_leaves_the_rest(answers):
    rows, expected = answers
    mended = recalibrated_answers(rows, "temperature", 2.0)
    roots = np.exp(expected / 2)
    inside = np.exp(expected).sum(1, keepdims=True) * roots / roots.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(mended["choice_log_probs"]), inside, rtol=1e-3)
    np.testing.assert_allclose(mended["log_probs"][:, -1], rows["log_probs"][:, -1], rtol=1e-6)


def test_the_teachers_recalibration_is_fitted_again_on_whole_answers(answers, tmp_path):
    for model in ("teacher", "fine_tuned"):
        (tmp_path / model).mkdir()
        for name in ("validation", "test"):
            Dataset.from_parquet(str(tmp_path / "answers.parquet")).to_parquet(tmp_path / model / f"{name}.parquet")
    calibration = {"method": "temperature", "value": 7.77, "criterion": "nll", "num_bins": 10, "families": {}}
    found = collect(tmp_path, ["teacher", "fine_tuned"], {"fine_tuned": 2.0}, ["test"], calibration)
    assert found.fitted["teacher_recalibrated"][0] == "temperature" and found.fitted["teacher_recalibrated"][1] != 7.77
    before, after = (
        found.predictions[arm]["test"]["choice_confidence"] for arm in ("fine_tuned", "fine_tuned_post_hoc")
    )
    assert (after <= before + 1e-6).all()


def test_what_is_for_single_tokens_is_refused(make_model, tokenizer):
    options = {"support": "choices"}
    with pytest.raises(ValueError, match="answers of one token.*set cache.support: top_k"):
        answer_set(make_model(), Dataset.from_dict(ROWS), TASK, tokenizer, top_k=5, tokens_per_batch=64, **options)

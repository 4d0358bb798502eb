"""Scoring reads the right hidden states, whatever the batching; whole answers are sums over their tokens."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from first_trl.evaluation import answer_set, collect, predictions, read_answers, recalibrated_answers
from first_trl.scoring import answer_scores, length_batches, sequence_log_probs, teacher_rows
from first_trl.settings import TaskConfig
from tests.test_trainer import random_examples


def log_probs_after(model, prompt):
    """(V,) of the token after a prompt, in float64."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1).numpy()


def test_batches_keep_to_the_token_budget_lose_no_row_and_pad_little():
    lengths = [3, 9, 1, 4, 4, 7, 2, 30]
    batches = length_batches(lengths, tokens_per_batch=12)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 12 for batch in batches)
    assert batches[0] == [7]  # longer than the budget, alone
    lengths = [100] * 3 + [80] * 4 + [20] * 40
    assert [len(batch) for batch in length_batches(lengths, 800)] == [7, 40]
    assert [len(batch) for batch in length_batches(lengths, 8000)] == [10, 37]  # 1,000 tokens are worth a batch
    assert [len(batch) for batch in length_batches(lengths, 80_000)] == [47]


@pytest.mark.parametrize("kept", [None, [40, 7, 12, 3]], ids=["top_k", "given"])
@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_teacher_rows_are_the_log_softmax_at_the_supervised_positions(make_model, tokens_per_batch, kept):
    model, examples, seen = make_model(vocab_size=50).eval(), random_examples(6, 50), []
    settings = {"top_k": 4, "tokens_per_batch": tokens_per_batch, "kept_ids": kept}
    rows = teacher_rows(model, examples, progress=seen.append, **settings)
    assert sum(seen) == sum(len(example["input_ids"]) for example in examples)
    for example, row in zip(examples, rows, strict=True):
        places = [i for i in range(1, len(example["labels"])) if example["labels"][i] != -100]
        log_probs = np.stack([log_probs_after(model, example["input_ids"][:place]) for place in places])
        candidates = np.arange(50) if kept is None else np.array(kept)
        ids = candidates[np.argsort(-log_probs[:, candidates], axis=1)[:, :4]]
        np.testing.assert_array_equal(row["teacher_ids"], ids)
        expected = np.take_along_axis(log_probs, ids, axis=1)
        np.testing.assert_allclose(row["teacher_log_probs"], expected, atol=2e-5)
        np.testing.assert_allclose(np.exp(row["teacher_tail_log_prob"]), 1 - np.exp(expected).sum(1), atol=2e-5)


def test_padding_rows_of_the_head_are_never_among_the_teachers_tokens(make_model):
    model, settings = make_model(vocab_size=64).eval(), {"top_k": 5, "tokens_per_batch": 100, "vocab_limit": 20}
    assert max(int(row["teacher_ids"].max()) for row in teacher_rows(model, random_examples(9, 20), **settings)) < 20


def test_answers_come_with_label_and_choice_probabilities_even_where_they_coincide(make_model):
    model = make_model(vocab_size=50).eval()
    prompts = [example["input_ids"] for example in random_examples(9, 50)]
    expected = np.stack([log_probs_after(model, prompt) for prompt in prompts])
    labels = expected.argmax(1).tolist()[:5] + [7, 8, 9, 10]
    scores = answer_scores(model, prompts, labels, [7, 8, 9], top_k=3, tokens_per_batch=40)
    np.testing.assert_array_equal(scores["token_ids"][:, 0], expected.argmax(1))
    np.testing.assert_allclose(scores["label_log_prob"], expected[np.arange(9), labels], atol=2e-5)
    np.testing.assert_allclose(scores["choice_log_probs"], expected[:, [7, 8, 9]], atol=2e-5)
    assert (scores["target"][:5] == 0).all() and set(scores["target"]) <= {0, 1, 2, 3}


# Answers of several tokens

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
    """(N, C), one token after the other."""
    return np.array(
        [
            [
                sum(log_probs_after(model, prompt + sequence[:i])[token] for i, token in enumerate(sequence))
                for sequence in sequences
            ]
            for prompt in prompts
        ]
    )


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_a_sequence_is_as_likely_as_its_tokens_one_after_the_other(make_model, tokens_per_batch):
    model = make_model(vocab_size=50).eval()
    prompts = [example["input_ids"] for example in random_examples(7, 50)]
    sequences = [[4], [4, 9, 2], [4, 9], [30, 30, 30, 30], [11, 4]]
    found = sequence_log_probs(model, prompts, sequences, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(found, summed_log_probs(model, prompts, sequences), atol=5e-5)


@pytest.fixture
def answers(make_model, tokenizer, tmp_path):
    """(answers as they are kept, (N, C) log-probabilities of the choices)."""
    model = make_model(vocab_size=len(tokenizer)).eval()
    answered = answer_set(model, Dataset.from_dict(ROWS), TASK, tokenizer, top_k=5, tokens_per_batch=64)
    answered.to_parquet(tmp_path / "answers.parquet")
    prompts = [tokenizer(f"Review : {text} Sentiment :")["input_ids"] for text in ROWS["text"]]
    sequences = [[*tokenizer(choice)["input_ids"], tokenizer.eos_token_id] for choice in TASK.choices]
    return read_answers(tmp_path / "answers.parquet"), summed_log_probs(model, prompts, sequences)


def test_whole_answers_are_predicted_and_recalibrated_among_themselves(answers):
    rows, expected = answers
    labels = np.array([TASK.choices.index(label) for label in ROWS["label"]])
    found, probs = predictions(rows), np.exp(expected)
    np.testing.assert_allclose(found["confidence"], probs.max(1), rtol=1e-4)
    assert found["correct"].tolist() == found["choice_correct"].tolist() == (probs.argmax(1) == labels).tolist()
    np.testing.assert_allclose(found["label_log_prob"], expected[np.arange(4), labels], atol=1e-4)
    np.testing.assert_allclose(found["choice_confidence"], (probs / probs.sum(1, keepdims=True)).max(1), rtol=1e-4)
    np.testing.assert_allclose(np.exp(rows["log_probs"][:, -1]), 1 - probs.sum(1), rtol=1e-4)

    recalibrated, roots = recalibrated_answers(rows, "temperature", 2.0), np.exp(expected / 2)
    inside = probs.sum(1, keepdims=True) * roots / roots.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(recalibrated["choice_log_probs"]), inside, rtol=1e-3)
    np.testing.assert_allclose(recalibrated["log_probs"][:, -1], rows["log_probs"][:, -1], rtol=1e-6)


def test_the_teachers_recalibration_is_fitted_again_on_whole_answers(answers, tmp_path):
    for model in ("teacher", "fine_tuned"):
        (tmp_path / model).mkdir()
        for name in ("validation", "test"):
            (tmp_path / model / f"{name}.parquet").write_bytes((tmp_path / "answers.parquet").read_bytes())
    calibration = {"method": "temperature", "value": 7.77, "criterion": "nll", "num_bins": 10, "families": {}}
    found = collect(tmp_path, ["teacher", "fine_tuned"], {"fine_tuned": 2.0}, ["test"], calibration)
    method, value = found.fitted["teacher_recalibrated"]
    assert method == "temperature" and value != 7.77
    before, after = (found.predictions[f"fine_tuned{suffix}"]["test"] for suffix in ("", "_post_hoc"))
    assert (after["choice_confidence"] <= before["choice_confidence"] + 1e-6).all()


def test_what_is_for_single_tokens_is_refused(make_model, tokenizer):
    settings = {"top_k": 5, "tokens_per_batch": 64, "support": "choices"}
    with pytest.raises(ValueError, match="answers of one token.*set cache.support: top_k"):
        answer_set(make_model(), Dataset.from_dict(ROWS), TASK, tokenizer, **settings)

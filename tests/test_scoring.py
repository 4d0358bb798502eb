"""Scoring reads the right hidden states, whatever the batching."""

import numpy as np
import pytest
import torch

from first_trl.scoring import answer_scores, length_batches, teacher_rows
from tests.test_trainer import random_examples


def test_batches_keep_to_the_token_budget_and_lose_nobody():
    lengths = [3, 9, 1, 4, 4, 7, 2, 30]
    batches = length_batches(lengths, tokens_per_batch=12)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 12 for batch in batches)
    assert batches[0] == [7]  # longer than the budget, alone


def test_short_examples_are_not_padded_to_long_ones_unless_a_batch_would_be_tiny():
    lengths = [100] * 3 + [80] * 4 + [20] * 40
    assert [len(batch) for batch in length_batches(lengths, 800)] == [7, 40]
    assert [len(batch) for batch in length_batches(lengths, 8000)] == [10, 37]  # 1,000 tokens are worth a batch
    assert [len(batch) for batch in length_batches(lengths, 80_000)] == [47]


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_teacher_rows_are_the_log_softmax_at_the_supervised_positions(make_model, tokens_per_batch):
    model = make_model(vocab_size=50).eval()
    examples = random_examples(9, 50)
    seen = []
    rows = teacher_rows(model, examples, top_k=4, tokens_per_batch=tokens_per_batch, progress=seen.append)
    assert sum(seen) == sum(len(example["input_ids"]) for example in examples)
    for example, row in zip(examples, rows, strict=True):
        assert row["input_ids"] == example["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0].double()
        supervised = [i for i in range(1, len(example["labels"])) if example["labels"][i] != -100]
        log_probs = logits.log_softmax(-1)[[i - 1 for i in supervised]]
        expected, ids = log_probs.topk(4)
        np.testing.assert_array_equal(row["teacher_ids"], ids.numpy())
        np.testing.assert_allclose(row["teacher_log_probs"], expected.numpy(), atol=2e-5)
        tail = log_probs.scatter(1, ids, -torch.inf).logsumexp(1)
        np.testing.assert_allclose(row["teacher_tail_log_prob"], tail.numpy(), atol=2e-5)


def test_padding_rows_of_the_head_are_never_among_the_teachers_tokens(make_model):
    rows = teacher_rows(
        make_model(vocab_size=64).eval(), random_examples(9, 20), top_k=5, tokens_per_batch=100, vocab_limit=20
    )
    assert max(int(row["teacher_ids"].max()) for row in rows) < 20


def test_answers_come_with_label_and_choice_probabilities_even_where_they_coincide(make_model):
    model = make_model(vocab_size=50).eval()
    prompts = [example["input_ids"] for example in random_examples(9, 50)]
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]).numpy()
    labels = expected.argmax(1).tolist()[:5] + [7, 8, 9, 10]
    scores = answer_scores(model, prompts, labels, [7, 8, 9], top_k=3, tokens_per_batch=40)
    np.testing.assert_array_equal(scores["token_ids"][:, 0], expected.argmax(1))
    np.testing.assert_allclose(scores["label_log_prob"], expected[np.arange(9), labels], atol=2e-5)
    np.testing.assert_allclose(scores["choice_log_probs"], expected[:, [7, 8, 9]], atol=2e-5)
    assert (scores["target"][:5] == 0).all()
    assert set(scores["target"]) <= {0, 1, 2, 3}

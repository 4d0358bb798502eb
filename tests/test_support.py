"""A cache of the choices: their tokens whatever their rank, a tail of everything else, and the same for every arm."""

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset

from first_trl.cache.arrays import calibration_rows
from first_trl.cache.format import CacheError
from first_trl.cache.identity import open_recipe_cache
from first_trl.evaluation import answer_set, predictions, read_answers, recalibrated_answers
from first_trl.recipe import RecipeError, load_recipe, teacher_section
from first_trl.settings import TaskConfig
from first_trl.stages import cache, calibrate
from tests.cache_recipe import write_recipe

CHOICES = ["good", "bad", "fine"]
TASK = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "max_length": 60, "append_eos": False}
TASK["choices"] = CHOICES


@pytest.fixture(autouse=True)
def on_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def full_log_probs(model, prompts):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]).numpy()


def test_the_stages_keep_the_choices_and_recalibrate_among_them(tmp_path, tokenizer, make_model):
    path = write_recipe(tmp_path, rows=12, task=TASK, cache={"support": "choices"})
    cache.main([str(path)])
    calibrate.main([str(path), "--bootstrap=0"])
    recipe = load_recipe(path)
    opened = open_recipe_cache(recipe, "train", recipe.cache.teacher, teacher_section(recipe))
    assert (opened.manifest["support"], opened.manifest["top_k"]) == ("choices", 3)
    expected = {tokenizer.vocab[choice] for choice in CHOICES}
    assert len(opened.dataset) == 12
    for row in opened.dataset:
        assert set(row["teacher_ids"][0]) == expected and len(row["teacher_ids"]) == 1
        assert row["teacher_log_probs"][0] == sorted(row["teacher_log_probs"][0], reverse=True)
    assert (calibration_rows(opened.dataset).target < 3).all()  # the label is always among the choices
    other = load_recipe(path, ["--cache.support", "top_k", "--cache.top_k", "3"])
    with pytest.raises(CacheError, match="support is 'choices', expected 'top_k'.*set cache.support"):
        open_recipe_cache(other, "train", recipe.cache.teacher, teacher_section(recipe))


def test_answers_are_recalibrated_over_the_same_tokens_as_the_teacher(make_model, tokenizer, tmp_path):
    rows = Dataset.from_dict(
        {"text": ["the film is great", "a dull plot", "so slow"], "label": ["good", "bad", "bad"]}
    )
    model, task = make_model(vocab_size=len(tokenizer)).eval(), TaskConfig(**TASK)
    answer_set(model, rows, task, tokenizer, top_k=5, tokens_per_batch=64, support="choices").to_parquet(
        tmp_path / "answers.parquet"
    )
    answers = read_answers(tmp_path / "answers.parquet")
    prompts = [tokenizer(f"Review : {text} Sentiment :")["input_ids"] for text in rows["text"]]
    expected = full_log_probs(model, prompts)
    ids = [tokenizer.vocab[choice] for choice in CHOICES]
    np.testing.assert_allclose(answers["log_probs"][:, :3], -np.sort(-expected[:, ids], axis=1), atol=2e-5)
    outside = expected.copy()
    outside[:, ids] = -np.inf
    np.testing.assert_allclose(answers["tail_max_log_prob"], outside.max(1), atol=2e-5)
    found = predictions(answers)
    np.testing.assert_allclose(found["confidence"], np.exp(expected.max(1)), rtol=1e-4)
    labels = [tokenizer.vocab[label] for label in rows["label"]]
    assert found["correct"].tolist() == (expected.argmax(1) == labels).tolist()
    recalibrated = recalibrated_answers(answers, "temperature", 3.0)
    np.testing.assert_allclose(recalibrated["log_probs"][:, -1], answers["log_probs"][:, -1], rtol=1e-5)
    np.testing.assert_allclose(recalibrated["tail_max_log_prob"], answers["tail_max_log_prob"], rtol=1e-5)


def test_a_token_outside_the_choices_that_is_likelier_than_all_of_them_is_a_wrong_answer():
    answers = {
        "token_ids": np.array([[3, 4]]),
        "log_probs": np.log([[0.3, 0.1, 0.6]]),
        "target": np.array([0]),
        "label_log_prob": np.log([0.3]),
        "tail_max_log_prob": np.log([0.5]),
    }
    found = predictions(answers)
    assert found["confidence"] == pytest.approx([0.5]) and found["correct"].tolist() == [False]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"choices": None}, [], "cache.support.*choices"),
        ({"append_eos": True}, [], "append_eos.*cache.support: top_k"),
        ({}, ["--cache.backend=server", "--cache.server_url=http://127.0.0.1:8000"], "cache.support.*backend: hf"),
    ],
)
def test_a_recipe_that_cannot_keep_the_choices_alone_is_refused(tmp_path, change, options, message):
    path = write_recipe(tmp_path, rows=4, task=TASK | change, cache={"support": "choices"})
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, options)


def test_a_row_with_more_than_its_answer_supervised_is_refused_with_the_remedy(tmp_path):
    path = write_recipe(tmp_path, rows=4, task=TASK | {"completion": " {label} ."}, cache={"support": "choices"})
    with pytest.raises(SystemExit, match="datasets.train, row 0: .* are supervised.*set cache.support: top_k"):
        cache.main([str(path)])

"""The generated demo: its probabilities are true, its splits are apart, its models are what the recipe needs."""

import json
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from first_trl import demo
from first_trl.demo.models import (
    LAYERS,
    PROMPT,
    build_model,
    build_tokenizer,
    pretrain,
    unlabelled_texts,
    write_models,
)
from first_trl.demo.task import SPLITS, STYLES, TEAMS, THINGS, team_probabilities, tickets, write_task
from first_trl.files import file_digest, files_of
from first_trl.recipe import load_recipe


@pytest.fixture(scope="module")
def texts():
    return unlabelled_texts(2000, seed=0, seen=set())


@pytest.fixture(scope="module")
def tokenizer(texts):
    return build_tokenizer(texts)


def test_the_example_of_the_docstring_has_the_probabilities_that_it_states():
    probabilities = team_probabilities([("network", True), ("billing", False)])
    assert [round(p, 2) for p in probabilities] == [0.16, 0.72, 0.06, 0.06]


@pytest.mark.parametrize("style", STYLES)
def test_labels_come_as_often_as_their_true_probabilities_say(style):
    rows = list(tickets(random.Random(0), 20_000, style, set()))
    for i, team in enumerate(TEAMS):
        for low in (0.0, 0.1, 0.25, 0.5, 0.75):
            here = [row for row in rows if low <= row["true_probabilities"][i] < low + 0.25]
            if len(here) > 500:
                stated = sum(row["true_probabilities"][i] for row in here) / len(here)
                seen = sum(row["label"] == team for row in here) / len(here)
                assert abs(stated - seen) < 4 * (stated * (1 - stated) / len(here)) ** 0.5, (team, low)
    best = [TEAMS[max(range(4), key=row["true_probabilities"].__getitem__)] for row in rows]
    accuracy = sum(answer == row["label"] for answer, row in zip(best, rows, strict=True)) / len(rows)
    assert abs(accuracy - sum(row["true_probability"] for row in rows) / len(rows)) < 0.015
    assert style == "phoned" or 0.6 < accuracy < 0.75


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_ones(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_task(tmp_path / name, seed, most=40)
    for split in SPLITS:
        a, b, c = ((tmp_path / name / f"{split}.jsonl").read_bytes() for name in "abc")
        assert a == b != c


def test_no_ticket_is_in_two_splits_or_among_those_of_pre_training(tmp_path):
    seen = write_task(tmp_path)
    lines = [line for split in SPLITS for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
    rows = [json.loads(line)["text"] for line in lines]
    assert len(rows) == sum(count for count, _ in SPLITS.values()) == len(set(rows))
    assert set(rows) == seen
    documents = unlabelled_texts(2000, seed=0, seen=seen)
    assert not {document.removeprefix("Ticket: ").split("\nTeam:")[0] for document in documents} & set(rows)


def test_pre_training_shows_no_team_more_than_another_whatever_the_ticket(texts):
    for team, words in THINGS.items():
        about = [text for text in texts if any(f" {thing} " in text for thing in words[0])]
        shown = Counter(text.split("Team: ")[1].removesuffix("<|endoftext|>") for text in about)
        assert set(shown) == set(TEAMS) and len(about) > 200
        assert abs(shown[team] / len(about) - 0.25) < 4 * (0.25 * 0.75 / len(about)) ** 0.5


def test_the_tokenizer_gives_back_every_text_and_makes_one_token_of_every_answer(tokenizer, texts):
    for text in [*texts[:50], "Über 3 routers — ok?\n\ttab", "<|endoftext|> inside"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer(texts[0])["input_ids"][-1] == tokenizer.eos_token_id
    prompt = tokenizer(PROMPT.format(text="my router is slow."))["input_ids"]
    for team in TEAMS:
        whole = tokenizer(PROMPT.format(text="my router is slow.") + f" {team}")["input_ids"]
        assert whole[:-1] == prompt and len(whole) == len(prompt) + 1
    longest = max(map(len, tokenizer(texts)["input_ids"]))
    assert longest <= yaml.safe_load(demo.RECIPE.read_text(encoding="utf-8"))["task"]["max_length"]


def test_models_are_saved_whole_and_are_the_same_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("first_trl.demo.models.unlabelled_texts", lambda _, *seed: unlabelled_texts(600, *seed))
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_models(tmp_path / folder, seed, seen=set(), steps=2)
    parameters = {}
    for name in LAYERS:
        made = [tmp_path / folder / name for folder in "abc"]
        a, b, c = ([(file, file_digest(folder / file)) for file in files_of(folder)] for folder in made)
        assert a == b != c
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / name)
        assert len(tokenizer) == model.config.vocab_size and model.config.hidden_size % 64 == 0  # the block of NF4
        assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
        parameters[name] = model.num_parameters()
    assert parameters["student"] < parameters["teacher"] < 1_000_000


def test_pre_training_lowers_the_loss_well_below_that_of_guessing_words(tokenizer, texts):
    model = build_model(LAYERS["student"], tokenizer, seed=0)
    assert pretrain(model, tokenizer(texts)["input_ids"], seed=0, steps=20) < 2.5 < math.log(len(tokenizer)) / 2


def test_the_recipe_is_whole_and_asks_what_the_models_were_prepared_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_DEMO", "")
    monkeypatch.setattr("first_trl.demo.models.write_models", partial(write_models, steps=1))
    recipe = load_recipe(demo.prepare_demo(tmp_path))
    assert recipe.task.prompt == PROMPT and tuple(recipe.task.choices) == TEAMS
    assert recipe.run_folder == tmp_path / "demo"
    assert list(recipe.arms) == ["fine_tuned", "distilled", "first"]
    data = recipe.datasets
    splits = [data.train, data.transfer, data.validation, *data.test.values()]
    assert [Path(split.data_files).stem for split in splits] == list(SPLITS)
    assert [test.out_of_domain for test in data.test.values()] == [False, True]
    assert recipe.distill["load_in_4bit"] and recipe.distill["use_peft"]


def test_the_demo_is_prepared_once_and_anew_after_an_interruption_or_for_another_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_DEMO", "")
    made = []

    def write(folder, seed, seen):
        made.append(seed)
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("first_trl.demo.models.write_models", write)
    with pytest.raises(KeyboardInterrupt):
        demo.prepare_demo(tmp_path)
    for seed in (0, 0, 1):
        assert demo.prepare_demo(tmp_path, seed) == demo.RECIPE
    assert made == [0, 0, 1] and (tmp_path / demo.INPUTS / "data" / "train.jsonl").is_file()

"""The generated demo: its probabilities are true, its splits are apart, its models are what the recipe needs."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from first_trl import demo
from first_trl.demo.models import BASES, PROMPT, build_model, build_tokenizer, pretrain, unlabelled_texts, write_models
from first_trl.demo.task import SPLITS, STYLES, TEAMS, THINGS, team_probabilities, tickets, write_task
from first_trl.files import file_digest, files_of
from first_trl.recipe import load_recipe

FEW = dict.fromkeys(SPLITS, 40)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    assert all(abs(sum(row["true_probabilities"]) - 1) < 1e-9 for row in rows)
    for i, team in enumerate(TEAMS):
        for low in (0.0, 0.1, 0.25, 0.5, 0.75):
            here = [row for row in rows if low <= row["true_probabilities"][i] < low + 0.25]
            if len(here) > 500:
                stated = sum(row["true_probabilities"][i] for row in here) / len(here)
                seen = sum(row["label"] == team for row in here) / len(here)
                assert abs(stated - seen) < 4 * (stated * (1 - stated) / len(here)) ** 0.5, (team, low)


def test_the_best_possible_answer_is_right_as_often_as_true_probability_says_and_not_always():
    rows = list(tickets(random.Random(1), 20_000, "written", set()))
    best = [TEAMS[max(range(4), key=row["true_probabilities"].__getitem__)] for row in rows]
    accuracy = sum(answer == row["label"] for answer, row in zip(best, rows, strict=True)) / len(rows)
    assert abs(accuracy - sum(row["true_probability"] for row in rows) / len(rows)) < 0.015
    assert 0.6 < accuracy < 0.75
    assert min(Counter(row["label"] for row in rows).values()) > 0.22 * len(rows)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_ones(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_task(tmp_path / name, seed, FEW)
    for split in SPLITS:
        a, b, c = ((tmp_path / name / f"{split}.jsonl").read_bytes() for name in "abc")
        assert a == b != c


def test_no_ticket_is_in_two_splits_or_among_those_of_pre_training(tmp_path):
    seen = write_task(tmp_path)
    rows = [row["text"] for split in SPLITS for row in read(tmp_path / f"{split}.jsonl")]
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


def test_an_unknown_split_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no split 'training'; choose from train, transfer"):
        write_task(tmp_path, rows={"training": 5})


def test_the_tokenizer_gives_back_every_text_and_pads_and_ends(tokenizer, texts):
    for text in [*texts[:50], "Über 3 routers — ok?\n\ttab", "<|endoftext|> inside"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer(texts[0])["input_ids"][-1] == tokenizer.eos_token_id


def test_every_answer_is_one_token_after_the_prompt(tokenizer):
    prompt = tokenizer(PROMPT.format(text="my router is slow."))["input_ids"]
    for team in TEAMS:
        whole = tokenizer(PROMPT.format(text="my router is slow.") + f" {team}")["input_ids"]
        assert whole[:-1] == prompt and len(whole) == len(prompt) + 1


def test_tickets_are_short_enough_for_the_recipe(tokenizer, texts):
    longest = max(map(len, tokenizer(texts)["input_ids"]))
    assert longest <= yaml.safe_load(demo.RECIPE.read_text(encoding="utf-8"))["task"]["max_length"]


def test_models_are_saved_whole_and_are_the_same_for_the_same_seed(tmp_path):
    tiny = {name: replace(base, steps=2) for name, base in BASES.items()}
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_models(tmp_path / folder, seed, seen=set(), bases=tiny)
    parameters = {}
    for name in BASES:
        made = [tmp_path / folder / name for folder in "abc"]
        a, b, c = ([(file, file_digest(folder / file)) for file in files_of(folder)] for folder in made)
        assert a == b != c
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / name)
        assert model.config.hidden_size % 64 == 0  # the block of NF4
        assert len(tokenizer) == model.config.vocab_size
        assert (model.config.eos_token_id, model.config.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        parameters[name] = model.num_parameters()
    assert parameters["student"] < parameters["teacher"] < 1_000_000


def test_pre_training_lowers_the_loss_well_below_that_of_guessing_words(tokenizer, texts):
    base = replace(BASES["student"], steps=40, learning_rate=1e-2)
    loss = pretrain(build_model(base, tokenizer, seed=0), base, tokenizer(texts)["input_ids"], seed=0)
    assert loss < 2.5 < math.log(len(tokenizer)) / 2


def test_the_recipe_is_whole_and_asks_what_the_models_were_prepared_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_DEMO", "")
    tiny = {name: replace(base, steps=1) for name, base in BASES.items()}
    write_few = partial(write_models, bases=tiny)
    monkeypatch.setattr("first_trl.demo.models.write_models", write_few)
    recipe = load_recipe(demo.prepare_demo(tmp_path))
    assert recipe.task.prompt == PROMPT and tuple(recipe.task.choices) == TEAMS
    assert recipe.run_folder == tmp_path / "demo"
    assert list(recipe.arms) == ["fine_tuned", "distilled", "first"]
    data = recipe.datasets
    splits = [data.train, data.transfer, data.validation, *data.test.values()]
    assert [Path(split.data_files).stem for split in splits] == list(SPLITS)
    assert [test.out_of_domain for test in data.test.values()] == [False, True]
    assert recipe.distill["load_in_4bit"] and recipe.distill["use_peft"]


def test_preparing_the_demo_twice_makes_it_once_and_again_for_another_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_DEMO", "")
    made = []
    monkeypatch.setattr(
        "first_trl.demo.models.write_models", lambda folder, seed, seen: made.append((seed, len(seen)))
    )
    for seed in (0, 0, 1):
        assert demo.prepare_demo(tmp_path, seed) == demo.RECIPE
    assert [seed for seed, _ in made] == [0, 1]
    assert (tmp_path / demo.INPUTS / "data" / "train.jsonl").is_file()


def test_a_preparation_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_DEMO", "")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("first_trl.demo.models.write_models", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.prepare_demo(tmp_path)
    made = []
    monkeypatch.setattr("first_trl.demo.models.write_models", lambda *args, **kwargs: made.append(args))
    demo.prepare_demo(tmp_path)
    assert len(made) == 1

"""Every shipped recipe reads, renders its data and makes valid settings of TRL, without a network or weights."""

from pathlib import Path

import pytest

from first_trl.constants import DEFAULT_ARMS
from first_trl.recipe import load_recipe
from first_trl.templates import render_template

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
PAIRS = ("qwen3-8b_to_qwen3-0.6b", "llama-3.1-8b_to_llama-3.2-1b")
HUB = {f"{folder}/{pair}.yaml" for folder in ("commonsense_qa", "openbookqa", "boolq", "alpaca") for pair in PAIRS} | {
    "commonsense_qa/qwen3-8b_to_qwen3-0.6b_24gb.yaml"
}
TABLE = {f"paper_table/{name}.yaml" for name in ("commonsense_qa", "boolq", "alpaca")}
HUB |= TABLE
LOCAL = {"reviews.yaml", "paper_table/reviews.yaml"}
# The rows of the paper's table: what the student learns from.
TABLE_ARMS = {
    "fine_tuned": {"trainer": "sft"},
    "distilled": {"recalibration_method": "none"},
    "first_label_smoothing": {"recalibration_method": "label_smoothing"},
    "first_probability": {"recalibration_method": "probability"},
    "first": {"recalibration_method": "temperature"},
}
# A row of each dataset, with the columns and the nesting that it has on the Hub.
FIVE = {"label": ["A", "B", "C", "D", "E"], "text": ["ignore", "enforce", "authoritarian", "yell at", "avoid"]}
ROWS = {
    "json": {"text": "a fine film .", "label": "good"},
    "tau/commonsense_qa": {"question": "What do laws do?", "choices": FIVE, "answerKey": "B"},
    "allenai/openbookqa": {
        "question_stem": "The sun is responsible for",
        "choices": {key: values[:4] for key, values in FIVE.items()},
        "answerKey": "D",
    },
    "google/boolq": {"question": "is it so", "passage": "It is so.", "answer": True},
    "yahma/alpaca-cleaned": {"instruction": "Name a colour.", "input": "", "output": "Red."},
}


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """The files that the recipes for local data name, under the folder that their variable gives."""
    for name in ("train", "validation", "test", "test_long_reviews"):
        (tmp_path / "data" / "reviews").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "reviews" / f"{name}.jsonl").write_text('{"text": "a", "label": "good"}\n')
    for name in ("reviews-teacher-base", "reviews-student-base"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.setenv("FIRST_DATA", str(tmp_path))


def test_these_recipes_are_shipped_and_each_is_tested():
    assert set(RECIPES) == HUB | LOCAL
    assert len(RECIPES) == 14 and sum(name.startswith("paper_table/") for name in RECIPES) == 4


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_reads_and_has_the_arms_of_a_fair_comparison(name):
    recipe = load_recipe(FOLDER / name)
    assert recipe.arms == (TABLE_ARMS if name.startswith("paper_table/") else DEFAULT_ARMS)
    assert recipe.distill["load_in_4bit"] and recipe.distill["use_peft"]
    assert recipe.cache.top_k == 5
    assert any(test.out_of_domain for test in recipe.datasets.test.values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_split_renders_with_the_task_that_it_has(name):
    from first_trl.evaluation import test_task as task_of

    recipe = load_recipe(FOLDER / name)
    splits = [(recipe.datasets.train, recipe.task), (recipe.datasets.validation, recipe.task)]
    splits += [(test, task_of(recipe.task, test.task)) for test in recipe.datasets.test.values()]
    for split, task in splits:
        prompt = render_template(task.prompt, ROWS[split.path])
        completion = render_template(task.completion, ROWS[split.path])
        assert prompt.endswith(":") and completion.startswith(" ")
        assert task.choices is None or completion.strip() in task.choices
        # Answers that follow a letter or a word must be the options that the prompt shows.
        if "choices" in ROWS[split.path]:
            assert [f"{letter}. " in prompt for letter in "ABCDE"] == [letter in task.choices for letter in "ABCDE"]
    assert len(splits) >= 4


@pytest.mark.parametrize("name", RECIPES)
def test_trl_and_peft_accept_the_settings_of_every_training_run(name, tmp_path):
    from peft import LoraConfig
    from trl import SFTConfig

    from first_trl.first_config import FIRSTConfig
    from first_trl.training import model_arguments, training_arguments

    recipe = load_recipe(FOLDER / name)
    runs = [(recipe.sft, SFTConfig)]
    for arm in recipe.arms:
        runs.append((recipe.arm_section(arm), SFTConfig if recipe.arm_trainer(arm) == "sft" else FIRSTConfig))
    for section, config_class in runs:
        found = (
            {"recalibration_value": 0.3} if section.get("recalibration_method", "none") != "none" else {}
        )  # as the stage adds it
        section = {**section, **found, "use_cpu": True}
        args, model_args = training_arguments(section, config_class, tmp_path, recipe.seed)
        arguments = model_arguments(model_args)
        assert args.learning_rate == section["learning_rate"]
        assert (arguments["quantization_config"] is not None) == section.get("load_in_4bit", False)
        assert isinstance(arguments["peft_config"], LoraConfig) == section.get("use_peft", False)
    assert len(runs) == (6 if name.startswith("paper_table/") else 4)


@pytest.mark.parametrize("name", sorted(HUB))
def test_the_hub_recipes_report_on_the_papers_sets_out_of_domain(name):
    recipe = load_recipe(FOLDER / name)
    own = Path(name).stem if name in TABLE else name.partition("/")[0]
    elsewhere = {"allenai/openbookqa", "tau/commonsense_qa"} - {f"tau/{own}", f"allenai/{own}"}
    assert {test.path for test in recipe.datasets.test.values() if test.out_of_domain} == elsewhere
    assert (recipe.calibrate.positions == "all") == (own == "alpaca")
    assert recipe.sft["report_to"] == "trackio" and recipe.sft["bf16"] and recipe.sft["gradient_checkpointing"]


def test_recipes_for_the_same_data_ask_the_same_question():
    asked: dict[str, set] = {}
    for name in sorted(HUB):
        if "alpaca" in name:
            continue  # asks in the shape of its own instructions
        recipe = load_recipe(FOLDER / name)
        for test in recipe.datasets.test.values():
            task = {"prompt": recipe.task.prompt, "choices": recipe.task.choices} | (test.task or {})
            asked.setdefault(test.path, set()).add((task["prompt"], *task["choices"]))
    assert {path: len(prompts) for path, prompts in asked.items()} == dict.fromkeys(asked, 1)
    assert len(asked) == 3


def test_the_recipe_for_one_small_gpu_runs_its_teacher_in_4_bit_throughout():
    recipe = load_recipe(FOLDER / "commonsense_qa/qwen3-8b_to_qwen3-0.6b_24gb.yaml")
    assert recipe.sft["load_in_4bit"] and recipe.sft["use_peft"] and recipe.cache.load_in_4bit


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_local_paths_come_from_one_variable(name):
    text = (FOLDER / name).read_text()
    assert text.count("${FIRST_DATA:-../shared}/") == 7
    assert text.count("../shared") == 8  # and once where it is explained


def test_the_tables_are_the_recipes_of_their_data_with_more_arms_and_the_papers_five_tokens():
    for name in sorted(TABLE):
        own = load_recipe(FOLDER / Path(name).stem / "llama-3.1-8b_to_llama-3.2-1b.yaml").to_dict()
        table = load_recipe(FOLDER / name).to_dict()
        assert {key for key in own if own[key] != table[key]} == {"name", "arms"}
    reviews, table = (load_recipe(FOLDER / name).to_dict() for name in ("reviews.yaml", "paper_table/reviews.yaml"))
    assert {key for key in reviews if reviews[key] != table[key]} == {"name", "arms", "cache"}
    assert table["cache"]["top_k"] == 5 and table["cache"]["support"] == "top_k"

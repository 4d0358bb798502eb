"""Every shipped recipe reads, renders its data and makes valid settings of TRL, without a network or weights."""

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig
from trl import SFTConfig, get_peft_config, get_quantization_config

from first_trl.constants import DEFAULT_ARMS
from first_trl.data.choices import choice_token_ids
from first_trl.evaluation import task_of_set as task_of
from first_trl.first_config import FIRSTConfig
from first_trl.modeling import load_tokenizer
from first_trl.recipe import load_recipe
from first_trl.schema import recipe_schema, settings_tables
from first_trl.templates import render_template
from first_trl.training import training_arguments
from tests.tiny import build_tokenizer

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes"
RECIPES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
TABLE = {f"paper_table/{name}.yaml" for name in ("commonsense_qa", "boolq", "alpaca")}
LOCAL = {"reviews.yaml", "paper_table/reviews.yaml"}
CLOSED_CHAT = "chat/commonsense_qa_qwen3-8b_to_qwen3-0.6b.yaml"
CHAT = [name for name in RECIPES if name.startswith("chat/") and name != CLOSED_CHAT]
HUB = sorted(set(RECIPES) - LOCAL - {*CHAT, CLOSED_CHAT})
# The rows of the paper's table: what the student learns from.
TABLE_ARMS = {
    "fine_tuned": {"trainer": "sft"},
    "distilled": {"recalibration_method": "none"},
    "first_label_smoothing": {"recalibration_method": "label_smoothing"},
    "first_as_published": {"recalibration_method": "probability", "tail": "renormalize"},
    "first_probability": {"recalibration_method": "probability"},
    "first": {"recalibration_method": "temperature"},
}
# A row of each dataset, with the columns and the nesting that it has on the Hub.
FIVE = {"label": ["A", "B", "C", "D", "E"], "text": ["ignore", "enforce", "authoritarian", "yell at", "avoid"]}
ROWS = {
    "json": {"text": "a fine film .", "label": "good"},
    "tau/commonsense_qa": {"question": "What do laws do?", "choices": FIVE, "answerKey": "B"},
    "allenai/openbookqa": {"question_stem": "The", "choices": {k: v[:4] for k, v in FIVE.items()}, "answerKey": "D"},
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


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_reads_and_has_the_arms_of_a_fair_comparison(name):
    assert LOCAL | TABLE | {*CHAT} < set(RECIPES) and len(RECIPES) >= 14 and CHAT
    recipe = load_recipe(FOLDER / name)
    assert recipe.arms == (TABLE_ARMS if name.startswith("paper_table/") else DEFAULT_ARMS)
    assert recipe.distill["load_in_4bit"] and recipe.distill["use_peft"]
    assert "max_steps" in recipe.distill  # as many steps for each arm, whichever rows it learns
    assert recipe.cache.top_k == 5 and recipe.datasets.transfer is not None
    assert any(test.out_of_domain for test in recipe.datasets.test.values())
    schema = (FOLDER / name).read_text().splitlines()[0].partition("$schema=")[2]
    assert ((FOLDER / name).parent / schema).resolve() == FOLDER / "schema.json"


@pytest.mark.parametrize("name", CHAT)
def test_recipes_of_conversations_take_models_with_a_template_and_do_not_think(name):
    recipe = load_recipe(FOLDER / name)
    assert recipe.task.prompt is None and recipe.task.chat_template_kwargs == {"enable_thinking": False}
    assert "Base" not in recipe.sft["model_name_or_path"] + recipe.distill["model_name_or_path"]
    assert recipe.calibrate.positions == "all"


@pytest.mark.parametrize("name", sorted({*RECIPES} - {*CHAT}))
def test_every_split_renders_with_the_task_that_it_has(name):
    recipe = load_recipe(FOLDER / name)
    data = recipe.datasets
    splits = [(split, recipe.task) for split in (data.train, data.transfer, data.validation)]
    splits += [(test, task_of(recipe.task, test.task)) for test in recipe.datasets.test.values()]
    for split, task in splits:
        prompt = render_template(task.prompt, ROWS[split.path])
        completion = render_template(task.completion, ROWS[split.path])
        if name == CLOSED_CHAT:
            assert_as_qwen3(prompt)
        else:
            assert prompt.endswith(":") and completion.startswith(" ")
        assert task.choices is None or completion.strip() in task.choices
        # Answers that follow a letter or a word must be the options that the prompt shows.
        if "choices" in ROWS[split.path]:
            assert [f"{letter}. " in prompt for letter in "ABCDE"] == [letter in task.choices for letter in "ABCDE"]
    assert len(splits) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in [*HUB, CLOSED_CHAT] if "alpaca" not in name])
def test_each_choice_is_one_token_of_the_real_tokenizers(name):
    recipe = load_recipe(FOLDER / name)
    for model in (recipe.sft["model_name_or_path"], recipe.distill["model_name_or_path"]):
        if not isinstance(try_to_load_from_cache(model, "tokenizer.json"), str):
            pytest.skip(f"the tokenizer of {model} is not in the cache of the Hub")
        for split in (recipe.datasets.train, *recipe.datasets.test.values()):
            task = task_of(recipe.task, split.task)
            written = choice_token_ids(task, load_tokenizer(model), ROWS[split.path])
            assert [len(ids) for ids in written] == [1] * len(task.choices)


def assert_as_qwen3(prompt):
    """A prompt is what the chat template of Qwen3, as TRL ships it, makes of one message without thinking."""
    template = files("trl.chat_templates").joinpath("qwen3.jinja").read_text()
    message = {"role": "user", "content": prompt.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]}
    how = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False, "chat_template": template}
    assert prompt == build_tokenizer().apply_chat_template([message], **how)


def test_the_recipe_of_written_answers_differs_in_who_wrote_them_alone():
    recipe = load_recipe(FOLDER / "chat/qwen3-8b_to_qwen3-0.6b_written.yaml")
    given, written = load_recipe(FOLDER / "chat/qwen3-8b_to_qwen3-0.6b.yaml").to_dict(), recipe.to_dict()
    assert written["cache"].pop("write_answers")["temperature"] == 0
    assert {key for key in given if given[key] != written[key]} == {"name", "cache"}


@pytest.mark.parametrize("name", RECIPES)
def test_trl_and_peft_accept_the_settings_of_every_training_run(name, tmp_path):
    recipe = load_recipe(FOLDER / name)
    runs = [(recipe.sft, SFTConfig)]
    for arm in recipe.arms:
        runs.append((recipe.arm_section(arm), SFTConfig if recipe.arm_trainer(arm) == "sft" else FIRSTConfig))
    for section, config_class in runs:
        calibrated = section.get("recalibration_method", "none") != "none"  # its value is what the stage adds
        section = section | {"use_cpu": True} | ({"recalibration_value": 0.3} if calibrated else {})
        args, model_args = training_arguments(section, config_class, tmp_path, recipe.seed)
        assert args.learning_rate == section["learning_rate"]
        assert (get_quantization_config(model_args) is not None) == section.get("load_in_4bit", False)
        assert isinstance(get_peft_config(model_args), LoraConfig) == section.get("use_peft", False)
    assert len(runs) == 1 + len(recipe.arms)


@pytest.mark.parametrize("name", HUB)
def test_the_hub_recipes_report_on_the_papers_sets_out_of_domain(name):
    recipe = load_recipe(FOLDER / name)
    own = Path(name).stem if name in TABLE else name.partition("/")[0]
    elsewhere = {"allenai/openbookqa", "tau/commonsense_qa"} - {f"tau/{own}", f"allenai/{own}"}
    assert {test.path for test in recipe.datasets.test.values() if test.out_of_domain} == elsewhere
    assert (recipe.calibrate.positions == "all") == (own == "alpaca")
    for section in (recipe.sft, recipe.distill):
        assert section["report_to"] == "trackio" and section["bf16"] and section["eval_strategy"] == "epoch"
        assert section["ddp_find_unused_parameters"] is False
        assert not section.get("load_in_4bit") or section["use_bnb_nested_quant"]
    assert recipe.sft["gradient_checkpointing"] and not recipe.distill["gradient_checkpointing"]
    assert ("Base" in recipe.sft["model_name_or_path"]) == ("Qwen" in recipe.distill["model_name_or_path"])


def test_recipes_for_the_same_data_ask_the_same_question():
    asked: dict[str, set] = {}
    for recipe in (load_recipe(FOLDER / name) for name in HUB if "alpaca" not in name):  # which asks in its own shape
        for test in recipe.datasets.test.values():
            task = task_of(recipe.task, test.task)
            asked.setdefault(test.path, set()).add((task.prompt, *task.choices))
    assert [len(prompts) for prompts in asked.values()] == [1, 1, 1]


def test_single_recipes_keep_what_they_are_for():
    small = load_recipe(FOLDER / "commonsense_qa/qwen3-8b_to_qwen3-0.6b_24gb.yaml")
    assert small.sft["load_in_4bit"] and small.sft["use_peft"] and small.cache.load_in_4bit is None
    teacher = load_recipe(FOLDER / "reviews.yaml").sft
    assert (teacher["eval_strategy"], teacher["load_best_model_at_end"]) == ("epoch", True)
    text = (FOLDER / "reviews.yaml").read_text()
    assert text.count("${FIRST_DATA:-../shared}/") == 7
    assert text.count("../shared") == 8  # and once where it is explained


def test_the_schema_and_the_reference_page_are_those_of_the_settings():
    """`first-trl schema > recipes/schema.json`, and `first-trl schema --markdown` for the end of docs/recipes.md."""
    if f"transformers=={version('transformers')}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another release of transformers has other settings than the one that constraints.txt names")
    assert (FOLDER / "schema.json").read_text() == json.dumps(recipe_schema(), indent=1) + "\n"
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page.count("| `max_length` |") == 2 and page.count("| `load_in_4bit` |") == 2  # task, cache, and TRL's
    assert page.partition("<!-- first-trl schema --markdown -->\n\n")[2] == settings_tables() + "\n"


def test_the_schema_knows_every_setting_of_every_recipe_and_refuses_others():
    schema = recipe_schema()
    known = {"sft": schema["$defs"]["SftSettings"], "distill": schema["$defs"]["DistillSettings"]}
    looked = 0
    for name in RECIPES:
        content = yaml.safe_load((FOLDER / name).read_text())
        assert content.keys() <= schema["properties"].keys()
        for section, model in known.items():
            assert content.get(section, {}).keys() <= model["properties"].keys()
            looked += len(content.get(section, {}))
    assert looked > 150 and schema["additionalProperties"] is False
    assert all(model["additionalProperties"] is False for model in known.values())
    assert not {"output_dir", "trust_remote_code", "hub_token"} & known["sft"]["properties"].keys()
    assert "learning rate" in known["distill"]["properties"]["learning_rate"]["description"]

"""A recipe is read as it was meant, or everything that is wrong with it is said at once, with a remedy."""

import dataclasses
import importlib
import json
import subprocess
import sys
import time

import pytest
import yaml

from first_trl import __main__ as command
from first_trl.constants import DEFAULT_ARMS
from first_trl.recipe import Recipe, RecipeError, load_recipe
from first_trl.settings import (
    LIMITS,
    RESERVED,
    CacheConfig,
    CalibrateConfig,
    DatasetConfig,
    EvaluateConfig,
    PushConfig,
    TaskConfig,
)
from first_trl.trl_fields import CLASSES, known_fields

RECIPE = """\
name: tiny
seed: 3
task:
  prompt: "Review: {text}\\nSentiment:"
  completion: " {label}"
  choices: [good, bad]
  max_length: 64
datasets:
  train: {path: json, data_files: data/train.jsonl}
  validation: {path: json, data_files: data/validation.jsonl}
  test:
    reviews:
      path: json
      data_files: data/test.jsonl
sft:
  model_name_or_path: models/teacher
  learning_rate: 1e-4
cache:
  top_k: 5
calibrate:
  method: temperature
distill:
  model_name_or_path: models/student
  load_in_4bit: true
  use_peft: true
  lora_r: 8
  lora_target_modules: all-linear
  learning_rate: 2.0e-4
  divergence: jsd
push:
  hub_model_id: me/student
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with the files that the recipe names, as the current directory."""
    for name in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": "good"}) + "\n")
    for name in ("teacher", "student"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(old: str = "", new: str = "") -> str:
    """The recipe with one change; returns the name of its file."""
    assert old in RECIPE, old
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        file.write(RECIPE.replace(old, new, 1) if old else RECIPE + new)
    return "recipe.yaml"


# --- what a recipe means


def test_a_recipe_is_read_into_its_sections():
    recipe = load_recipe(write())
    assert (recipe.name, recipe.seed, recipe.output_dir) == ("tiny", 3, "runs")
    assert recipe.run_folder.as_posix() == "runs/tiny"
    assert recipe.task.choices == ["good", "bad"] and recipe.task.append_eos is True
    assert recipe.datasets.test["reviews"].data_files == "data/test.jsonl"
    assert recipe.sft["learning_rate"] == 1e-4 and isinstance(recipe.sft["learning_rate"], float)
    assert recipe.distill["lora_target_modules"] == ["all-linear"]
    assert recipe.cache.top_k == 5 and recipe.evaluate.num_bins == 10


def test_the_default_arms_are_the_method_and_its_controls():
    recipe = load_recipe(write())
    assert recipe.arms == DEFAULT_ARMS
    assert [recipe.arm_trainer(arm) for arm in recipe.arms] == ["sft", "first", "first"]
    assert recipe.arm_section("distilled") == recipe.distill | {"recalibration_method": "none"}
    assert recipe.arm_section("first") == recipe.distill
    kept = load_recipe("recipe.yaml", ["--distill.closing", "false"])
    assert kept.distill["closing"] is False and "closing" not in kept.arm_section("first")


def test_an_arm_trained_on_labels_does_not_see_the_settings_of_the_method():
    section = load_recipe(write()).arm_section("fine_tuned")
    assert "divergence" not in section and "trainer" not in section
    assert section["learning_rate"] == 2e-4 and section["load_in_4bit"] is True


def test_an_unknown_arm_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="no arm 'forst'.*fine_tuned, distilled, first"):
        load_recipe(write()).arm_section("forst")


def test_the_resolved_recipe_reads_back_equal(project):
    recipe = load_recipe(write('"Review: {text}', '"Costs $${price} {text}'), ["--cache.top_k", "7"])
    assert recipe.task.prompt.startswith("Costs ${price} {text}")
    recipe.write_resolved("resolved.yaml")
    assert load_recipe("resolved.yaml") == recipe
    assert yaml.safe_load((project / "resolved.yaml").read_text())["evaluate"]["bootstrap"] == 1000


def test_a_setting_that_is_taken_away_stays_away_in_the_resolved_recipe():
    path = write(
        "      data_files: data/test.jsonl",
        """\
      data_files: data/test.jsonl
      task: {completion: " {answer} or {other}", choices: null}""",
    )
    recipe = load_recipe(path, ["--sft.max_grad_norm", "0.5", "--sft.lr_scheduler_kwargs", "null"])
    recipe.write_resolved("resolved.yaml")
    assert load_recipe("resolved.yaml") == recipe
    assert load_recipe("resolved.yaml").datasets.test["reviews"].task["choices"] is None


def test_a_recipe_built_in_python_has_the_same_defaults():
    recipe = load_recipe(write())
    bare = Recipe(name="tiny", task=recipe.task, datasets=recipe.datasets)
    assert bare.arms == recipe.arms and bare.evaluate == recipe.evaluate


def test_variables_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("FIRST_DATA", "data")
    path = write("data/train.jsonl}", "'${FIRST_DATA}/train.jsonl', max_rows: '3'}")
    with pytest.raises(RecipeError, match="datasets.train.max_rows = '3': it does not fit"):
        load_recipe(path)
    path = write(
        "  train: {path: json, data_files: data/train.jsonl}",
        """\
  train:
    path: json
    data_files: ${FIRST_DATA}/${SPLIT:-train}.jsonl
    max_rows: ${ROWS:-3}""",
    )
    assert load_recipe(path).datasets.train.data_files == "data/train.jsonl"
    assert load_recipe(path).datasets.train.max_rows == 3
    monkeypatch.setenv("ROWS", "12")
    assert load_recipe(path).datasets.train.max_rows == 12


def test_a_test_set_may_have_a_task_of_its_own():
    path = write(
        "      data_files: data/test.jsonl",
        """\
      data_files: data/test.jsonl
      task: {completion: " {answer}", choices: [A, B]}""",
    )
    assert load_recipe(path).datasets.test["reviews"].task == {"completion": " {answer}", "choices": ["A", "B"]}


def test_a_recipe_without_students_and_with_a_given_teacher_needs_no_training_sections():
    text = RECIPE[: RECIPE.index("sft:")].replace("  train: {path: json, data_files: data/train.jsonl}\n", "")
    with open("recipe.yaml", "w") as file:
        file.write(text + "cache: {teacher: models/teacher}\narms: {}\n")
    recipe = load_recipe("recipe.yaml")
    assert recipe.arms == {} and recipe.datasets.train is None and recipe.sft == {}


# --- overrides


@pytest.mark.parametrize(
    ("words", "stage", "read", "value"),
    [
        (["--learning_rate", "1e-3"], "sft", lambda r: r.sft["learning_rate"], 1e-3),
        (["--learning_rate=1e-3"], "distill", lambda r: r.distill["learning_rate"], 1e-3),
        (["--top_k", "7"], None, lambda r: r.cache.top_k, 7),
        (["--name", "123"], "sft", lambda r: r.name, "123"),
        (["--seed", "5"], "sft", lambda r: r.seed, 5),
        (["--sft.seed", "5"], None, lambda r: (r.seed, r.sft["seed"]), (3, 5)),
        (["--max_length", "32"], "distill", lambda r: r.task.max_length, 32),
        (["--eval_strategy", "no"], "sft", lambda r: r.sft["eval_strategy"], "no"),
        (["--packing"], "sft", lambda r: r.sft["packing"], True),
        (["--distill.use_peft=true", "--lora_alpha", "4"], "distill", lambda r: r.distill["lora_alpha"], 4),
        (["--lora_target_modules", "q_proj", "v_proj"], "distill", lambda r: r.distill["lora_target_modules"],
         ["q_proj", "v_proj"]),
        (["--datasets.train.max_rows", "10"], None, lambda r: r.datasets.train.max_rows, 10),
        (["--datasets.train.revision", "1234567"], None, lambda r: r.datasets.train.revision, "1234567"),
        (["--datasets.train.max_rows", "null"], None, lambda r: r.datasets.train.max_rows, None),
        (["--task.choices", "[yes please, 'no']"], None, lambda r: r.task.choices, ["yes please", "no"]),
        (["--task.prompt", "Q: {text}", "--push.revision", "null"], None, lambda r: (r.task.prompt, r.push.revision),
         ("Q: {text}", None)),
        (["--arms.first.learning_rate", "1e-5"], None, lambda r: r.arms,
         {**DEFAULT_ARMS, "first": {"learning_rate": 1e-5}}),
        (["--arms.extra.recalibration_method", "none"], None, lambda r: r.arm_section("extra")["recalibration_method"],
         "none"),
        (["--seed", "-0", "--report_to", "none"], "sft", lambda r: r.sft["report_to"], "none"),
    ],
)  # fmt: skip
def test_an_override_goes_where_it_belongs(words, stage, read, value):
    result = read(load_recipe(write(), words, stage))
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (
            ["--learning_rate", "1e-3"],
            ["--learning_rate: it is a setting of several", "--sft.learning_rate or --distill"],
        ),
        (["--learning_rat", "1"], ["--learning_rat: it is unknown", "did you mean learning_rate?"]),
        (["--lr", "1"], ["--lr: it is unknown", "sft.learning_rate"]),
        (["--cache.top_kk", "1"], ["command line: cache.top_kk = 1: unknown key; did you mean top_k?"]),
        (["--cahce.top_k", "1"], ["command line: cahce: unknown key; did you mean cache?"]),
        (["--cache.top_k", "many"], ["command line: cache.top_k = 'many': it does not fit"]),
        (["--name.x", "1"], ["--name.x needs a mapping here"]),
        (["5"], ["command line: 5: it belongs to no setting"]),
        (["--name", "../up"], ["command line: name = '../up'"]),
        (["--cache.support", "choices", "--task.choices", "null"], ["task.choices = None", "cache.support: choices"]),
    ],
)
def test_a_wrong_override_is_named(words, phrases):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(), words)
    for phrase in phrases:
        assert phrase in str(error.value)


# --- what is refused: (what, text to replace, replacement, phrases of the message)

BROKEN = [
    ("unknown key", "  top_k: 5", "  topk: 5", ["line 19: cache.topk = 5", "unknown key", "did you mean top_k?"]),
    ("unknown TRL key", "learning_rate: 1e-4", "learnin_rate: 1", ["sft.learnin_rate", "did you mean learning_rate?"]),
    ("key of another section", "  method: temp", "  top_k: 3\n  method: temp", ["calibrate.top_k", "cache.top_k"]),
    ("popular name of a key", "  lora_r: 8", "  rank: 8", ["distill.rank = 8", "did you mean lora_r?"]),
    ("unknown section", "calibrate:", "calibrat:", ["line 20: calibrat: unknown key; did you mean calibrate?"]),
    ("TRL key at the top", "name: tiny", "name: tiny\nlearning_rate: 1.0",
     ["learning_rate", "belongs in sft.learning"]),
    ("no name", "name: tiny\n", "", ["name: it is missing"]),
    ("name that leaves the folder", "name: tiny", "name: ../../etc",
     ["line 1: name = '../../etc'", "letters, digits"]),
    ("name that is hidden", "name: tiny", "name: .", ["name = '.'"]),
    ("name that YAML reads as a number", "name: tiny", "name: 2024",
     ["name = 2024: ", "put it in quotes"]),
    ("text for a number", "learning_rate: 1e-4", "learning_rate: fast", ["sft.learning_rate = 'fast'", "number"]),
    ("list for a number", "top_k: 5", "top_k: [7]", ["cache.top_k = [7]", "write 7 without the brackets"]),
    ("fraction for a whole number", "top_k: 5", "top_k: 7.5", ["cache.top_k = 7.5", "integer"]),
    ("boolean for a number", "top_k: 5", "top_k: yes", ["cache.top_k = True", "integer"]),
    ("text for a boolean", "use_peft: true", "use_peft: 'true'", ["use_peft = 'true'", "boolean"]),
    ("infinite", "learning_rate: 1e-4", "learning_rate: .inf", ["sft.learning_rate = inf", "number"]),
    ("nothing for a number", "top_k: 5", "top_k:", ["cache.top_k = None", "integer"]),
    ("yes and no as choices", "[good, bad]", "[yes, no]", ["task.choices = [True, False]", "put it in quotes"]),
    ("no as a strategy", "learning_rate: 1e-4", "eval_strategy: no", ["eval_strategy = False", "put it in quotes"]),
    ("no as a key", "cache:", "no: 1\ncache:", ["line 18: no: YAML reads this key as bool", "quote it"]),
    ("out of range", "top_k: 5", "top_k: 0", ["cache.top_k = 0: it does not fit; write a value greater"]),
    ("negative rate", "learning_rate: 1e-4", "learning_rate: -1",
     ["sft.learning_rate = -1: it does not fit; write a value greater"]),
    ("not a choice", "method: temperature", "method: temprature",
     ["calibrate.method = 'temprature'", "did you mean temperature? Choose one of"]),
    ("not a scheduler", "learning_rate: 1e-4", "lr_scheduler_type: cosin", ["lr_scheduler_type = 'cosin'", "cosine"]),
    ("not a divergence", "divergence: jsd", "divergence: kl", ["divergence = 'kl'", "forward_kl, reverse_kl, jsd"]),
    ("LoRA without use_peft", "learning_rate: 1e-4", "lora_r: 8", ["line 17: sft.lora_r = 8", "use_peft: true"]),
    ("4-bit without an adapter", "  use_peft: true\n  lora_r: 8\n  lora_target_modules: all-linear\n", "",
     ["distill.load_in_4bit", "cannot be trained without an adapter", "use_peft: true"]),
    ("4-bit and 8-bit", "  lora_r: 8", "  load_in_8bit: true",
     ["distill.load_in_8bit", "load_in_4bit is true as well"]),
    ("missing data file", "data/train.jsonl", "data/trian.jsonl",
     ["train.data_files = 'data/trian.jsonl'", "no such file"]),
    ("missing data file as path", "{path: json, data_files: data/train.jsonl}", "{path: x/train.jsonl}",
     ["datasets.train.path = 'x/train.jsonl'", "no such file"]),
    ("reader without files", "{path: json, data_files: data/train.jsonl}", "{path: json}",
     ["datasets.train.path = 'json'", "write data_files"]),
    ("missing dataset folder", "{path: json, data_files: data/train.jsonl}", "{path: ./nowhere}",
     ["datasets.train.path = './nowhere'", "no such folder"]),
    ("no Hub id", "{path: json, data_files: data/train.jsonl}", "{path: 'my data!'}", ["neither a folder nor the id"]),
    ("home as ~", "data/train.jsonl", "~/train.jsonl", ["train.data_files = '~/train.jsonl'", "${HOME}"]),
    ("path is missing", "{path: json, data_files: data/train.jsonl}", "{split: train}",
     ["datasets.train.path", "missing"]),
    ("missing teacher folder", "models/teacher", "./models/techer", ["sft.model_name_or_path", "no such folder"]),
    ("missing student folder", "models/student", "/models/student/x",
     ["distill.model_name_or_path", "no such folder"]),
    ("no teacher", "  model_name_or_path: models/teacher\n", "", ["sft.model_name_or_path: there is no teacher"]),
    ("no student", "  model_name_or_path: models/student\n", "", ["distill.model_name_or_path: there is no student"]),
    ("test used for calibration", "data/validation.jsonl", "data/test.jsonl",
     ["line 12: datasets.test.reviews", "same rows as datasets.validation", "rows of its own"]),
    ("test used for training", "data/train.jsonl", "./data/../data/test.jsonl",
     ["datasets.test.reviews", "same rows as datasets.train"]),
    ("validation used for training", "data/validation.jsonl", "data/train.jsonl",
     ["datasets.validation", "same rows"]),
    ("rows of the teacher as transfer", "  test:\n", "  transfer: {path: data/train.jsonl}\n  test:\n",
     ["datasets.transfer", "same rows as datasets.train"]),
    ("test used for transfer", "  test:\n", "  transfer: {path: data/test.jsonl}\n  test:\n",
     ["datasets.test.reviews", "same rows as datasets.transfer"]),
    ("no test set", "    reviews:\n      path: json\n      data_files: data/test.jsonl\n", "",
     ["datasets.test: it is missing"]),
    ("unknown split", "  train: {path", "  dev: {path: x}\n  train: {path", ["datasets.dev: unknown key"]),
    ("no validation", "  validation: {path: json, data_files: data/validation.jsonl}\n", "",
     ["datasets.validation: it is missing"]),
    ("no training split", "  train: {path: json, data_files: data/train.jsonl}\n", "",
     ["datasets.train: it is missing"]),
    ("task on a training split", "data/train.jsonl}", "data/train.jsonl, task: {append_eos: true}}",
     ["datasets.train.task", "test sets only"]),
    ("unknown key in a test's task", "      path: json", "      path: json\n      task: {promt: x}",
     ["datasets.test.reviews.task.promt", "did you mean prompt?"]),
    ("broken template in a test's task", "      path: json", "      path: json\n      task: {prompt: '{text'}",
     ["datasets.test.reviews.task.prompt", "cannot be read"]),
    ("test set's name is a path", "    reviews:", "    a/b:", ["datasets.test.a/b", "use letters"]),
    ("attribute in a template", "{text}", "{text.__class__}", ["task.prompt", "attributes"]),
    ("broken template", "{text}", "{text", ["line 4: task.prompt", "cannot be read"]),
    ("two columns and choices", "{label}", "{label}{text}", ["task.completion", "exactly one column, not 2"]),
    ("completion is missing", '  completion: " {label}"\n', "", ["task.prompt", "without completion"]),
    ("arm's name is a path", "push:", "arms: {first: {}, a/b: {}}\npush:", ["arms.a/b", "use letters"]),
    ("arm's name is taken", "push:", "arms: {first: {}, teacher: {}}\npush:", ["arms.teacher", "choose another name"]),
    ("arm's name means another thing", "push:", "arms: {first: {}, best: {}}\npush:", ["arms.best", "another name"]),
    ("unknown key in an arm", "push:", "arms: {first: {tial: bucket}}\npush:",
     ["arms.first.tial", "did you mean tail?"]),
    ("unknown trainer", "push:", "arms: {first: {trainer: dpo}}\npush:", ["arms.first.trainer = 'dpo'", "first, sft"]),
    ("method's setting in a control", "push:", "arms: {first: {}, a: {trainer: sft, tail: bucket}}\npush:",
     ["arms.a.tail", "trainer: sft does not know it"]),
    ("unknown arm to push", "  hub_model_id", "  arm: second\n  hub_model_id", ["push.arm = 'second'", "fine_tuned"]),
    ("not a Hub id to push to", "me/student", "student", ["push.hub_model_id = 'student'", "owner/name"]),
    ("output_dir in a section", "learning_rate: 1e-4", "output_dir: x",
     ["sft.output_dir", "at the top of the recipe"]),
    ("dataset_kwargs", "learning_rate: 1e-4", "dataset_kwargs: {}", ["sft.dataset_kwargs", "the task section"]),
    ("push_to_hub in a section", "learning_rate: 1e-4", "push_to_hub: true", ["sft.push_to_hub", "push section"]),
    ("max_length in a section", "learning_rate: 1e-4", "max_length: 9", ["sft.max_length = 9", "task.max_length"]),
    ("label smoothing", "learning_rate: 1e-4", "label_smoothing_factor: 0.1",
     ["recalibration_method: label_smoothing"]),
    ("liger", "learning_rate: 1e-4", "use_liger_kernel: true", ["sft.use_liger_kernel", "remove it"]),
    ("metrics from logits", "learning_rate: 1e-4", "include_for_metrics: [loss]", ["first-trl evaluate"]),
    ("loss of another trainer", "divergence: jsd", "loss_type: dft", ["distill.loss_type", "divergence"]),
    ("sampled mass of a loss without", "divergence: jsd", "divergence: jsd\n  mass_fraction: 0.5",
     ["mass_fraction", "bucket"]),
    ("best model without evaluation", "learning_rate: 1e-4", "load_best_model_at_end: true", ["eval_strategy is no"]),
    ("both precisions", "learning_rate: 1e-4", "bf16: true\n  fp16: true", ["sft.fp16", "keep one of the two"]),
    ("a token", "learning_rate: 1e-4", "hub_token: hf_abcdefghijklmnopqrst",
     ["hub_token = (not shown)", "hf auth login"]),
    ("a token as a value", "me/student", "me/hf_abcdefghijklmnopqrst", ["(not shown)", "credential"]),
    ("a token from the environment", "models/teacher", "${HF_TOKEN}",
     ["HF_TOKEN looks like a secret", "hf auth login"]),
    ("unset variable", "data/train.jsonl}", "'${NOWHERE_X}/a'}", ["NOWHERE_X is not set", "${NOWHERE_X:-default}"]),
    ("not a variable", "data/train.jsonl}", "'${a b}'}", ["${a b} is not a variable"]),
    ("key twice", "  top_k: 5", "  top_k: 5\n  top_k: 9", ["line 20: cache.top_k = 9: it is written twice, first on"]),
    ("section twice", "push:", "cache: {}\npush:", ["cache: it is written twice, first on line 18"]),
    ("section is a list", "cache:\n  top_k: 5", "cache: [5]", ["cache = [5]: it needs a mapping"]),
    ("a date", "top_k: 5", "top_k: 2024-01-01", ["cache.top_k", "as date", "put it in quotes"]),
    ("an object", "top_k: 5", "top_k: !!python/object:os.system {}", ["cache.top_k", "YAML cannot read it"]),
    ("a called object", "top_k: 5", "top_k: !!python/name:os.system x", ["cache.top_k", "YAML cannot read it"]),
    ("not YAML", "cache:\n", "cache\n", ["line 19: this is not YAML"]),
    ("a tab", "  top_k: 5", "\ttop_k: 5", ["line 19: this is not YAML"]),
    ("nested aliases", "top_k: 5", "top_k: " + "[" * 40 + "]" * 40, ["too many values"]),
    ("a merge key", "cache:\n", "cache:\n  <<: {dtype: float32}\n", ["merge keys", "write the keys out"]),
    ("a reverse divergence from a teacher without a tail", "divergence: jsd",
     "divergence: reverse_kl\n  recalibration_method: probability",
     ["divergence = 'reverse_kl'", "every loss would be infinite", "forward_kl or jsd"]),
    ("a test set that takes the name of the validation split", "test:\n", "test:\n    validation: {path: a/b}\n",
     ["datasets.test.validation", "choose another name"]),
    ("one seed for all and one for a student", "divergence: jsd\n", "divergence: jsd\n  seed: 3\nseeds: [0, 1]\n",
     ["distill.seed = 3", "seeds for every student"]),
    ("the same seed twice", "name: tiny", "name: tiny\nseeds: [1, 1]", ["seeds = [1, 1]", "different whole numbers"]),
    ("a seed that is no list", "name: tiny", "name: tiny\nseeds: 3", ["seeds = 3: "]),
    ("one choice", "[good, bad]", "[good]", ["task.choices = ['good']", "at least two different answers"]),
    ("an empty completion", '" {label}"\n  choices: [good, bad]', '"  "', ["task.completion = '  '", "it is empty"]),
    ("a format in a template", "{text}", "{text!r}", ["task.prompt", "format or a conversion"]),
    ("chat arguments beside a template", "  max_length: 64", "  chat_template_kwargs: {a: 1}",
     ["task.chat_template_kwargs", "remove prompt and completion"]),
    ("two names for one column", "data/train.jsonl}", "data/train.jsonl, columns: {a: x, b: x}}",
     ["datasets.train.columns", "keep one of them"]),
    ("a column that is no text", "data/train.jsonl}", "data/train.jsonl, columns: {a: 1}}", ["train.columns"]),
    ("no rows", "data/train.jsonl}", "data/train.jsonl, max_rows: 0}", ["max_rows = 0", "write a value"]),
    ("a Hub id that leaves the Hub", "me/student", "../../x", ["push.hub_model_id = '../../x'", "owner/name"]),
    ("a revision without its teacher", "top_k: 5", "teacher_revision: v1", ["there is no cache.teacher"]),
    ("a server without an address", "top_k: 5", "backend: server", ["cache.server_url: it is not", "http://127.0.0.1"]),
    ("an address without a server", "top_k: 5", "server_url: http://h:1", ["cache.server_url", "backend: server"]),
    ("a local setting for a server", "top_k: 5", "backend: server\n  server_url: http://h:1\n  teacher_dtype: auto",
     ["cache.teacher_dtype = 'auto'", "backend: hf"]),
    ("choices kept and an end of sequence", "  top_k: 5", "  support: choices",
     ["task.append_eos", "append_eos: false"]),
    ("a value beside no method", "divergence: jsd", "recalibration_method: none\n  recalibration_value: 2",
     ["distill.recalibration_value = 2", "a value alone means temperature"]),
    ("packing across documents", "divergence: jsd", "packing: true\n  packing_strategy: wrapped",
     ["distill.packing_strategy = 'wrapped'", "packing_strategy: bfd"]),
    ("a setting of distill in an arm", "push:", "arms: {first: {closing: false}}\npush:",
     ["arms.first.closing = False: unknown key", "distill.closing"]),
    # settings of earlier versions
    ("vocabulary_temperature", "method: temperature", "method: vocabulary_temperature",
     ["calibrate.method = 'vocabulary_temperature'", "write temperature"]),
    ("vocabulary_temperature in an arm", "push:",
     "arms: {first: {recalibration_method: vocabulary_temperature}}\npush:",
     ["arms.first.recalibration_method", "write temperature"]),
    ("include_eos", "method: temperature", "include_eos: true", ["calibrate.include_eos = True", "remove it"]),
    ("tail_knots", "top_k: 5", "tail_knots: true", ["cache.tail_knots = True", "it was removed", "remove it"]),
    ("cross_fit", "learning_rate: 1e-4", "cross_fit: 2", ["sft.cross_fit = 2", "datasets.transfer"]),
    ("vLLM in process", "top_k: 5", "backend: vllm", ["cache.backend = 'vllm'", "vllm serve", "backend: server"]),
    ("vLLM's options", "top_k: 5", "vllm_options: {a: 1}", ["cache.vllm_options", "vllm serve", "server_url"]),
    # code that comes with a model
    *((f"remote code in {place}", old, new, ["trust_remote_code", "never run"]) for place, old, new in (
        ("sft", "learning_rate: 1e-4", "trust_remote_code: true"),
        ("model_init_kwargs", "learning_rate: 1e-4", "lr_scheduler_kwargs: {trust_remote_code: true}"),
        ("a list", "divergence: jsd", "lr_scheduler_kwargs: {a: [{trust_remote_code: true}]}"),
    )),
    *((f"the kernel {name} as {new[:12]} for {old[:5]}", old, new.format(name),
       ["attn_implementation = ", "kernel on the Hub"])
      for name in ("kernels-community/flash-attn", "someone/attention:v1") for old, new in (
        ("learning_rate: 1e-4", "attn_implementation: {}"), ("top_k: 5", "attn_implementation: {}"),
        ("divergence: jsd", "lr_scheduler_kwargs: {{attn_implementation: {}}}"),
    )),
    # credentials, which are never repeated
    *((f"the credential {value[:6]}", "me/student", f"me/{value}", ["hub_model_id = (not shown)", "hf auth login"])
      for value in ("ghp_" + "a1" * 12, "github_pat_" + "a1" * 12, "glpat-" + "a1" * 12, "AKIA" + "A1" * 8,
                    "sk-" + "a1" * 16, "xoxb-" + "a1" * 12)),
    *((f"an address with {what}", "top_k: 5", f"backend: server\n  server_url: {url}",
       ["cache.server_url = (not shown)", "hf auth login"])
      for what, url in (("a password", "http://me:letmein@h:1"), ("a token", "http://h:1/v1?token=letmein"),
                        ("a key", "http://h:1/v1?a=b&api_key=letmein"))),
    *((f"a setting called {key}", "learning_rate: 1e-4", f"lr_scheduler_kwargs: {{{key}: letmein}}",
       [f"{key} = (not shown)", "hf auth login"])
      for key in ("password", "pass", "pwd", "pat", "auth", "dsn", "api_key", "access_token", "credentials")),
    *((f"a variable called {name}", "models/teacher", f"${{{name}:-x}}", [name, "looks like a secret"])
      for name in ("AWSPASS", "DB_PWD", "GITHUB_PAT", "SENTRY_DSN", "API_KEY", "my_auth", "mytoken", "KEY")),
    # sizes that would never end
    *((f"{value} for {new}", old, new.format(value), ["write a value less"])
      for value in (10**9, 2**63) for old, new in (
        ("  method: temp", "  bootstrap: {}\n  method: temp"), ("  method: temp", "  num_bins: {}\n  method: temp"),
        ("push:", "evaluate: {{bootstrap: {}}}\npush:"), ("push:", "evaluate: {{num_bins: {}}}\npush:"),
    )),
    *((f"too large a {new}", old, new, ["9223372036854775808", "write a value less"]) for old, new in (
        ("seed: 3", f"seed: {2**63}"), ("seed: 3", f"seeds: [{2**63}]"), ("learning_rate: 1e-4", f"seed: {2**63}"),
        ("push:", f"evaluate: {{seed: {2**63}}}\npush:"),
    )),
    *((f"the pattern {pattern}", "data/train.jsonl}", f"'{pattern}'}}", ["train.data_files", "the whole disk"])
      for pattern in ("/**/*.jsonl", "/*/*/*/*.jsonl")),
    # names that are folders
    *((f"the name {name!r}", "name: tiny", f"name: {json.dumps(name)}", ["name = ", "use letters"]) for name in (
        "..", "a/../b", "/etc", "a\\b", "a\0b", "a" * 300, "\u202ename", "a\nb", "-rf", "a b", "",
        "nam\u00e9")),
    *((f"the arm {name!r}", "push:", f"arms: {{first: {{}}, {json.dumps(name)}: {{}}}}\npush:",
       ["arms.", "use letters"])
      for name in ("..", "a.b", "a b", "\u202e", "x" * 101)),
    *((f"the test set {name!r}", "    reviews:", f"    {json.dumps(name)}:", ["datasets.test.", "use letters"])
      for name in ("..", "a.b", "a b", "\u202e", "x" * 101)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "old", "new", "phrases"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_recipe_is_refused_with_place_value_and_remedy(what, old, new, phrases):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(old, new))
    message = str(error.value)
    assert message.startswith("recipe.yaml: ")
    for phrase in phrases:
        assert phrase in message
    assert "hf_abcdefghijkl" not in message
    (problem,) = error.value.problems
    assert "; " in problem  # what is wrong; what to do


def test_a_reverse_divergence_is_refused_where_auto_may_choose_probability():
    path = write("method: temperature", "method: auto")
    with pytest.raises(RecipeError, match="`probability`, which `auto` may choose,.* write forward_kl or jsd"):
        load_recipe(path, ["--distill.divergence", "reverse_kl"])
    for allowed in (["--distill.tail", "renormalize"], ["--distill.recalibration_method", "temperature"]):
        load_recipe(path, ["--distill.divergence", "reverse_kl", *allowed])


def test_all_problems_come_at_once_in_the_order_of_the_file():
    path = write("  top_k: 5", "  topk: 5\n  dtype: float64\n  load_in_4bit: 1")
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ["--sft.lora_r", "0"])
    starts = [problem.partition(" = ")[0] for problem in error.value.problems]
    in_file = ["line 19: cache.topk", "line 20: cache.dtype", "line 21: cache.load_in_4bit"]
    assert starts == ["command line: sft.lora_r", *in_file]
    assert "4 problems" in str(error.value)


# Ten lists of six aliases each: 6^10 values in 400 bytes.
ALIASES = b"k0: &k0 [1,1,1,1,1,1]\n" + b"".join(
    b"k%d: &k%d [%s]\n" % (i, i, b",".join([b"*k%d" % (i - 1)] * 6)) for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a recipe is a mapping"),
        (b"- a\n- b\n", "a recipe is a mapping"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"a: \x00", "not YAML"),
        (b"a: {" * 5000, "not YAML"),
        (b"x" * 100_001, "more than a recipe can"),
        (b"a: [" + b"1," * 25_000 + b"]", "too many values"),
        (ALIASES, "too many values"),
        (b"a: &a [*a]\n", "too many values"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(content, words):
    with open("recipe.yaml", "wb") as file:
        file.write(content)
    with pytest.raises(RecipeError, match=words):
        load_recipe("recipe.yaml")


def test_a_test_set_without_a_name_is_told_so():
    old, new = "    reviews:\n      path: json\n      data_files: data/test.jsonl", "    path: data/test.jsonl"
    with pytest.raises(RecipeError, match="datasets.test.path = 'data/test.jsonl': it needs a mapping"):
        load_recipe(write(old, new))


def test_a_missing_recipe_and_a_folder_are_named():
    with pytest.raises(RecipeError, match="nowhere.yaml: .*\n.*No such file"):
        load_recipe("nowhere.yaml")
    with pytest.raises(RecipeError, match="data: .*\n.*Is a directory"):
        load_recipe("data")


def test_a_hostile_file_is_refused_at_once():
    with open("recipe.yaml", "wb") as file:
        file.write(b"a: [" + b"1," * 499_000 + b"]")
    started = time.monotonic()
    with pytest.raises(RecipeError):
        load_recipe("recipe.yaml")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_the_marks_of_other_editors_do_no_harm(change):
    write()
    with open("recipe.yaml", newline="") as file:
        text = file.read()
    with open("changed.yaml", "w", encoding="utf-8", newline="") as file:
        file.write(change(text))
    assert load_recipe("changed.yaml") == load_recipe("recipe.yaml")


# --- extends


def extend(text: str, folder: str = "") -> str:
    """A recipe that builds on the one that `write` left; returns the name of its file."""
    path = folder + "own.yaml"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def test_a_recipe_changes_what_it_says_and_keeps_the_rest(tmp_path):
    write()
    base = load_recipe("recipe.yaml")
    (tmp_path / "below").mkdir()
    path = extend(
        "extends: ../recipe.yaml\nname: own\ncache: {top_k: 7, teacher: null}\narms: {b: {}, a: {}}\n", "below/"
    )
    recipe = load_recipe(path, ["--sft.learning_rate", "2", "--push.arm", "a"])
    assert (recipe.name, recipe.cache.top_k, recipe.sft["learning_rate"]) == ("own", 7, 2)
    assert list(recipe.arms) == ["b", "a"] and recipe.distill == base.distill and recipe.datasets == base.datasets
    assert "extends" not in recipe.to_dict()
    recipe.write_resolved("resolved.yaml")
    assert load_recipe("resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("extends: recipe.yaml\n", ["name: it is missing"]),  # it does not take the other's folder
        ("extends: nowhere.yaml\nname: a\n", ["line 1: extends = 'nowhere.yaml'", "no such recipe", "relative"]),
        ("extends: data\nname: a\n", ["extends = 'data'", "no such recipe"]),
        ("extends: [recipe.yaml]\nname: a\n", ["extends", "no such recipe"]),
        ("extends: own.yaml\nname: a\n", ["extends = 'own.yaml'", "only one level"]),
        ("extends: chain.yaml\nname: a\n", ["extends = 'chain.yaml'", "only one level", "extend the last one"]),
        ("extends: broken.yaml\nname: a\n", ["broken.yaml, line 3: this is not YAML"]),
        ("extends: recipe.yaml\nname: a\nsft: {lr: 1}\n", ["line 3: sft.lr = 1", "did you mean learning_rate?"]),
        ("extends: typo.yaml\nname: a\n", ["typo.yaml, line 19: cache.topk = 5", "did you mean top_k?"]),
    ],
)
def test_a_broken_extension_is_named_with_its_file(text, phrases):
    for name, content in (("chain", "extends: recipe.yaml\n"), ("broken", "a: 1\nb\nc: 2\n"),
                          ("typo", RECIPE.replace("top_k", "topk"))):  # fmt: skip
        with open(f"{name}.yaml", "w") as file:
            file.write(content)
    write()
    with pytest.raises(RecipeError) as error:
        load_recipe(extend(text))
    assert all(phrase in str(error.value) for phrase in phrases), error.value


# --- commands


def test_show_prints_the_resolved_recipe_and_schema_what_it_may_hold(capsys):
    assert command.main(["show", write(), "--cache.top_k", "9"]) == 0
    with open("shown.yaml", "w") as file:
        file.write(capsys.readouterr().out)
    assert load_recipe("shown.yaml") == load_recipe("recipe.yaml", ["--cache.top_k", "9"])
    assert command.main(["show", write("top_k", "topk")]) == 2
    assert "did you mean top_k?" in capsys.readouterr().err
    assert command.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["extends"]["type"] == "string"


# --- the fields of TRL, read from its source: the first test to fail when TRL moves


@pytest.mark.parametrize("name", CLASSES)
def test_the_fields_read_from_source_are_those_of_the_class(name):
    module = "first_trl.first_config" if name == "FIRSTConfig" else "trl"
    fields = [field for field in dataclasses.fields(getattr(importlib.import_module(module), name)) if field.init]
    specs = known_fields(name)
    assert len(specs) > 15 and set(specs) == {field.name for field in fields}
    for field in fields:
        wanted = " ".join(str(field.metadata.get("help", "")).split())
        assert specs[field.name].help in (wanted, ""), field.name  # empty where TRL computes it


def test_choices_are_those_of_the_enums_and_of_the_metadata():
    from transformers.trainer_utils import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    specs = known_fields("SFTConfig")
    enums = {"eval_strategy": IntervalStrategy, "lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    for key, enum in enums.items():
        assert set(specs[key].choices) == {member.value for member in enum}
    assert known_fields("ModelConfig")["bnb_4bit_quant_type"].choices == ("fp4", "nf4")
    assert specs["bf16"].annotation == "bool | None"  # TrainingArguments says bool


def test_a_class_that_moved_is_an_error(monkeypatch):
    monkeypatch.setitem(CLASSES, "Moved", (("trl", "trainer/sft_config.py", "NoSuchConfig"),))
    with pytest.raises(RuntimeError, match="no longer defines NoSuchConfig"):
        known_fields("Moved")


def test_every_rule_and_every_setting_is_about_something():
    known = set(known_fields("FIRSTConfig")) | set(known_fields("ModelConfig"))
    assert set(LIMITS) <= known
    assert set(RESERVED) - known == {
        "cross_fit",
        "include_eos",
        "tail_knots",
        "vllm_options",
        "vllm",
        "vocabulary_temperature",
    }
    for model in (TaskConfig, DatasetConfig, CacheConfig, CalibrateConfig, EvaluateConfig, PushConfig):
        for name, field in model.model_fields.items():
            assert (field.description or "").endswith("."), name


# --- speed, and what cannot be tabulated


@pytest.mark.parametrize("case", [None, BROKEN[0], BROKEN[25], BROKEN[29]], ids=["fine", "key", "peft", "file"])
def test_a_recipe_is_checked_in_seconds_without_anything_heavy(case, pytestconfig):
    path = write(*case[1:3]) if case else write()
    code = (
        f"import sys; sys.path.insert(0, {str(pytestconfig.rootpath)!r})\n"
        "from first_trl.recipe import RecipeError, load_recipe\n"
        f"try: load_recipe({path!r}); print('fine')\n"
        "except RecipeError as error: print(error)\n"
        "heavy = ('torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate', 'numpy', 'pyarrow')\n"
        "assert not [name for name in heavy if name in sys.modules]"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("1 problem in this recipe" in result.stdout) == bool(case)
    assert time.monotonic() - started < 5

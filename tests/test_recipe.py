"""A recipe is read as it was meant, or everything that is wrong with it is reported at once, with a remedy."""

import dataclasses
import importlib
import json
import subprocess
import sys
import time
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml

from first_trl import __main__ as command
from first_trl.constants import DEFAULT_ARMS
from first_trl.recipe import Recipe, RecipeError, file_model, load_recipe
from first_trl.settings import LIMITS, RESERVED, DatasetConfig, WriteAnswers
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
TRAIN, FILE = "{path: json, data_files: data/train.jsonl}", "data/train.jsonl}"
RATE, TOP_K, LOSS, PUSH = "learning_rate: 1e-4", "top_k: 5", "divergence: jsd", "push:"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with the files that the recipe names, as the current directory."""
    return make_project(tmp_path, monkeypatch)


def make_project(folder, monkeypatch):
    (folder / "data").mkdir(parents=True)
    for name in ("train", "validation", "test"):
        (folder / "data" / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": "good"}) + "\n")
    for name in ("teacher", "student"):
        (folder / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def write(old: str = "", new: str = "", name: str = "recipe.yaml") -> str:
    """The recipe with one change; returns the name of its file."""
    assert old in RECIPE, old
    Path(name).write_text(RECIPE.replace(old, new, 1) if old else RECIPE + new, encoding="utf-8")
    return name


def refused(path: str, words=(), phrases: str = "") -> list[str]:
    """The problems of a recipe that is refused with these phrases, parted by |."""
    with pytest.raises(RecipeError) as error:
        load_recipe(path, words)
    assert str(error.value).startswith(f"{path}: ")
    assert [phrase for phrase in phrases.split("|") if phrase not in str(error.value)] == [], error.value
    return error.value.problems


# --- what a recipe means


def test_a_recipe_is_read_into_its_sections():
    recipe = load_recipe(write())
    assert (recipe.name, recipe.seed, recipe.run_folder.as_posix()) == ("tiny", 3, "runs/tiny")
    assert recipe.task.choices == ["good", "bad"] and recipe.task.append_eos is True
    assert recipe.datasets.test["reviews"].data_files == "data/test.jsonl"
    assert recipe.sft["learning_rate"] == 1e-4 and isinstance(recipe.sft["learning_rate"], float)
    assert recipe.distill["lora_target_modules"] == ["all-linear"]
    assert recipe.cache.top_k == 5 and recipe.evaluate.num_bins == 10
    bare = Recipe(name="tiny", task=recipe.task, datasets=recipe.datasets)
    assert bare.arms == recipe.arms and bare.evaluate == recipe.evaluate


def test_the_default_arms_are_the_method_and_its_controls():
    recipe = load_recipe(write())
    assert recipe.arms == DEFAULT_ARMS
    assert [recipe.arm_trainer(arm) for arm in recipe.arms] == ["sft", "first", "first"]
    assert recipe.arm_section("distilled") == recipe.distill | {"recalibration_method": "none"}
    assert recipe.arm_section("first") == recipe.distill
    section = recipe.arm_section("fine_tuned")
    assert "divergence" not in section and "trainer" not in section and section["load_in_4bit"] is True
    kept = load_recipe("recipe.yaml", ["--distill.closing", "false"])
    assert kept.distill["closing"] is False and "closing" not in kept.arm_section("first")
    again = load_recipe("recipe.yaml", ["--distill.rounds", "2"])
    assert [again.has_second_round(arm) for arm in again.arms] == [False, True, True]
    assert "rounds: 2" in again.to_yaml()
    with pytest.raises(ValueError, match="no arm 'forst'.*fine_tuned, distilled, first"):
        recipe.arm_section("forst")


def test_the_resolved_recipe_reads_back_equal():
    path = write('"Review: {text}', '"Costs $${price} {text}')
    own = ["--datasets.test.reviews.task", "{completion: ' {answer} or {other}', choices: null}"]
    own += ["--datasets.train.columns", "{'${a}': '${b}'}"]
    recipe = load_recipe(path, ["--cache.top_k", "7", "--sft.lr_scheduler_kwargs", "null", *own])
    assert recipe.task.prompt.startswith("Costs ${price} {text}")
    recipe.write_resolved("resolved.yaml")
    again = load_recipe("resolved.yaml")
    assert again == recipe and again.datasets.test["reviews"].task["choices"] is None
    assert yaml.safe_load(Path("resolved.yaml").read_text())["evaluate"]["bootstrap"] == 1000


def test_variables_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("FIRST_DATA", "data")
    quoted = "'${FIRST_DATA}/train.jsonl', max_rows: '3'}"
    refused(write("data/train.jsonl}", quoted), phrases="datasets.train.max_rows = '3': it does not fit")
    block = "\n    path: json\n    data_files: ${FIRST_DATA}/${SPLIT:-train}.jsonl\n    max_rows: ${ROWS:-3}"
    write(f"  train: {TRAIN}", f"  train:{block}")
    read = load_recipe("recipe.yaml").datasets.train
    assert (read.data_files, read.max_rows) == ("data/train.jsonl", 3)
    monkeypatch.setenv("ROWS", "12")
    assert load_recipe("recipe.yaml").datasets.train.max_rows == 12


def test_a_recipe_without_students_and_with_a_given_teacher_needs_no_training_sections():
    text = RECIPE[: RECIPE.index("sft:")].replace(f"  train: {TRAIN}\n", "")
    Path("recipe.yaml").write_text(text + "cache: {teacher: models/teacher}\narms: {}\n")
    recipe = load_recipe("recipe.yaml")
    assert recipe.arms == {} and recipe.datasets.train is None and recipe.sft == {}


# --- overrides


@pytest.mark.parametrize(
    ("words", "stage", "where", "value"),
    [
        ("--learning_rate 1e-3", "sft", "sft.learning_rate", 1e-3),
        ("--learning_rate=1e-3", "distill", "distill.learning_rate", 1e-3),
        ("--top_k 7", None, "cache.top_k", 7),
        ("--name 123", "sft", "name", "123"),
        ("--seed 5", "sft", "seed", 5),
        ("--sft.seed 5", None, "seed", 3),
        ("--sft.seed 5", None, "sft.seed", 5),
        ("--max_length 32", "distill", "task.max_length", 32),
        ("--eval_strategy no", "sft", "sft.eval_strategy", "no"),
        ("--packing", "sft", "sft.packing", True),
        ("--distill.use_peft=true --lora_alpha 4", "distill", "distill.lora_alpha", 4),
        ("--lora_target_modules q_proj v_proj", "distill", "distill.lora_target_modules", ["q_proj", "v_proj"]),
        ("--datasets.train.max_rows 10", None, "datasets.train.max_rows", 10),
        ("--datasets.train.revision 1234567", None, "datasets.train.revision", "1234567"),
        ("--datasets.train.max_rows null", None, "datasets.train.path", "json"),
        ("--task.choices|[yes please, 'no']", None, "task.choices", ["yes please", "no"]),
        ("--task.prompt|Q: {text}", None, "task.prompt", "Q: {text}"),
        ("--push.revision null", None, "push.hub_model_id", "me/student"),
        ("--arms.first.learning_rate 1e-5", None, "arms", {**DEFAULT_ARMS, "first": {"learning_rate": 1e-5}}),
        ("--arms.extra.recalibration_method none", None, "arms.extra.recalibration_method", "none"),
        ("--seed -0 --report_to none", "sft", "sft.report_to", "none"),
    ],
)
def test_an_override_goes_where_it_belongs(words, stage, where, value):
    recipe = load_recipe(write(), words.split("|" if "|" in words else None), stage)
    result = reduce(getitem, where.split("."), recipe.to_dict())
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        ("--learning_rate 1e-3", "--learning_rate: it is a setting of several|--sft.learning_rate or --distill"),
        ("--learning_rat 1", "--learning_rat: it is unknown|did you mean learning_rate?"),
        ("--lr 1", "--lr: it is unknown|sft.learning_rate"),
        ("--cache.top_kk 1", "command line: cache.top_kk = 1: unknown key; did you mean top_k?"),
        ("--cahce.top_k 1", "command line: cahce: unknown key; did you mean cache?"),
        ("--cache.top_k many", "command line: cache.top_k = 'many': it does not fit"),
        ("--name.x 1", "--name.x needs a mapping here"),
        ("5", "command line: 5: it belongs to no setting"),
        ("--name ../up", "command line: name = '../up'"),
        ("--cache.support choices --task.choices null", "task.choices = None|cache.support: choices"),
        (
            "--cache.support choices --task.append_eos false --datasets.test.reviews.task.choices null",
            "datasets.test.reviews.task.choices = None|this set",
        ),
        ("--top_k 1 --lr", "--lr: it is unknown|it belongs in sft"),
    ],
)
def test_a_wrong_override_is_named(words, phrases):
    refused(write(), words.split(), phrases)


def test_an_override_takes_the_place_of_what_is_wrong_in_the_file():
    assert load_recipe(write("models/teacher", "${NOWHERE}"), ["--sft.model_name_or_path", "models/teacher"])


# --- what is refused: (text to replace, replacement, phrases of the message)

BROKEN = [
    ("  top_k: 5", "  topk: 5", "line 19: cache.topk = 5|unknown key|did you mean top_k?"),
    (RATE, "learnin_rate: 1", "sft.learnin_rate|did you mean learning_rate?"),
    ("  method: temp", "  top_k: 3\n  method: temp", "calibrate.top_k|cache.top_k"),
    ("  lora_r: 8", "  rank: 8", "distill.rank = 8|did you mean lora_r?"),
    ("calibrate:", "calibrat:", "line 20: calibrat: unknown key; did you mean calibrate?"),
    ("name: tiny", "name: tiny\nlearning_rate: 1.0", "learning_rate|belongs in sft.learning"),
    ("name: tiny\n", "", "name: it is missing"),
    ("name: tiny", "name: ../../etc", "line 1: name = '../../etc'|letters, digits"),
    ("name: tiny", "name: .", "name = '.'"),
    ("name: tiny", "name: 2024", "name = 2024: |put it in quotes"),
    (RATE, "learning_rate: fast", "sft.learning_rate = 'fast'|number"),
    (TOP_K, "top_k: [7]", "cache.top_k = [7]|write 7 without the brackets"),
    (TOP_K, "top_k: 7.5", "cache.top_k = 7.5|integer"),
    (TOP_K, "top_k: yes", "cache.top_k = True|integer"),
    ("use_peft: true", "use_peft: 'true'", "use_peft = 'true'|boolean"),
    (RATE, "learning_rate: .inf", "sft.learning_rate = inf|number"),
    (TOP_K, "top_k:", "cache.top_k = None|integer"),
    ("[good, bad]", "[yes, no]", "task.choices = [True, False]|put it in quotes"),
    (RATE, "eval_strategy: no", "eval_strategy = False|put it in quotes"),
    ("cache:", "no: 1\ncache:", "line 18: no: YAML reads this key as bool|quote it"),
    ("cache:", "? [a]\n: 1\ncache:", "line 18: ?: a key must be text"),
    (TOP_K, "top_k: 0", "cache.top_k = 0: it does not fit; write a value greater"),
    (RATE, "learning_rate: -1", "sft.learning_rate = -1: it does not fit; write a value greater"),
    ("method: temperature", "method: temprature",
     "calibrate.method = 'temprature'|did you mean temperature? Choose one of"),
    (RATE, "lr_scheduler_type: cosin", "lr_scheduler_type = 'cosin'|cosine"),
    (LOSS, "divergence: kl", "divergence = 'kl'|forward_kl, reverse_kl, jsd"),
    (RATE, "lora_r: 8", "line 17: sft.lora_r = 8|use_peft: true"),
    ("  use_peft: true\n  lora_r: 8\n  lora_target_modules: all-linear\n", "",
     "distill.load_in_4bit|cannot be trained without an adapter|use_peft: true"),
    ("  lora_r: 8", "  load_in_8bit: true", "distill.load_in_8bit|load_in_4bit is true as well"),
    ("data/train.jsonl", "data/trian.jsonl", "train.data_files = 'data/trian.jsonl'|no such file"),
    (TRAIN, "{path: x/train.jsonl}", "datasets.train.path = 'x/train.jsonl'|no such file"),
    (TRAIN, "{path: json}", "datasets.train.path = 'json'|write data_files"),
    (TRAIN, "{path: ./nowhere}", "datasets.train.path = './nowhere'|no such folder"),
    (TRAIN, "{path: 'my data!'}", "neither a folder nor the id"),
    ("data/train.jsonl", "~/train.jsonl", "train.data_files = '~/train.jsonl'|${HOME}"),
    (TRAIN, "{split: train}", "datasets.train.path|missing"),
    ("models/teacher", "./models/techer", "sft.model_name_or_path|no such folder"),
    ("models/student", "/models/student/x", "distill.model_name_or_path|no such folder"),
    ("  model_name_or_path: models/teacher\n", "", "sft.model_name_or_path: there is no teacher"),
    ("  model_name_or_path: models/student\n", "", "distill.model_name_or_path: there is no student"),
    ("data/validation.jsonl", "data/test.jsonl",
     "line 12: datasets.test.reviews|same rows as datasets.validation|rows of its own"),
    ("data/train.jsonl", "./data/../data/test.jsonl", "datasets.test.reviews|same rows as datasets.train"),
    ("data/validation.jsonl", "data/train.jsonl", "datasets.validation|same rows"),
    ("  test:\n", "  transfer: {path: data/train.jsonl}\n  test:\n", "datasets.transfer|same rows as datasets.train"),
    ("  test:\n", "  transfer: {path: data/test.jsonl}\n  test:\n",
     "datasets.test.reviews|same rows as datasets.transfer"),
    ("    reviews:\n      path: json\n      data_files: data/test.jsonl\n", "", "datasets.test: it is missing"),
    ("    reviews:\n      path: json\n      data_files: data/test.jsonl\n", "    {}\n", "datasets.test: it is empty"),
    ("  train: {path", "  dev: {path: x}\n  train: {path", "datasets.dev: unknown key"),
    ("  validation: {path: json, data_files: data/validation.jsonl}\n", "", "datasets.validation: it is missing"),
    ("  train: {path: json, data_files: data/train.jsonl}\n", "", "datasets.train: it is missing"),
    (FILE, "data/train.jsonl, task: {append_eos: true}}", "datasets.train.task|test sets only"),
    ("      path: json", "      path: json\n      task: {promt: x}",
     "datasets.test.reviews.task.promt|did you mean prompt?"),
    ("      path: json", "      path: json\n      task: {prompt: '{text'}",
     "datasets.test.reviews.task.prompt|cannot be read"),
    ("    reviews:", "    a/b:", "datasets.test.a/b|use letters"),
    ("{text}", "{text.__class__}", "task.prompt|attributes"),
    ("{text}", "{text", "line 4: task.prompt|cannot be read"),
    ("{label}", "{label}{text}", "task.completion|exactly one column, not 2"),
    ('  completion: " {label}"\n', "", "task.prompt|without completion"),
    (PUSH, "arms: {first: {}, a/b: {}}\npush:", "arms.a/b|use letters"),
    (PUSH, "arms: {first: {}, teacher: {}}\npush:", "arms.teacher|choose another name"),
    (PUSH, "arms: {first: {}, best: {}}\npush:", "arms.best|another name"),
    (PUSH, "arms: {first: {tial: bucket}}\npush:", "arms.first.tial|did you mean tail?"),
    (PUSH, "arms: {first: {trainer: dpo}}\npush:", "arms.first.trainer = 'dpo'|first, sft"),
    (PUSH, "arms: {first: {}, a: {trainer: sft, tail: bucket}}\npush:", "arms.a.tail|trainer: sft does not know it"),
    ("  hub_model_id", "  arm: second\n  hub_model_id", "push.arm = 'second'|fine_tuned"),
    ("me/student", "student", "push.hub_model_id = 'student'|owner/name"),
    (RATE, "output_dir: x", "sft.output_dir|at the top of the recipe"),
    (RATE, "dataset_kwargs: {}", "sft.dataset_kwargs|the task section"),
    (RATE, "push_to_hub: true", "sft.push_to_hub|push section"),
    (RATE, "max_length: 9", "sft.max_length = 9|task.max_length"),
    (RATE, "label_smoothing_factor: 0.1", "recalibration_method: label_smoothing"),
    (RATE, "use_liger_kernel: true", "sft.use_liger_kernel|remove it"),
    (RATE, "include_for_metrics: [loss]", "first-trl evaluate"),
    (LOSS, "loss_type: dft", "distill.loss_type|divergence"),
    (LOSS, "divergence: jsd\n  mass_fraction: 0.5", "mass_fraction|bucket"),
    (RATE, "load_best_model_at_end: true", "eval_strategy is no"),
    (RATE, "bf16: true\n  fp16: true", "sft.fp16|keep one of the two"),
    (RATE, "hub_token: hf_abcdefghijklmnopqrst", "hub_token = (not shown)|hf auth login"),
    ("me/student", "me/hf_abcdefghijklmnopqrst", "(not shown)|credential"),
    ("models/teacher", "${HF_TOKEN}", "HF_TOKEN looks like a secret|hf auth login"),
    (FILE, "'${NOWHERE_X}/a'}", "NOWHERE_X is not set|${NOWHERE_X:-default}"),
    (FILE, "'${a b}'}", "${a b} is not a variable"),
    ("  top_k: 5", "  top_k: 5\n  top_k: 9", "line 20: cache.top_k = 9: it is written twice, first on"),
    (PUSH, "cache: {}\npush:", "cache: it is written twice, first on line 18"),
    ("cache:\n  top_k: 5", "cache: [5]", "cache = [5]: it needs a mapping"),
    (TOP_K, "top_k: 2024-01-01", "cache.top_k|as date|put it in quotes"),
    (TOP_K, "top_k: !!python/object:os.system {}", "cache.top_k|YAML cannot read it"),
    (TOP_K, "top_k: !!python/name:os.system x", "cache.top_k|YAML cannot read it"),
    (TOP_K, "top_k: !!set {a, b}", "cache.top_k = '!!set': YAML cannot read it"),
    ("cache:\n", "cache\n", "line 19: this is not YAML"),
    ("  top_k: 5", "\ttop_k: 5", "line 19: this is not YAML"),
    (TOP_K, f"top_k: {'[' * 40}{']' * 40}", "too many values"),
    ("cache:\n", "cache:\n  <<: {dtype: float32}\n", "merge keys|write the keys out"),
    (LOSS, "divergence: reverse_kl\n  recalibration_method: probability",
     "divergence = 'reverse_kl'|every loss would be infinite|forward_kl or jsd"),
    ("test:\n", "test:\n    validation: {path: a/b}\n", "datasets.test.validation|choose another name"),
    ("divergence: jsd\n", "divergence: jsd\n  seed: 3\nseeds: [0, 1]\n", "distill.seed = 3|seeds for every student"),
    ("name: tiny", "name: tiny\nseeds: [1, 1]", "seeds = [1, 1]|different whole numbers"),
    ("name: tiny", "name: tiny\nseeds: 3", "seeds = 3: "),
    ("[good, bad]", "[good]", "task.choices = ['good']|at least two different answers"),
    ('" {label}"\n  choices: [good, bad]', '"  "', "task.completion = '  '|it is empty"),
    ("{text}", "{text!r}", "task.prompt|format or a conversion"),
    ("  max_length: 64", "  chat_template_kwargs: {a: 1}", "task.chat_template_kwargs|remove prompt and completion"),
    (FILE, "data/train.jsonl, columns: {a: x, b: x}}", "datasets.train.columns|keep one of them"),
    (FILE, "data/train.jsonl, columns: {a: 1}}", "train.columns"),
    (FILE, "data/train.jsonl, max_rows: 0}", "max_rows = 0|write a value"),
    ("me/student", "../../x", "push.hub_model_id = '../../x'|owner/name"),
    (TOP_K, "teacher_revision: v1", "there is no cache.teacher"),
    (TOP_K, "backend: server", "cache.server_url: it is not|http://127.0.0.1"),
    (TOP_K, "server_url: http://h:1", "cache.server_url|backend: server"),
    (TOP_K, "backend: server\n  server_url: http://h:1\n  teacher_dtype: auto",
     "cache.teacher_dtype = 'auto'|backend: hf"),
    ("  top_k: 5", "  support: choices", "task.append_eos|append_eos: false"),
    (LOSS, "recalibration_method: none\n  recalibration_value: 2",
     "distill.recalibration_value = 2|a value alone means temperature"),
    (LOSS, "eval_packing: true", "distill.eval_packing = True|padding_free: true"),
    ("  max_length: 64", "  supervise: all", "task.supervise = 'all'|free answers|remove it"),
    (LOSS, "packing: true\n  packing_strategy: wrapped", "distill.packing_strategy = 'wrapped'|packing_strategy: bfd"),
    (LOSS, "rounds: 2\n  closing: false", "distill.rounds = 2|closing: true"),
    (LOSS, "rounds: 2\n  recalibration_method: probability", "distill.rounds = 2|temperature, not probability"),
    (PUSH, "arms: {first: {closing: false}}\npush:", "arms.first.closing = False: unknown key|distill.closing"),
    ("method: temperature", "method: vocabulary_temperature",
     "calibrate.method = 'vocabulary_temperature'|write temperature"),
    (PUSH, "arms: {first: {recalibration_method: vocabulary_temperature}}\npush:",
     "arms.first.recalibration_method|write temperature"),
    ("method: temperature", "include_eos: true", "calibrate.include_eos = True|remove it"),
    (TOP_K, "tail_knots: true", "cache.tail_knots = True|was removed|remove it"),
    (RATE, "cross_fit: 2", "sft.cross_fit = 2|datasets.transfer"),
    (TOP_K, "backend: vllm", "cache.backend = 'vllm'|vllm serve|backend: server"),
    (TOP_K, "vllm_options: {a: 1}", "cache.vllm_options|vllm serve|server_url"),
    # code that comes with a model
    *((old, new, "trust_remote_code|never run") for old, new in (
        (RATE, "trust_remote_code: true"), (RATE, "lr_scheduler_kwargs: {trust_remote_code: true}"),
        (LOSS, "lr_scheduler_kwargs: {a: [{trust_remote_code: true}]}"),
    )),
    *((old, new.format(name), "attn_implementation = |kernel on the Hub")
      for name in ("kernels-community/flash-attn", "someone/attention:v1") for old, new in (
        (RATE, "attn_implementation: {}"), (TOP_K, "attn_implementation: {}"),
        (LOSS, "lr_scheduler_kwargs: {{attn_implementation: {}}}"),
    )),
    # credentials, which are never repeated
    *(("me/student", f"me/{value}", "hub_model_id = (not shown)|hf auth login")
      for value in ("ghp_" + "a1" * 12, "github_pat_" + "a1" * 12, "glpat-" + "a1" * 12, "AKIA" + "A1" * 8,
                    "sk-" + "a1" * 16, "xoxb-" + "a1" * 12, "hf_abcdefghijklmnopqrst")),
    *((TOP_K, f"backend: server\n  server_url: {url}", "cache.server_url = (not shown)|hf auth login")
      for url in ("http://me:letmein@h:1", "http://h:1/v1?token=letmein", "http://h:1/v1?a=b&api_key=letmein")),
    *((RATE, f"lr_scheduler_kwargs: {{{key}: letmein}}", f"{key} = (not shown)|hf auth login")
      for key in ("password", "pass", "pwd", "pat", "auth", "dsn", "api_key", "access_token", "credentials")),
    *(("models/teacher", f"${{{name}:-x}}", f"{name} looks like a secret")
      for name in ("AWSPASS", "DB_PWD", "GITHUB_PAT", "SENTRY_DSN", "API_KEY", "my_auth", "mytoken", "KEY")),
    # sizes that would never end
    *((old, new.format(value), "write a value less")
      for value in (10**9, 2**63) for old, new in (
        ("  method: temp", "  bootstrap: {}\n  method: temp"), ("  method: temp", "  num_bins: {}\n  method: temp"),
        (PUSH, "evaluate: {{bootstrap: {}}}\npush:"), (PUSH, "evaluate: {{num_bins: {}}}\npush:"),
    )),
    *((old, new, "9223372036854775808|write a value less") for old, new in (
        ("seed: 3", f"seed: {2**63}"), ("seed: 3", f"seeds: [{2**63}]"), (RATE, f"seed: {2**63}"),
        (PUSH, f"evaluate: {{seed: {2**63}}}\npush:"),
    )),
    *((FILE, f"'{pattern}'}}", "train.data_files|the whole disk") for pattern in ("/**/*.jsonl", "/*/*/*/*.jsonl")),
    # names that are folders
    *(("name: tiny", f"name: {json.dumps(name)}", "name = |use letters") for name in (
        "..", "a/../b", "/etc", "a\\b", "a\0b", "a" * 300, "\u202ename", "a\nb", "-rf", "a b", "", "nam\u00e9")),
    *((old, new.format(json.dumps(name)), "use letters") for name in ("..", "a.b", "a b", "\u202e", "x" * 101)
      for old, new in ((PUSH, "arms: {{first: {{}}, {}: {{}}}}\npush:"), ("    reviews:", "    {}:"))),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "phrases"), BROKEN)
def test_a_broken_recipe_is_refused_with_place_value_and_remedy(old, new, phrases):
    (problem,) = refused(write(old, new), phrases=phrases)
    assert "; " in problem  # what is wrong; what to do
    assert "letmein" not in problem and "hf_abcdefghijkl" not in problem


def test_a_reverse_divergence_is_refused_where_auto_may_choose_probability():
    path, reverse = write("method: temperature", "method: auto"), ["--distill.divergence", "reverse_kl"]
    refused(path, reverse, "`probability`, which `auto` may choose,|write forward_kl or jsd")
    for allowed in (["--distill.tail", "renormalize"], ["--distill.recalibration_method", "temperature"]):
        load_recipe(path, [*reverse, *allowed])


def test_all_problems_come_at_once_in_the_order_of_the_file():
    write(TOP_K, "topk: 5\n  dtype: float64\n  load_in_4bit: 1")
    text = Path("recipe.yaml").read_text().replace("data/train", "data/trian")
    Path("recipe.yaml").write_text(text)
    problems = refused("recipe.yaml", ["--sft.lora_r", "0"], "5 problems")
    in_file = ["line 9: datasets.train.data_files", "line 19: cache.topk", "line 20: cache.dtype"]
    wanted = ["command line: sft.lora_r", *in_file, "line 21: cache.load_in_4bit"]
    assert [problem.partition(" = ")[0] for problem in problems] == wanted


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
        (b"a: [" + b"1," * 499_000 + b"]", "more than a recipe can"),
        (b"a: [" + b"1," * 25_000 + b"]", "too many values"),
        (ALIASES, "too many values"),
        (b"a: &a [*a]\n", "too many values"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_at_once(content, words):
    if content is not None:
        Path("hostile.yaml").write_bytes(content)
    started = time.process_time()
    refused("hostile.yaml", phrases=words)
    assert time.process_time() - started < 5


def test_a_folder_and_a_test_set_without_a_name_are_named():
    refused("data", phrases="Is a directory")
    old, new = "    reviews:\n      path: json\n      data_files: data/test.jsonl", "    path: data/test.jsonl"
    refused(write(old, new), phrases="datasets.test.path = 'data/test.jsonl': it needs a mapping")


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_the_marks_of_other_editors_do_no_harm(change):
    Path("changed.yaml").write_text(change(Path(write()).read_text()), encoding="utf-8", newline="")
    assert load_recipe("changed.yaml") == load_recipe("recipe.yaml")


# --- extends


def test_a_recipe_changes_what_it_says_and_keeps_the_rest():
    base = load_recipe(write())
    Path("below").mkdir()
    own = "extends: ../recipe.yaml\nname: own\ncache: {top_k: 7, teacher: null}\narms: {b: {}, a: {}}\n"
    Path("below/own.yaml").write_text(own)
    recipe = load_recipe("below/own.yaml", ["--sft.learning_rate", "2", "--push.arm", "a"])
    assert (recipe.name, recipe.cache.top_k, recipe.sft["learning_rate"]) == ("own", 7, 2)
    assert list(recipe.arms) == ["b", "a"] and recipe.distill == base.distill and recipe.datasets == base.datasets
    recipe.write_resolved("resolved.yaml")
    assert load_recipe("resolved.yaml") == recipe and "extends" not in recipe.to_dict()
    tests = "datasets: {test: {reviews: null, own: {path: json, data_files: data/test.jsonl}}}\n"
    Path("below/own.yaml").write_text(own + tests)
    assert list(load_recipe("below/own.yaml", ["--push.arm", "a"]).datasets.test) == ["own"]


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("extends: recipe.yaml\n", "name: it is missing"),  # it does not take the other's folder
        ("extends: nowhere.yaml\nname: a\n", "line 1: extends = 'nowhere.yaml'|no such recipe|relative"),
        ("extends: data\nname: a\n", "extends = 'data'|no such recipe"),
        ("extends: [recipe.yaml]\nname: a\n", "extends|no such recipe"),
        ("extends: own.yaml\nname: a\n", "extends = 'own.yaml'|only one level"),
        ("extends: chain.yaml\nname: a\n", "extends = 'chain.yaml'|only one level|extend the last one"),
        ("extends: broken.yaml\nname: a\n", "broken.yaml, line 3: this is not YAML"),
        ("extends: recipe.yaml\nname: a\nsft: {lr: 1}\n", "line 3: sft.lr = 1|did you mean learning_rate?"),
        ("extends: typo.yaml\nname: a\n", "typo.yaml, line 19: cache.topk = 5|did you mean top_k?"),
    ],
)
def test_a_broken_extension_is_named_with_its_file(text, phrases):
    write()
    write("top_k", "topk", name="typo.yaml")
    Path("chain.yaml").write_text("extends: recipe.yaml\n")
    Path("broken.yaml").write_text("a: 1\nb\nc: 2\n")
    Path("own.yaml").write_text(text)
    refused("own.yaml", phrases=phrases)


# --- commands


def test_show_prints_the_resolved_recipe_and_schema_what_it_may_hold(capsys):
    assert command.main(["show", write(), "--cache.top_k", "9"]) == 0
    Path("shown.yaml").write_text(capsys.readouterr().out)
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


def test_choices_are_those_of_the_enums_and_of_the_metadata(monkeypatch):
    from transformers.trainer_utils import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    specs = known_fields("SFTConfig")
    enums = {"eval_strategy": IntervalStrategy, "lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    for key, enum in enums.items():
        assert set(specs[key].choices) == {member.value for member in enum}
    assert known_fields("ModelConfig")["bnb_4bit_quant_type"].choices == ("fp4", "nf4")
    assert specs["bf16"].annotation == "bool | None"  # TrainingArguments says bool
    monkeypatch.setitem(CLASSES, "Moved", (("trl", "trainer/sft_config.py", "NoSuchConfig"),))
    with pytest.raises(RuntimeError, match="no longer defines NoSuchConfig"):
        known_fields("Moved")


def test_every_rule_and_every_setting_is_about_something():
    known = set(known_fields("FIRSTConfig")) | set(known_fields("ModelConfig"))
    earlier = {"cross_fit", "include_eos", "tail_knots", "vllm_options", "vllm", "vocabulary_temperature"}
    assert set(LIMITS) <= known and set(RESERVED) - known == earlier
    sections = [
        field.annotation for name, field in file_model().model_fields.items() if name not in ("sft", "distill")
    ]
    sections = [section for section in sections if hasattr(section, "model_fields")]
    for model in (*sections, DatasetConfig, WriteAnswers):
        assert all((field.description or "").endswith(".") for field in model.model_fields.values()), model
    assert len(sections) == 6


# --- speed


@pytest.mark.parametrize("case", [None, BROKEN[0], BROKEN[28]], ids=["fine", "key", "file"])
def test_a_recipe_is_checked_in_seconds_without_anything_heavy(case, pytestconfig):
    path = write(*case[:2]) if case else write()
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

"""Every command of the README is one that the project has: none is run, all are parsed."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from first_trl import __main__ as command
from first_trl.recipe import STAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
OURS = [line for line in COMMANDS if line.startswith(("first-trl", "accelerate launch"))]


def test_the_readme_has_the_commands_that_these_tests_read():
    assert len(COMMANDS) >= 13 and len(OURS) >= 9


@pytest.mark.parametrize("line", OURS)
def test_a_command_names_a_stage_a_recipe_and_a_configuration_that_exist(line, monkeypatch):
    words = shlex.split(line.partition(" < ")[0])
    files = [word for word in words if word.endswith(".yaml")]
    assert all((ROOT / file).is_file() for file in files), files
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        arguments, _ = launch_command_parser().parse_known_args(words[2:])
        assert arguments.module and arguments.training_script.removeprefix("first_trl.stages.") in STAGES
        return
    started = []
    monkeypatch.setattr(command, "launch", lambda stage, *_: started.append(stage) or 0)
    monkeypatch.setattr(command, "run_pipeline", lambda recipe, *_: started.append(recipe) or 0)
    monkeypatch.setattr("first_trl.merging._recipe_job", lambda options: {})  # it would look for the recipe's data
    monkeypatch.setattr("first_trl.merging.merge", lambda **job: started.append(job) or {})
    monkeypatch.setattr("first_trl.prediction.main", lambda argv: started.append(argv[0]) or 0)
    cache_command = command.cache_tools._parser().parse_args
    monkeypatch.setattr(command.cache_tools, "main", lambda words: started.append(cache_command(words)) or 0)
    monkeypatch.setattr("first_trl.demo.prepare_demo", lambda *_: ROOT / "first_trl/demo/demo.yaml")
    assert command.main(words[1:]) == 0 and len(started) == 1


def test_the_targets_of_make_exist():
    targets = {word for line in COMMANDS if line.startswith("make") for word in line.split()[1:]}
    assert targets >= {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_files_that_the_readme_names_exist():
    named = re.findall(r"(?:configs|recipes|docs)/[\w./-]+\.(?:yaml|png)", README)
    assert len(named) >= 8
    assert [file for file in named if not (ROOT / file).is_file()] == []


BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("python", "yaml")}


@pytest.mark.parametrize("code", BLOCKS["python"])
def test_the_python_compiles_and_takes_names_and_arguments_that_exist(code):
    tree = ast.parse(code)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
    looked = 0
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        if call.func.id in names:
            accepted = inspect.signature(names[call.func.id]).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
                assert {keyword.arg for keyword in call.keywords} <= set(accepted), call.func.id
            looked += 1
    assert looked


def test_the_sft_script_needs_five_changed_lines():
    (script,) = [code for code in BLOCKS["python"] if "# 5:" in code]
    assert re.findall(r"# (\d):", script) == ["1", "2", "3", "4", "5"]
    unmarked = "".join(line for line in script.splitlines(True) if not re.search(r"# \d:", line))
    assert not re.search("FIRST|recalib|cache", unmarked)


def test_the_recipes_of_the_examples_are_recipes(tmp_path, monkeypatch):
    from first_trl.recipe import load_recipe

    whole, arms, alone = BLOCKS["yaml"]
    (tmp_path / "data").mkdir()
    for name in ("train", "more", "validation", "test", "other"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(whole)
    assert load_recipe("recipe.yaml").name == "reviews"
    (tmp_path / "recipe.yaml").write_text(whole[: whole.index("arms:")] + arms)
    students = load_recipe("recipe.yaml")
    assert [students.arm_section(arm)["model_name_or_path"][-4:] for arm in students.arms] == ["0.6B", "1.7B", "3-4B"]
    (tmp_path / "recipe.yaml").write_text(alone)
    assert load_recipe("recipe.yaml").arms == {}


def test_the_metrics_that_the_readme_names_are_those_that_are_logged(make_model, tokenizer, tmp_path):
    from tests.test_trainer import cache_of, random_examples, trainer_for

    table = README[README.index("these names are logged") : README.index("In evaluation they begin")]
    named = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    rows = cache_of(make_model(), random_examples(4, 27))
    trainer = trainer_for(
        make_model(seed=1), rows, tokenizer, tmp_path, max_steps=1, ce_weight=0.5, save_strategy="no"
    )
    trainer.train()
    trl = {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "step"}
    assert set(trainer.state.log_history[0]) - trl == named
    assert {f"eval_{name}" for name in named} <= set(trainer.evaluate())

"""What the pages say can be typed and run: commands, recipes, and the README's Python, whose effect is checked."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from first_trl.__main__ import CACHE_COMMANDS, OTHERS
from first_trl.constants import STAGES
from tests.test_docs import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str, pages=PAGES) -> list[str]:
    return [found for page in pages for found in re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.DOTALL)]


LINES = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
COMMANDS = sorted({line for line in LINES if line.startswith(("first-trl", "accelerate launch"))})


def test_the_pages_have_the_commands_that_these_tests_read():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_a_stage_a_recipe_and_a_configuration_that_exist(line):
    words = shlex.split(line.partition(" < ")[0])
    files = [word for word in words if word.endswith(".yaml")]
    assert [file for file in files if file != "my-recipe.yaml" and not (ROOT / file).is_file()] == []
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1].removeprefix("first_trl.stages.") in STAGES
    else:
        known = {*STAGES, *OTHERS, "run", "demo", "report"}
        assert words[1] in known or words[1:3] == ["cache", words[2]] and words[2] in CACHE_COMMANDS


def test_the_targets_of_make_exist():
    targets = {word for line in LINES if line.startswith("make") for word in re.findall(r"\b[a-z-]+\b", line)[1:]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"demo", "test", "lint", "slow"}
    assert [target for target in targets if not re.search(rf"^{target}\b.*:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("code", blocks("python"))
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


def readme_script() -> str:
    (script,) = [code for code in blocks("python", [ROOT / "README.md"]) if "# 5:" in code]
    return script


def test_the_sft_script_needs_five_changed_lines():
    assert re.findall(r"# (\d):", readme_script()) == ["1", "2", "3", "4", "5"]
    unmarked = "".join(line for line in readme_script().splitlines(True) if not re.search(r"# \d:", line))
    assert not re.search("FIRST|recalib|cache|calibration", unmarked)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The folders that the README's script names: a base model, a cache of its rows, a calibration of T = 3."""
    import json

    import pyarrow.parquet as pq

    from tests.test_trainer import cache_of, random_examples
    from tests.tiny import build_model, build_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("readme"), build_tokenizer()
    wide = {"hidden_size": 128, "intermediate_size": 256}  # what the 4-bit kernels take in blocks
    for name, seed in (("student", 1), ("teacher", 0)):
        build_model(len(tokenizer), seed=seed, **wide).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = cache_of(build_model(len(tokenizer), seed=0, **wide), random_examples(8, len(tokenizer)))
    pq.write_table(rows.data.table, folder / "rows.parquet")
    found = {"method": "temperature", "value": 3.0, "families": {"temperature": {"value": 3.0}}}
    (folder / "calibration.json").write_text(json.dumps(found))
    return folder


def first_kl(script: str, folder: Path, tmp_path, monkeypatch) -> tuple[float, object]:
    """Run the README's script with the tiny folder in place of its names: the first step's KL, and the trainer."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(folder / "rows.parquet"))["train"]
    names = {
        '"Qwen/Qwen3-0.6B-Base"': f'"{folder / "student"}"',
        '"runs/reviews/calibration.json"': f'"{folder / "calibration.json"}"',
        '"runs/reviews/cache/train"': "rows",
        'output_dir="student",': 'output_dir="student", max_steps=1, logging_steps=1, seed=0, bf16=False,',
    }
    for name, ours in names.items():
        assert name in script or "calibration" in name
        script = script.replace(name, ours)
    monkeypatch.chdir(tmp_path)
    space = {"rows": rows}
    exec(script, space)
    trainer = space["trainer"]
    return next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry), trainer


def test_the_script_runs_and_distils_from_the_recalibrated_teacher(tiny_run, tmp_path, monkeypatch):
    script = readme_script()
    recalibrated, trainer = first_kl(script, tiny_run, tmp_path, monkeypatch)
    assert (trainer.args.recalibration_method, trainer.args.recalibration_value) == ("temperature", 3.0)
    (line,) = [line for line in script.splitlines(True) if "# 4:" in line]
    plain, trainer = first_kl(script.replace(line, ""), tiny_run, tmp_path, monkeypatch)
    assert trainer.args.recalibration_method in (None, "none")
    assert abs(recalibrated - plain) > 0.01
    assert trainer.model.get_base_model().config.quantization_config.bnb_4bit_compute_dtype is not None


def test_the_recipes_of_the_examples_are_recipes(tmp_path, monkeypatch):
    from first_trl.recipe import load_recipe

    (whole,) = blocks("yaml", [ROOT / "README.md"])
    arms, alone = blocks("yaml", [ROOT / "docs" / "python.md"])
    (tmp_path / "data").mkdir()
    for name in ("train", "more", "validation", "test", "other"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    recipes = {}
    for name, text in (("whole", whole), ("arms", whole + arms), ("alone", alone)):
        (tmp_path / f"{name}.yaml").write_text(text)
        recipes[name] = load_recipe(f"{name}.yaml")
    assert recipes["whole"].name == "reviews" and list(recipes["whole"].arms) == ["fine_tuned", "distilled", "first"]
    students = recipes["arms"]
    assert [students.arm_section(arm)["model_name_or_path"] for arm in list(students.arms)[1:]] == [
        "Qwen/Qwen3-1.7B",
        "Qwen/Qwen3-4B",
    ]
    assert recipes["alone"].arms == {}


def test_the_metrics_that_the_pages_name_are_those_that_are_logged(make_model, tokenizer, tmp_path):
    from tests.test_trainer import cache_of, random_examples, trainer_for

    page = (ROOT / "docs" / "python.md").read_text()
    table = page[page.index("these are logged") : page.index("## Calibrate only")]
    named = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    rows = cache_of(make_model(), random_examples(4, 27))
    trainer = trainer_for(
        make_model(seed=1), rows, tokenizer, tmp_path, max_steps=1, ce_weight=0.5, save_strategy="no"
    )
    trainer.train()
    trl = {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "step"}
    assert set(trainer.state.log_history[0]) - trl == named
    assert {f"eval_{name}" for name in named} <= set(trainer.evaluate())

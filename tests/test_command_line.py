"""The command line answers at once, says what it would do, and starts stages under accelerate."""

import subprocess
import sys

import pytest

from first_trl import __main__ as command
from first_trl.constants import STAGES
from tests.cache_recipe import write_recipe

HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy"}


def imported(*arguments: str) -> set[str]:
    """The top-level modules that a Python process imports; what they are decides how soon it answers."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], check=True, capture_output=True, text=True)
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "first_trl", "--help"],
        ["-m", "first_trl.stages.distill", "--help"],
        ["-c", "import first_trl, first_trl.__main__, first_trl.recipe, first_trl.checks"],
    ],
)
def test_help_and_recipes_are_read_without_importing_what_takes_seconds(arguments):
    loaded = imported(*arguments)
    assert "first_trl" in loaded and not HEAVY & loaded


def test_importing_the_package_costs_almost_nothing():
    assert imported("-c", "import first_trl") - imported("-c", "pass") == {"first_trl"}


def test_names_of_the_package_load_on_first_use():
    from first_trl import FIRSTConfig, FIRSTTrainer

    assert (FIRSTTrainer.__mro__[1].__name__, FIRSTConfig.__name__) == ("SFTTrainer", "FIRSTConfig")


def test_a_stage_is_one_process_or_under_accelerate_with_its_configuration(monkeypatch):
    started = []
    monkeypatch.setattr(command, "run_child", lambda arguments, environment: started.append(arguments[1:]) or 0)
    assert command.launch("cache", ["recipe.yaml", "--top_k", "7"], "configs/cpu.yaml") == 0
    assert command.launch("sft", ["recipe.yaml"], None) == 0
    launcher = ["--config_file=configs/cpu.yaml", "--quiet", "-m"]
    assert started[0][2:] == [*launcher, "first_trl.stages.cache", "recipe.yaml", "--top_k", "7"]
    assert started[1] == ["-m", "first_trl.stages.sft", "recipe.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "RECIPE", "--stages", "cache,distil"], "Unknown stage 'distil'"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["demo", "--output_dir", "RECIPE"], "cannot be written to (Not a directory)"),
        (["sft", "RECIPE", "--config_file", "nowhere.yaml"], "There is no nowhere.yaml"),
        (["report", "RECIPE"], "no report in"),
        (["sft", "--config_file"], "--config_file"),
        (["run"], "recipe"),
        (["nonsense"], "nonsense"),
        (["run", "RECIPE", "--config_fil", "x"], "config_fil"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(capsys, tmp_path, arguments, message):
    recipe = str(write_recipe(tmp_path, rows=4))
    capsys.readouterr()
    try:
        assert command.main([recipe if argument == "RECIPE" else argument for argument in arguments]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_model_that_cannot_be_had_is_one_line_outside_a_stage_too(capsys, tmp_path):
    recipe = str(write_recipe(tmp_path, rows=4))
    capsys.readouterr()
    assert command.main(["show", recipe, "--row", "0", "--cache.teacher", "owner/absent"]) == 1
    said = capsys.readouterr().err
    assert "[first-trl] show failed: a model cannot be loaded: " in said and "Traceback" not in said


def test_the_command_alone_names_the_stages_and_what_to_type_next(capsys):
    assert command.main([]) == 2
    said = capsys.readouterr().out
    assert all(f"\n    {stage} " in said for stage in STAGES) and "Next: `first-trl demo`" in said


def test_the_report_of_a_run_is_found(tmp_path, capsys):
    recipe, page = write_recipe(tmp_path, rows=4), tmp_path / "runs" / "tiny" / "report" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("")
    for argument in (recipe, tmp_path / "runs" / "tiny"):
        capsys.readouterr()
        assert command.main(["report", str(argument)]) == 0 and capsys.readouterr().out.strip() == str(page)

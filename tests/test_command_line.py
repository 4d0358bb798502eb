"""The command line answers at once, says what it would do, and starts stages under accelerate."""

import subprocess
import sys
import time

import pytest

from first_trl import __main__ as command

HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy")


def seconds(*arguments: str) -> float:
    """The best of three runs: a machine can be busy, a program cannot be faster than it is."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("arguments", [["-m", "first_trl", "--help"], ["-m", "first_trl.stages.distill", "--help"]])
def test_help_answers_within_a_second(arguments):
    assert seconds(*arguments) < 1.0


def test_importing_the_package_costs_almost_nothing():
    assert seconds("-c", "import first_trl") - seconds("-c", "pass") < 0.3


def test_nothing_heavy_is_imported_to_print_help_or_to_read_a_recipe():
    code = "import sys, first_trl, first_trl.__main__, first_trl.recipe; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "first_trl.recipe" in loaded
    assert not set(HEAVY) & set(loaded)


def test_names_of_the_package_load_on_first_use():
    code = "from first_trl import FIRSTTrainer as T, FIRSTConfig as C; print(T.__mro__[1].__name__, C.__name__)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["SFTTrainer", "FIRSTConfig"]


def test_a_stage_is_launched_under_accelerate_with_its_configuration(monkeypatch):
    commands = []

    def run(arguments, env):
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    command.main(["cache", "--config_file", "configs/multi_gpu.yaml", "recipe.yaml", "--top_k", "7"])
    command.main(["sft", "recipe.yaml"])
    assert commands[0][2:] == [
        *("accelerate.commands.launch", "--config_file=configs/multi_gpu.yaml", "--quiet"),
        *("-m", "first_trl.stages.cache"),
        *("recipe.yaml", "--top_k", "7"),
    ]
    assert commands[1][2:] == [
        *("accelerate.commands.launch", *command.SINGLE_PROCESS, "--quiet", "-m", "first_trl.stages.sft"),
        "recipe.yaml",
    ]


def test_an_unknown_stage_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("first_trl.recipe.load_recipe", lambda *_: None)
    assert command.main(["run", "recipe.yaml", "--stages", "cache,distil"]) == 2
    assert "Unknown stage 'distil'" in capsys.readouterr().err

"""Every command of the README is one that the project has: none is run, all are parsed."""

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
    monkeypatch.setattr("first_trl.prediction.main", lambda argv: started.append(argv[0]) or 0)
    cache_command = command.cache_commands._parser().parse_args
    monkeypatch.setattr(command.cache_commands, "main", lambda words: started.append(cache_command(words)) or 0)
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

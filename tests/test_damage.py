"""What is damaged or changed after a run was finished: found, named, healed by the command that the message names.

The tables are walked in full by the slow suite; the default suite takes the cases of `FAST`.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from first_trl.recipe import load_recipe
from first_trl.run import Run
from first_trl.stages import cache, calibrate, distill, evaluate, push, sft
from tests.test_stages import tiny_recipe

STAGES = {"sft": sft, "cache": cache, "calibrate": calibrate, "distill": distill, "evaluate": evaluate}
TRAINING = {"dtype": "float32", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no"}
TRAINING |= {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_total_limit": 2}


@contextmanager
def inside(folder):
    """`folder` as the current directory, its stages on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.chdir(folder)
        yield patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of all stages, with its recipe; paths in it are relative to the folder."""
    folder = tmp_path_factory.mktemp("finished")
    path = tiny_recipe(folder, arms={"fine_tuned": {"trainer": "sft"}, "first": {}})
    (folder / "teacher").rename(folder / "base")
    content = yaml.safe_load(path.read_text().replace(f"{folder}/", ""))
    content["cache"].pop("teacher")
    content["sft"] = content["distill"] = {"model_name_or_path": "base", **TRAINING}
    content["push"] = {"hub_model_id": "me/tiny"}
    path.write_text(yaml.safe_dump(content))
    with inside(folder):
        run_all()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, which is the current directory; returns its run folder."""
    with inside(shutil.copytree(finished, tmp_path / "copy")):
        yield tmp_path / "copy" / "runs" / "tiny"


def run_all(*arguments):
    """As `first-trl run` does, in this process; returns the jobs that were made."""
    made = []
    for name in Run(load_recipe("recipe.yaml", arguments)).jobs:
        if Run(load_recipe("recipe.yaml", arguments)).stale(name):
            stage, _, student = name.partition(".")
            STAGES[stage].main(["recipe.yaml", *(["--arm", student] if student else []), *arguments])
            made.append(name)
    return made


def refused(command, *arguments):
    with pytest.raises(SystemExit) as stop:
        command.main(["recipe.yaml", *arguments])
    return str(stop.value.code)


def content_of(folder):
    """What downstream reads of a run: weights, shards, values; and the report's figures."""
    names = [*folder.rglob("*.safetensors"), *folder.rglob("*.parquet"), folder / "calibration.json"]
    figures = json.loads((folder / "report" / "metrics.json").read_text())["arms"]
    return {str(name.relative_to(folder)): name.read_bytes() for name in names if "push" not in name.parts}, figures


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=times)


def empty(file):
    file.write_bytes(b"")


def gone(file):
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def nonsense(file):
    file.write_text("{}")


def other(file):
    shutil.copy(file.parents[1] / "fine_tuned" / file.name, file)


SHARD, WEIGHTS, FIRST = "cache/train/train-000001.parquet", "model.safetensors", "students/first"
# (what is damaged, how) -> the jobs that `run` makes again
DAMAGE = {
    (SHARD, gone): ["cache"],
    (SHARD, flip): ["cache"],
    (SHARD, empty): ["cache"],
    ("cache/validation/train-000000.parquet", half): ["cache"],
    ("cache/train/manifest.json", half): ["cache"],
    ("cache/train/manifest.json", nonsense): ["cache"],
    ("cache/train", gone): ["cache"],
    ("calibration.json", half): ["calibrate"],
    ("calibration.json", gone): ["calibrate"],
    ("report/metrics.json", half): ["evaluate"],
    ("report/index.html", gone): ["evaluate"],
    (f"{FIRST}/predict.json", half): ["distill.first"],
    (f"{FIRST}/calibration.json", nonsense): ["distill.first"],
    (f"teacher/{WEIGHTS}", half): ["sft"],
    (f"teacher/{WEIGHTS}", flip): ["sft"],
    ("teacher/trainer_state.json", half): ["sft"],
    ("teacher", gone): ["sft"],
    (f"{FIRST}/{WEIGHTS}", gone): ["distill.first"],
    (f"{FIRST}/{WEIGHTS}", half): ["distill.first"],
    (f"{FIRST}/{WEIGHTS}", other): ["distill.first"],
    (f"{FIRST}/trainer_state.json", half): ["distill.first"],
    (f"{FIRST}/tokenizer.json", nonsense): ["distill.first"],
    (".records/cache.json", half): ["cache"],
    (".records/distill.first.json", nonsense): ["distill.first"],
}
FAST = [(SHARD, flip), ("calibration.json", half), (f"{FIRST}/{WEIGHTS}", other), (".records/cache.json", half)]


def marked(cases, fast):
    return [pytest.param(*case, marks=[] if case[:2] in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "damage", "again"), marked([(*case, again) for case, again in DAMAGE.items()], FAST))
def test_what_is_damaged_is_named_by_push_and_made_by_run_and_that_alone(run, name, damage, again):
    before = content_of(run)
    damage(run / name)
    message = refused(push, "--dry_run")
    assert name.removeprefix(".records/").removesuffix(".json").partition("/")[0].split(".")[0] in message
    assert re.search(r"`first-trl \w+ RECIPE( --arm \S+)?`", message)[0].split()[1] == again[0].split(".")[0]
    assert run_all() == again
    push.main(["recipe.yaml", "--dry_run"])
    assert content_of(run) == before


def edit(file, old, new):
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def edit_recipe(change):
    content = yaml.safe_load(Path("recipe.yaml").read_text())
    change(content)
    Path("recipe.yaml").write_text(yaml.safe_dump(content))


def swap_base():
    edit_recipe(lambda recipe: recipe["distill"].update(model_name_or_path="other"))
    shutil.copytree("base", "other")
    edit("other/config.json", '"bos_token_id"', '"was_bos_token_id"')


OF_FIRST = Path("runs/tiny", FIRST, WEIGHTS)
# What changes after a run: (options, a change of the files, what the refusal of push names)
EDITS = [
    (["--distill.learning_rate", "0.5"], None, "distill.learning_rate is 0.5"),
    (["--cache.top_k", "4"], None, "cache.top_k is 4, and was 5"),
    (["--sft.max_steps", "9"], None, "sft.max_steps is 9, and was 2"),
    (["--calibrate.criterion", "nll"], None, "calibrate.criterion is 'nll'"),
    (["--task.prompt", "Film : {text} Sentiment :"], None, "task.prompt is"),
    ([], swap_base, "model_name_or_path"),
    ([], lambda: edit("base/config.json", '"bos_token_id"', '"was"'), "config.json of sft.model"),
    ([], lambda: other(OF_FIRST.absolute()), "students/first"),
    ([], lambda: half(OF_FIRST), "students/first"),
    ([], lambda: edit("runs/tiny/calibration.json", "0", "1"), "calibration.json is"),
    ([], lambda: edit("train.jsonl", '"good"', '"bad"'), "train.jsonl of datasets.train"),
    ([], lambda: edit("runs/tiny/report/metrics.json", "0", "1"), "metrics.json is not as"),
]


@pytest.mark.parametrize(("arguments", "change", "named"), EDITS, ids=[edit[-1] for edit in EDITS])
def test_push_is_refused_after_every_edit_and_names_what_is_stale(run, arguments, change, named):
    if change:
        change()
    message = refused(push, "--dry_run", *arguments)
    assert named in message and "RECIPE" in message and not (run / "push").exists()


def test_a_student_made_with_other_settings_is_neither_evaluated_nor_pushed_as_if_by_todays(run):
    distill.main(["recipe.yaml", "--arm", "first", "--learning_rate", "1e-3"])
    message = refused(evaluate)
    assert (
        "distill.learning_rate is not set, and was 0.001" in message
        and "first-trl distill RECIPE --arm first" in message
    )
    evaluate.main(["recipe.yaml", "--arms.first.learning_rate", "1e-3"])


def flip_label(file):
    times = os.stat(file).st_atime_ns, os.stat(file).st_mtime_ns
    edit(file, '"good"', '"evil"')
    os.utime(file, ns=times)


BY_PATTERN, IN_FOLDER = {"path": "json", "data_files": "data/*.jsonl"}, {"path": "data", "data_files": "*.jsonl"}
CHANGED = {
    "a label behind a pattern": (BY_PATTERN, lambda: edit("data/0.jsonl", '"good"', '"bad"')),
    "a new file behind a pattern": (BY_PATTERN, lambda: shutil.copy("data/0.jsonl", "data/1.jsonl")),
    "a file of a folder": (IN_FOLDER, lambda: edit("data/0.jsonl", '"good"', '"bad"')),
    "the same size and time": (BY_PATTERN, lambda: flip_label("data/0.jsonl")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_changed_data_is_noticed_and_used(run, name):
    train, change = CHANGED[name]
    os.mkdir("data")
    shutil.copy("train.jsonl", "data/0.jsonl")
    edit_recipe(lambda recipe: recipe["datasets"].update(train=train))
    edit_recipe(lambda recipe: recipe["task"].pop("choices"))
    run_all()
    before = Run(load_recipe("recipe.yaml")).record("cache")["outputs"]
    change()
    assert run_all() == ["sft", "cache", "calibrate", "distill.fine_tuned", "distill.first", "evaluate"]
    assert Run(load_recipe("recipe.yaml")).record("cache")["outputs"] != before


README = [
    (calibrate, ["--method", "probability"]),
    (distill, ["--arm", "first", "--learning_rate", "1e-3"]),
    (evaluate, []),
    (push, ["--dry_run"]),
    (distill, ["--arm", "first", "--attn_implementation", "nonsense"]),
    (cache, ["--top_k", "3"]),
    (sft, ["--max_steps", "1"]),
]


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_the_readmes_lines_in_any_order_never_lose_a_student(run, order):
    students = [run / "students" / arm / WEIGHTS for arm in ("fine_tuned", "first")]
    for stage, arguments in README[::order]:
        try:
            stage.main(["recipe.yaml", *arguments])
        except SystemExit as stop:
            assert "RECIPE`" in str(stop.code) or "nonsense" in str(stop.code), stop.code
        assert all(student.is_file() for student in students), (stage.__name__, arguments)
        assert (run / "teacher" / WEIGHTS).is_file() and (run / "cache" / "train" / "manifest.json").is_file()
    run_all()
    push.main(["recipe.yaml", "--dry_run"])


CHECKPOINTS = [
    ("trainer_state.json", empty), ("trainer_state.json", half), ("model.safetensors", half),
    ("model.safetensors", gone), ("optimizer.pt", half), ("optimizer.pt", gone), ("scheduler.pt", half),
    ("rng_state.pth", half), ("rng_state.pth", empty), ("first_trl_files.json", half),
]  # fmt: skip
LONGER = ["recipe.yaml", "--arm", "first", "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture(scope="module")
def interrupted(finished, tmp_path_factory):
    """(the finished run, its first student being trained anew and stopped at step 2 of 3; its weights otherwise)."""
    from first_trl.checkpoints import ListFiles

    stopped, other = (shutil.copytree(finished, tmp_path_factory.mktemp(name) / "run") for name in "ab")
    with inside(other):
        distill.main(LONGER)
    with inside(stopped) as patch:
        on_save = ListFiles.on_save

        def stop(self, args, state, control, **kwargs):
            on_save(self, args, state, control, **kwargs)
            if state.global_step == 2:
                raise KeyboardInterrupt

        patch.setattr(ListFiles, "on_save", stop)
        assert refused(distill, *LONGER[1:]) == "130"
    return stopped, (other / OF_FIRST).read_bytes()


@pytest.mark.parametrize(("name", "damage"), marked(CHECKPOINTS, CHECKPOINTS[4:6]))
def test_a_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(
    interrupted, tmp_path, capsys, name, damage
):
    stopped, undisturbed = interrupted
    with inside(shutil.copytree(stopped, tmp_path / "run")):
        damage(Path("runs/tiny/students/.new/first/checkpoint-2", name))
        distill.main(LONGER)
        assert f"checkpoint-2 cannot be resumed from: {name}" in capsys.readouterr().err
        assert OF_FIRST.read_bytes() == undisturbed

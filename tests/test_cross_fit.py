"""Several teachers, each trained on all folds but one: no row is labelled by a teacher that has learned it."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from first_trl.cache.format import CacheError
from first_trl.cache.identity import open_recipe_cache
from first_trl.cache.reader import open_cache
from first_trl.data.folds import fold_of, rows_outside
from first_trl.plan.estimate import make_plan
from first_trl.plan.machine import Machine
from first_trl.recipe.loading import RecipeError, load_recipe
from first_trl.run import is_current, teacher_folders, teacher_path
from first_trl.stages import cache, calibrate, distill, evaluate, sft
from first_trl.training import teacher_section
from tests.cache_recipe import write_recipe

TASK = {
    "prompt": "Review : {text} Sentiment :",
    "completion": " {label}",
    "choices": ["good", "bad"],
    "append_eos": False,
    "max_length": 60,
}


@pytest.fixture(scope="module", autouse=True)
def on_cpu(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def crossed_recipe(folder, **sections):
    path = write_recipe(folder, rows=30, rows_per_shard=8, task=TASK, **{"cache": {"teacher": None}, **sections})
    content = yaml.safe_load(path.read_text())
    (folder / "teacher").rename(folder / "base")
    content["distill"]["model_name_or_path"] = str(folder / "base")
    training = {"model_name_or_path": str(folder / "base"), "dtype": "float32", "bf16": False, "use_cpu": True}
    training |= {"max_steps": 3, "gradient_checkpointing": False, "learning_rate": 0.01, "cross_fit": 2}
    content["sft"] = training | content.get("sft", {})
    content["evaluate"] = {"bootstrap": 0}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """The recipe of a run whose two teachers are trained and cached."""
    path = crossed_recipe(tmp_path_factory.mktemp("crossed"))
    sft.main([str(path)])
    cache.main([str(path)])
    return path


def example(*prompt):
    return {"input_ids": [*prompt, 9], "labels": [-100] * len(prompt) + [9]}


def test_a_fold_follows_from_prompt_and_seed_alone_and_folds_are_of_like_size():
    rows = [example(i, i + 1, i * i) for i in range(600)]
    folds = [fold_of(row, 3, seed=0) for row in rows]
    assert np.bincount(folds).min() > 160
    assert folds == [fold_of({**row, "input_ids": [*row["input_ids"][:-1], 7]}, 3, seed=0) for row in rows]
    assert folds != [fold_of(row, 3, seed=1) for row in rows]
    assert rows_outside(rows, 1, 3, 0) == [i for i, fold in enumerate(folds) if fold != 1]
    with pytest.raises(ValueError, match="sft.cross_fit is 2, and fold . has . of 2 rows.*fewer folds"):
        rows_outside([rows[0], rows[0]], folds[0] % 2, 2, 0)


def test_every_row_is_cached_by_the_teacher_that_has_not_seen_it(crossed):
    recipe = load_recipe(crossed)
    assert teacher_path(recipe) == teacher_folders(recipe)[0] and len(teacher_folders(recipe)) == 2
    teachers = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in teacher_folders(recipe)]
    for role, rows in (("train", 30), ("validation", 33)):
        opened = open_cache(recipe.run_folder / "cache" / role)
        assert len(opened.dataset) == rows and opened.manifest["teacher"]["cross_fit"] == 2
        folds = [fold_of(row, 2, recipe.seed) for row in opened.dataset]
        assert set(folds) == {0, 1}
        for row, fold in zip(opened.dataset, folds, strict=True):
            with torch.no_grad():
                logits = [teacher(torch.tensor([row["input_ids"][:-1]])).logits[0, -1] for teacher in teachers]
            own, other = (
                scores.log_softmax(-1)[row["teacher_ids"][0]].numpy() for scores in (logits[fold], logits[1 - fold])
            )
            np.testing.assert_allclose(row["teacher_log_probs"][0], own, atol=5e-3)
            assert np.abs(own - other).max() > 0.02


def test_a_teacher_learns_the_rows_outside_its_fold(tmp_path, monkeypatch):
    path, learned = crossed_recipe(tmp_path), []

    def stop(trainer, folder, continues):
        learned.append({tuple(row["input_ids"]) for row in trainer.train_dataset})
        Path(folder).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr("first_trl.training.train_and_save", stop)
    sft.main([str(path)])
    recipe = load_recipe(path)
    from transformers import AutoTokenizer

    from first_trl.training import tokenized_splits

    rows = tokenized_splits(recipe, ("train",), AutoTokenizer.from_pretrained(tmp_path / "base"))["train"]
    for fold in range(2):
        own = {tuple(row["input_ids"]) for row in rows if fold_of(row, 2, recipe.seed) == fold}
        assert own and not own & learned[fold] and own | learned[fold] == {tuple(row["input_ids"]) for row in rows}


def test_finished_teachers_and_caches_are_kept_by_an_interrupted_run(tmp_path, capsys):
    path = crossed_recipe(tmp_path)
    sft.main([str(path)])
    recipe = load_recipe(path)
    first, second = (Path(folder) / "model.safetensors" for folder in teacher_folders(recipe))
    kept = first.stat().st_mtime_ns
    record = recipe.run_folder / ".records" / "sft.json"
    inputs = json.loads(record.read_text())["inputs"]
    record.unlink()  # as if it had been killed while it trained the second
    (recipe.run_folder / ".records" / "sft.started.json").write_text(json.dumps(inputs))
    (second.parent / "trainer_state.json").unlink()
    before = second.stat().st_mtime_ns
    sft.main([str(path)])
    assert first.stat().st_mtime_ns == kept and second.stat().st_mtime_ns > before
    cache.main([str(path)])
    assert is_current(recipe, "sft") and is_current(recipe, "cache")
    capsys.readouterr()
    cache.main([str(path)])
    assert "cache: up to date, nothing to do" in capsys.readouterr().err


def test_the_whole_road_runs_on_several_teachers_and_says_which_one_is_measured(crossed):
    for stage in (calibrate, distill, evaluate):
        stage.main([str(crossed)])
    run = load_recipe(crossed).run_folder
    assert json.loads((run / "calibration.json").read_text())["teacher"]["cross_fit"] == 2
    summary = (run / "report" / "summary.md").read_text()
    assert "2 teachers were trained" in summary and "The arm `teacher` is the first of them." in summary


def test_a_plan_counts_every_teacher(crossed):
    def works(*overrides):
        return {work.name: work for work in make_plan(load_recipe(crossed, list(overrides)), Machine()).works}

    one = works("--sft.cross_fit=0")
    for epochs, times in (("--sft.max_steps=3", 3), ("--sft.max_steps=-1", 2)):
        alone, several = works("--sft.cross_fit=0", epochs)["sft"], works("--sft.cross_fit=3", epochs)["sft"]
        assert (several.steps, several.flops) == (times * alone.steps, times * alone.flops)
    assert works()["cache"].memory.weights == 2 * one["cache"].memory.weights


def test_a_cache_of_other_folds_is_refused(crossed):
    recipe = load_recipe(crossed, ["--seed", "4"])
    with pytest.raises(CacheError, match="teacher.fold_seed is 0, expected 4"):
        open_recipe_cache(recipe, "train", teacher_path(recipe), teacher_section(recipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--sft.cross_fit=1", "one fold leaves its teacher nothing to learn; write 2 or more"),
        ("--cache.teacher={folder}/base", "cache.teacher gives a teacher"),
        ("--datasets.transfer.path={folder}/validation.jsonl", "no teacher has learned the rows of datasets.transfer"),
        ("--cache.backend=vllm", "cache.backend vllm runs one teacher"),
    ],
)
def test_what_makes_no_sense_with_several_teachers_is_refused(crossed, change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(crossed, [change.format(folder=crossed.parent)])

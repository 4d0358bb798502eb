"""A job is skipped exactly when what it was made from has not changed and what it made is whole."""

import json
import os
from types import SimpleNamespace

import pytest

from first_trl.errors import FirstTrlError
from first_trl.files import Digests, files_of, locked, new_folder, write_atomically
from first_trl.recipe import load_recipe
from first_trl.run import Run, differences, jobs, require, run_job
from tests.cache_recipe import write_recipe
from tests.tiny import build_model


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "job", rows=4, arms={"first": {}, "on_labels": {"trainer": "sft"}}))


def make(recipe, *names, content="weights", source="recipe.yaml", overwrite=False):
    """Make jobs as their stages would, with a file of this content each; returns what `begin` said."""
    begun = []
    for name in names:
        run = Run(recipe, source=str(recipe.run_folder.parent.parent / source))
        begun.append(run.begin(name, overwrite))
        if begun[-1] is None:
            continue
        for folder in run.jobs[name].folders:
            write_atomically(new_folder(run.path / folder) / "model.safetensors", content)
        for file in run.jobs[name].outputs:
            write_atomically(run.path / file.replace("*.*", "metrics.json"), content)
        run.finish(name, 1.0)
    return begun


ALL = ("cache", "calibrate", "distill.first", "distill.on_labels", "evaluate")


def stale(recipe):
    """{job: reason} of the jobs that are not current by themselves, in order."""
    run = Run(recipe)
    found = {name: run.stale(name) for name in run.jobs}
    return {name: why.reason for name, why in found.items() if why is not None and why.job.name == name}


def test_the_table_says_what_each_job_reads_and_needs(recipe):
    table = jobs(recipe)
    assert tuple(table) == ALL
    assert table["distill.first"].needs == ("cache", "calibrate") and table["distill.on_labels"].needs == ()
    assert table["evaluate"].needs == ("calibrate", "distill.first", "distill.on_labels")
    assert table["distill.first"].command == "first-trl distill RECIPE --arm first"


def test_finished_jobs_are_current_and_changed_settings_make_their_job_stale_and_name_themselves(recipe):
    assert make(recipe, *ALL) == [False] * 5 and stale(recipe) == {} and make(recipe, *ALL) == [None] * 5
    recipe.distill["learning_rate"] = 0.5
    reason = "distill.learning_rate is 0.5, and was not set when it was made"
    assert stale(recipe) == dict.fromkeys(("distill.first", "distill.on_labels"), reason)
    with pytest.raises(FirstTrlError, match=r"distill.first .* not up to date: .*`first-trl distill RECIPE --arm"):
        require(recipe, "evaluate")


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"load_in_8bit": True}, {"attn_implementation": "eager"}])
def test_how_a_given_teacher_runs_is_an_input_although_sft_says_it(recipe, change):
    make(recipe, *ALL)
    recipe.sft.update(change)
    run, (setting,) = Run(recipe), change
    for job in ("cache", "evaluate"):
        assert f"teacher.{setting} is" in str(differences(run.record(job)["inputs"], run.inputs(job)))


def test_the_recipe_as_it_ran_is_written_with_a_job_and_not_beside_a_current_one(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    resolved, options = recipe.run_folder / "recipe.resolved.yaml", SimpleNamespace(overwrite=False, skip_checks=False)
    options.recipe = str(recipe.run_folder.parent.parent / "recipe.yaml")
    make(recipe, "cache")
    run_job(recipe, options, "cache", pytest.fail)
    assert not resolved.exists()
    run_job(
        recipe, options, "calibrate", lambda continues: write_atomically(recipe.run_folder / "calibration.json", "{}")
    )
    assert load_recipe(resolved) == recipe


def test_changed_data_is_noticed_whatever_names_it(recipe):
    make(recipe, *ALL)
    train = recipe.datasets.train.data_files
    with open(train, "a") as file:
        file.write(json.dumps({"text": "a film", "label": "good"}) + "\n")
    assert stale(recipe) == dict.fromkeys(("cache", "distill.on_labels"), "train.jsonl of datasets.train has changed")


def test_a_job_made_again_with_the_same_content_makes_nothing_after_it_stale(recipe):
    make(recipe, *ALL)
    weights = recipe.run_folder / "cache" / "train" / "model.safetensors"
    weights.write_text("damaged")
    assert stale(recipe) == {"cache": f"{weights} is not as it was written"}
    assert make(recipe, *ALL) == [False, None, None, None, None]
    weights.unlink()
    make(recipe, "cache", content="others")
    assert stale(recipe) == {"calibrate": "cache has changed since"}


def test_a_file_of_the_same_size_and_times_is_found_out_by_a_full_check_or_its_ctime(recipe, tmp_path):
    make(recipe, "cache", content="a" * 2**20)
    file = recipe.run_folder / "cache" / "train" / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("b" * 2**20)
    os.utime(file, ns=times)
    assert "model.safetensors" in stale(recipe)["cache"]
    digests = Digests(tmp_path / "digests.json")
    right = digests.of(file)
    digests._known[str(file.resolve())][-1] = "of other bytes"  # as if they had changed on the disk itself
    digests.save()
    assert (
        Digests(tmp_path / "digests.json").of(file) != right == Digests(tmp_path / "digests.json", full=True).of(file)
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"identity": 3, "inputs": {}, "outputs": {}}'])
def test_a_record_that_cannot_be_read_is_no_record(recipe, content):
    make(recipe, "cache")
    Run(recipe).file("cache").write_text(content)
    assert stale(recipe)["cache"] == "it is not finished" and make(recipe, "cache") == [False]


def test_a_finished_folder_stays_until_its_successor_is_finished(recipe):
    make(recipe, "cache")
    old, source = recipe.run_folder / "cache/train/model.safetensors", recipe.run_folder.parent.parent / "recipe.yaml"

    def begin(top_k):
        recipe.cache.top_k = top_k
        return Run(recipe, source=source).begin("cache")

    assert begin(3) is False
    write_atomically(new_folder(old.parent) / "model.safetensors", "half of it")
    assert begin(3) is True and old.read_text() == "weights", "the same inputs continue"
    assert begin(4) is False and not new_folder(old.parent).exists()
    make(recipe, "cache", content="whole")
    assert old.read_text() == "whole" and not new_folder(old.parent).parent.exists()


def test_a_kill_between_record_and_exchange_loses_nothing(recipe, monkeypatch):
    make(recipe, "cache")
    recipe.cache.top_k = 3
    with monkeypatch.context() as patch:
        patch.setattr("first_trl.run.exchange", lambda *_: None)
        make(recipe, "cache", content="new")
    weights = recipe.run_folder / "cache" / "train" / "model.safetensors"
    assert weights.read_text() == "weights" and make(recipe, "cache") == [None] and weights.read_text() == "new"


def test_another_recipe_of_the_same_name_is_refused_unless_it_may_overwrite(recipe):
    make(recipe, "cache")
    assert make(recipe, "cache", source="copy.yaml") == [None], "what is the same is nobody's loss"
    recipe.cache.top_k = 3
    with pytest.raises(FirstTrlError, match=r"finished cache of another recipe, \.\./\.\./recipe.yaml .*--overwrite"):
        make(recipe, "cache", source="copy.yaml")
    assert make(recipe, "cache", source="copy.yaml", overwrite=True) == [False]


def test_a_model_of_the_hub_is_known_by_its_commit_and_one_that_has_moved_makes_its_job_stale(
    hub, recipe, tmp_path, monkeypatch
):
    from first_trl.data.loading import hub_commit
    from first_trl.hub.upload import push_folder

    def push(seed):
        build_model(seed=seed).save_pretrained(tmp_path / "base")
        push_folder(tmp_path / "base", "me/base")
        hub_commit.cache_clear()  # as in the next command

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    recipe.distill["model_name_or_path"] = "me/base"
    push(0)
    first = hub.repos["me/base"].sha("main")
    make(recipe, "distill.on_labels")
    recorded = Run(recipe).record("distill.on_labels")["inputs"]["models"]["distill.model_name_or_path"]
    assert recorded == {"id": "me/base", "commit": first} and "distill.on_labels" not in stale(recipe)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_commit.cache_clear()
    assert "distill.on_labels" not in stale(recipe), "without a network, the copy that is here"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    push(1)
    assert f"commit is '{hub.repos['me/base'].sha('main')}', and was '{first}'" in stale(recipe)["distill.on_labels"]


def test_the_local_base_of_an_adapter_is_an_input_too(recipe, tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    write_atomically(adapter / "adapter_config.json", json.dumps({"base_model_name_or_path": str(base)}))
    write_atomically(base / "model.safetensors", "weights")
    recipe.cache.teacher = str(adapter)
    make(recipe, "cache")
    write_atomically(base / "model.safetensors", "other weights")
    assert stale(recipe)["cache"] == "base/model.safetensors of cache.teacher has changed"


def test_a_link_to_another_disk_keeps_pointing_there(recipe, tmp_path):
    other = tmp_path / "other disk" / "train"
    other.mkdir(parents=True)
    (recipe.run_folder / "cache").mkdir(parents=True)
    (recipe.run_folder / "cache" / "train").symlink_to(other)
    for content in ("one", "two"):
        make(recipe, "cache", content=content)
        recipe.cache.top_k += 1
        assert (other / "model.safetensors").read_text() == content
    assert (recipe.run_folder / "cache" / "train").is_symlink()


def test_differences_are_in_words():
    before = {"settings": {"sft": {"seed": 1, "gone": 2}}, "data": {"datasets.train": {"files": {"a": "1", "b": "2"}}}}
    after = {"settings": {"sft": {"seed": 3}}, "data": {"datasets.train": {"files": {"a": "2", "c": "3"}}}}
    assert differences(before, after) == [
        "sft.gone is not set, and was 2 when it was made", "sft.seed is 3, and was 1 when it was made",
        "a of datasets.train has changed", "b of datasets.train is gone", "c of datasets.train is new",
    ]  # fmt: skip


def test_what_another_process_makes_is_refused_by_name_until_that_ends(tmp_path):
    with locked(tmp_path / "sft.lock", "sft"):
        with pytest.raises(FirstTrlError, match=rf"sft is being written by process {os.getpid()} on host"):
            with locked(tmp_path / "sft.lock", "sft"):
                pass
        with locked(tmp_path / "cache.lock", "cache"):
            pass  # other work is free
    with locked(tmp_path / "sft.lock", "sft"):
        pass
    assert not (tmp_path / "sft.holder").exists()


def test_hidden_files_are_no_part_of_a_folder(tmp_path):
    for name in ("b", "a/c", ".lock", ".git/x"):
        write_atomically(tmp_path / name, name)
    assert files_of(tmp_path) == ["a/c", "b"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "value.json"
    write_atomically(file, "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        write_atomically(file, "new")
    assert file.read_text() == "old"

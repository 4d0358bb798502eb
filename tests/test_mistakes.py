"""What users get wrong beside the recipe itself: the message has the place, the value and the remedy."""

import errno
import importlib
import json
from types import SimpleNamespace

import datasets
import pytest
from transformers import AutoConfig, AutoTokenizer

from first_trl import __main__, failures
from first_trl.data.loading import load_split
from first_trl.data.rows import usable_rows
from first_trl.errors import FirstTrlError
from first_trl.modeling import load_model
from first_trl.settings import DatasetConfig, TaskConfig
from first_trl.stages.push import push
from tests.test_recipe import RECIPE, make_project
from tests.tiny import build_model, build_tokenizer

ROW = {"text": "a good film", "label": "good"}
TASK = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "max_length": 16}
CHOICES = {"choices": ["good", "bad"]}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
NO_TEMPLATES = {"prompt": None, "completion": None}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A project with the files that the recipe names, as the current directory."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (make_project(tmp_path / "project", monkeypatch) / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "project"


def check(message, parts):
    assert [part for part in parts.split("|") if part not in (message or "")] == [], message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("run recipe.yaml --stages cache,distil", "'distil' in --stages|choose from sft, cache"),
        ("cache recipe.yaml --config_file configs/gpu8.yaml", "configs/gpu8.yaml|configs/cpu.yaml"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused_before_any_work(words, parts, capsys):
    try:
        assert __main__.main(words.split()) == 2
    except SystemExit as stop:
        assert stop.code == 2
    check(capsys.readouterr().err, parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("distill --arm frist", "'frist'|the recipe has fine_tuned, distilled, first"),
        ("distill --arm distilled", "sft of runs/tiny|not finished|first-trl sft RECIPE"),
        ("calibrate", "sft of runs/tiny|not finished|first-trl sft RECIPE"),
    ],
)
def test_a_stage_that_comes_too_early_names_the_one_before(words, parts, capsys):
    name, *arguments = words.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"first_trl.stages.{name}").main(["recipe.yaml", *arguments])
    check(capsys.readouterr().err if stop.value.code == 2 else stop.value.code, parts)  # 2: argparse's


@pytest.mark.parametrize(
    ("lines", "source", "task", "parts"),
    [
        ([ROW, "[1, 2]\n"], {}, {}, "data/rows.jsonl, line 2|[1, 2]|write one {...} per line"),
        ([ROW], {"split": "trian"}, {}, 'datasets.train|"trian"|correct `split`'),
        ([ROW], {"columns": {"text": "review"}}, {}, "datasets.train.columns|'review'|choose among text, label"),
        ([ROW], {}, {"prompt": "Review : {review}"}, "datasets.train, row 0|'review'|only text, label|`columns`"),
        ([ROW, ROW | {"label": "Good"}], {}, CHOICES, "row 1|'Good'|task.choices|drop the row"),
        ([ROW | {"label": "good "}], {}, CHOICES, "row 0|'good '|remove the spaces"),
        ([ROW | {"label": ""}], {}, {}, "row 0|empty|fill"),
        ([ROW | {"text": "good " * 20}], {}, {}, "row 0|24 tokens|task.max_length"),
        ([TALK], {}, NO_TEMPLATES, "row 0|chat template|chat version of the model"),
        ([ROW], {}, NO_TEMPLATES, "row 0|text, label|Write both templates"),
        ([ROW], {}, {"append_eos": True}, "append_eos|eos_token"),
    ],
)
def test_rows_that_cannot_be_used_are_named(lines, source, task, parts, folder):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "data" / "rows.jsonl").write_text(text)
    tokenizer = build_tokenizer()
    if "append_eos" in task:
        tokenizer.eos_token = None
    with pytest.raises(FirstTrlError) as error:
        rows = load_split(DatasetConfig(**{"path": "json", "data_files": "data/rows.jsonl"} | source), "train")
        usable_rows(rows, TaskConfig(**TASK | task), tokenizer, place="datasets.train")
    check(str(error.value), parts)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (ConnectionError("no route"), "owner/rows|no route|check the spelling|HF_ENDPOINT"),
        (OSError(errno.ENOSPC, "No space left on device"), "owner/rows|No space left|HF_HOME"),
    ],
)
def test_a_data_set_of_the_hub_that_does_not_come_is_named(fault, parts, monkeypatch):
    def refuse(*args, **kwargs):
        raise fault

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("first_trl.data.loading.hub_commit", lambda *revision: None)  # or it asks the network
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(Exception) as error:
        load_split(DatasetConfig(path="owner/rows"), "train")
    check(failures.explain(error.value, "sft"), parts)


@pytest.mark.parametrize(
    ("name", "fault"), [("nobody/none", {}), ("gated/model", {"status": 403, "code": "GatedRepo", "message": "no"})]
)
def test_a_model_of_the_hub_that_does_not_come_is_named(name, fault, hub):
    for method in ("GET", "HEAD") if fault else ():
        hub.fail(method, name, times=99, **fault)
    with pytest.raises(Exception) as error:
        AutoConfig.from_pretrained(name)
    check(failures.explain(error.value, "cache"), f"{name}|hf auth login")


@pytest.mark.parametrize(
    ("removed", "damaged", "parts"),
    [
        ("*", None, "cannot be loaded|HF_HUB_OFFLINE"),
        ("config.json", None, "models/mine|fetch the folder"),
        ("model.safetensors", None, "model.safetensors|models/mine|fetch the folder"),
        (None, ("model.safetensors", b"x" * 9), "deserializing|fetch the folder"),
        (None, ("config.json", b"{"), "models/mine|JSON|fetch the folder"),
        ("tokenizer*.json", None, "tokenizer|fetch the folder"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_named(removed, damaged, parts, folder):
    mine = folder / "models" / "mine"
    build_model().save_pretrained(mine)
    build_tokenizer().save_pretrained(mine)
    for file in mine.glob(removed or "no file"):
        file.unlink()
    if damaged:
        (mine / damaged[0]).write_bytes(damaged[1])
    path = "nobody/none" if removed == "*" else "models/mine"
    with pytest.raises(Exception) as error:
        load_model(path)
        AutoTokenizer.from_pretrained(path)
    check(failures.explain(error.value, "cache"), parts)


@pytest.mark.parametrize(
    ("stage", "error", "parts"),
    [
        ("sft", RuntimeError("CUDA out of memory."), "sft.per_device_train_batch_size|gradient_accumulation_steps"),
        ("cache", MemoryError("8 GiB"), "out of memory|cache.tokens_per_batch"),
        ("distill", OSError(errno.ENOSPC, "No space", "a.bin"), "a.bin|output_dir|same command again"),
    ],
)
def test_what_the_machine_lacks_is_explained(stage, error, parts):
    check(failures.explain(error, stage), parts)


def test_a_push_without_a_repository_is_refused():
    with pytest.raises(FirstTrlError, match="push.hub_model_id.*--dry_run"):
        push(SimpleNamespace(push=SimpleNamespace(hub_model_id=None)), dry_run=False)

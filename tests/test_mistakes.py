"""What users get wrong, one row each: the message has the place, the value and the remedy.

The actions go through the code that the commands go through; the message is what the command prints. Names of folders
that change from run to run are replaced. Broken recipes are in test_recipe.py.
"""

import errno
import json

import pytest

from first_trl import failures
from first_trl.settings import DatasetConfig, TaskConfig
from tests.test_recipe import RECIPE
from tests.tiny import build_model, build_tokenizer

ROW = {"text": "a good film", "label": "good"}
TASK = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "max_length": 16}


# --- what is done wrong


def command(*arguments):
    """A command line that is refused before any work; what it prints is raised."""

    def act(folder, capsys):
        from first_trl import __main__

        (folder / "recipe.yaml").write_text(RECIPE)
        try:
            assert __main__.main(list(arguments)) == 2
        except SystemExit as stop:
            assert stop.code == 2
        raise ValueError(capsys.readouterr().err.strip().splitlines()[-1])

    return act


def stage(name, *arguments):
    """A stage of a recipe that has not come so far."""

    def act(folder, capsys):
        import importlib

        (folder / "recipe.yaml").write_text(RECIPE)
        try:
            importlib.import_module(f"first_trl.stages.{name}").main(["recipe.yaml", *arguments])
        except SystemExit as stop:
            told = capsys.readouterr().err.strip().splitlines()[-1] if stop.code == 2 else stop.code  # 2: argparse's
            raise ValueError(told.removeprefix(f"[first-trl] {name} failed: ")) from None

    return act


def data(*lines, tokenizer=None, source=None, **task):
    """Load and encode data/rows.jsonl, which has these lines (rows, or text as it is)."""

    def act(folder):
        from first_trl.data.loading import load_split
        from first_trl.data.rows import usable_rows

        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (folder / "data" / "rows.jsonl").write_text(text)
        rows = load_split(
            DatasetConfig(**({"path": "json", "data_files": "data/rows.jsonl"} | (source or {}))), "train"
        )
        usable_rows(rows, TaskConfig(**TASK | task), (tokenizer or build_tokenizer)(), place="datasets.train")

    return act


def refused_by_the_hub(error):
    """A data set of the Hub that `datasets` does not get."""

    def act(folder, monkeypatch):
        import datasets

        from first_trl.data.loading import load_split

        def refuse(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        load_split(DatasetConfig(path="owner/rows"), "train")

    return act


def model(change=lambda folder: None, path="models/mine"):
    """Load a model and its tokenizer, after a change to its folder."""

    def act(folder):
        from transformers import AutoTokenizer

        from first_trl.modeling import load_model

        build_model().save_pretrained(folder / "models" / "mine")
        build_tokenizer().save_pretrained(folder / "models" / "mine")
        change(folder / "models" / "mine")
        load_model(path)
        AutoTokenizer.from_pretrained(path)

    return act


def model_of_the_hub(name, **fault):
    def act(folder, hub):
        from transformers import AutoConfig

        if fault:
            for method in ("GET", "HEAD"):
                hub.fail(method, name, times=99, **fault)
        AutoConfig.from_pretrained(name)

    return act


def without(*names):
    def change(folder):
        for name in names:
            next(folder.glob(name)).unlink()

    return change


def damaged(name, content):
    return lambda folder: next(folder.glob(name)).write_bytes(content)


def no_repository(folder):
    from types import SimpleNamespace

    from first_trl.stages.push import push

    push(SimpleNamespace(push=SimpleNamespace(hub_model_id=None)), dry_run=False)


def raises(error):
    def act(folder):
        raise error

    return act


def no_end_token():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


# --- the table: where it shows, what is done wrong, parts of the message

MISTAKES = [
    ("run", "no such stage", command("run", "recipe.yaml", "--stages", "cache,distil"),
     "'distil' in --stages|choose from sft, cache"),
    ("run", "no such configuration", command("cache", "recipe.yaml", "--config_file", "configs/gpu8.yaml"),
     'configs/gpu8.yaml|configs/cpu.yaml'),
    ("distill", "no such arm", stage("distill", "--arm", "frist"),
     "'frist'|the recipe has fine_tuned, distilled, first"),
    ("distill", "a stage too early", stage("distill", "--arm", "distilled"),
     "sft of runs/tiny|not finished|first-trl sft RECIPE"),
    ("calibrate", "calibration before the cache", stage("calibrate"),
     "sft of runs/tiny|not finished|first-trl sft RECIPE"),
    ("sft", "a line that is no row", data(ROW, "[1, 2]\n"),
     'data/rows.jsonl, line 2|[1, 2]|write one {...} per line'),
    ("sft", "a split that is not", data(ROW, source={"split": "trian"}),
     "datasets.train|\"trian\"|correct `split`"),
    ("sft", "a column renamed that is not", data(ROW, source={"columns": {"text": "review"}}),
     "datasets.train.columns|'review'|choose among text, label"),
    ("sft", "a column that is not", data(ROW, prompt="Review : {review}"),
     "datasets.train, row 0|'review'|only text, label|`columns`"),
    ("sft", "a label that is no choice", data(ROW, ROW | {"label": "Good"}, choices=["good", "bad"]),
     "row 1|'Good'|task.choices|drop the row"),
    ("sft", "a label with a space", data(ROW | {"label": "good "}, choices=["good", "bad"]),
     "row 0|'good '|remove the spaces"),
    ("sft", "an empty completion", data(ROW | {"label": ""}),
     'row 0|empty|fill'),
    ("sft", "a prompt longer than max_length", data(ROW | {"text": "good " * 20}),
     'row 0|24 tokens|task.max_length'),
    ("sft", "conversations without a chat template",
     data({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, prompt=None,
          completion=None),
     'row 0|chat template|chat version of the model'),
    ("sft", "no templates and no columns for them", data(ROW, prompt=None, completion=None),
     'row 0|text, label|Write both templates'),
    ("sft", "a tokenizer without an end", data(ROW, tokenizer=no_end_token),
     'append_eos|eos_token'),
    ("sft", "a data set out of reach", refused_by_the_hub(ConnectionError("no route")),
     'owner/rows|no route|check the spelling|HF_ENDPOINT'),
    ("sft", "no space for a data set", refused_by_the_hub(OSError(errno.ENOSPC, "No space left on device")),
     'owner/rows|No space left|HF_HOME'),
    ("cache", "a model that is not on the Hub", model_of_the_hub("nobody/none"),
     'nobody/none|hf auth login'),
    ("cache", "a gated model", model_of_the_hub("gated/model", status=403, code="GatedRepo", message="restricted"),
     'gated/model|hf auth login'),
    ("cache", "a Hub id without a network", model(path="nobody/none"),
     'cannot be loaded|HF_HUB_OFFLINE'),
    ("cache", "a folder without a model", model(without("config.json")),
     "models/mine|fetch the folder"),
    ("cache", "a folder without weights", model(without("model.safetensors")),
     "model.safetensors|models/mine|fetch the folder"),
    ("cache", "weights cut short", model(damaged("model.safetensors", b"x" * 9)),
     'deserializing|fetch the folder'),
    ("cache", "a damaged config", model(damaged("config.json", b"{")),
     'models/mine|JSON|fetch the folder'),
    ("cache", "a folder without a tokenizer", model(without("tokenizer.json", "tokenizer_config.json")),
     'tokenizer|fetch the folder'),
    ("sft", "out of GPU memory", raises(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")),
     'out of memory|sft.per_device_train_batch_size|gradient_accumulation_steps'),
    ("cache", "out of memory", raises(MemoryError("8 GiB")),
     'out of memory|cache.tokens_per_batch'),
    ("distill", "a full disk", raises(OSError(errno.ENOSPC, "No space left on device", "model.safetensors")),
     'model.safetensors|output_dir|same command again'),
    ("push", "no repository", no_repository,
     'push.hub_model_id|--dry_run'),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with the files that the recipe names, as the current directory."""
    for name in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(ROW | {"text": name}) + "\n")
    for name in ("teacher", "student"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def told(stage, action, folder, request):
    """What the command prints for a mistake, without what changes from run to run."""
    wanted = action.__code__.co_varnames[: action.__code__.co_argcount]
    with pytest.raises(Exception) as error:
        action(**{name: folder if name == "folder" else request.getfixturevalue(name) for name in wanted})
    message = failures.explain(error.value, stage) or (str(error.value) if "act" in error.traceback[-1].name else None)
    assert message is not None, repr(error.value)
    if hasattr(error.value, "problems"):
        (message,) = error.value.problems
    return message.replace(str(folder), "FOLDER").replace(folder.name, "FOLDER")


@pytest.mark.parametrize(("stage", "mistake", "action", "parts"), MISTAKES, ids=[case[1] for case in MISTAKES])
def test_a_mistake_is_reported_with_place_value_and_remedy(stage, mistake, action, parts, folder, request):
    message = told(stage, action, folder, request)
    assert [part for part in parts.split("|") if part not in message] == [], message


def test_no_mistake_is_in_the_table_twice():
    assert len(MISTAKES) >= 25 and len({mistake for _, mistake, _, _ in MISTAKES}) == len(MISTAKES)

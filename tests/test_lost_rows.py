"""Rows that do not fit are refused, dropped or cut, the same rows in every stage, and counted everywhere."""

import json

import pytest
from datasets import Dataset

from first_trl.cache import open_cache
from first_trl.data.rows import describe_lost, usable_rows
from first_trl.errors import FirstTrlError
from first_trl.settings import TaskConfig
from first_trl.stages import cache, calibrate, distill, evaluate
from tests.cache_recipe import write_recipe

LONG = {"text": "good " * 40, "label": "good"}
ODD = {"text": "a film", "label": "odd"}
ROWS = [{"text": "a film", "label": "good"}, LONG, ODD, {"text": "the plot", "label": "bad"}]
TASK = {"prompt": "{text} :", "completion": " {label}", "choices": ["good", "bad"], "max_length": 16}


@pytest.mark.parametrize(
    ("too_long", "bad_rows", "kept", "lost"),
    [
        ("drop", "drop", [0, 3], {"dropped": {"too_long": 1, "bad": 1}, "cut": {}}),
        ("cut", "drop", [0, 1, 3], {"dropped": {"bad": 1}, "cut": {"prompt": 1}}),
        ("drop", "refuse", r"datasets.train, row 2: .*'odd'", None),
        ("refuse", "drop", r"datasets.train, row 1: .*too_long: drop or cut", None),
        ("refuse", "refuse", r"datasets.train, row 1: .*\(and 1 more of 4 rows cannot be used\)", None),
    ],
)
def test_rows_are_dropped_or_cut_as_the_recipe_says_and_counted(tokenizer, too_long, bad_rows, kept, lost):
    task, wanted = TaskConfig(**TASK, too_long=too_long), {"place": "datasets.train", "bad_rows": bad_rows}
    if lost is None:
        with pytest.raises(FirstTrlError, match=kept):
            usable_rows(Dataset.from_list(ROWS), task, tokenizer, **wanted)
        return
    used = usable_rows(Dataset.from_list(ROWS), task, tokenizer, **wanted)
    assert used.rows.to_list() == [ROWS[number] for number in kept] and used.lost == {"rows": 4, **lost}
    again = usable_rows(used.rows, task, tokenizer)
    assert again.tokenized.to_list() == used.tokenized.to_list() and not again.lost["dropped"]


def test_no_row_that_is_left_is_an_error(tokenizer):
    with pytest.raises(FirstTrlError, match="datasets.train: every row is dropped, the first because"):
        usable_rows(Dataset.from_list([LONG]), TaskConfig(**TASK, too_long="drop"), tokenizer, place="datasets.train")


def test_more_than_a_twentieth_dropped_is_a_warning():
    lost = {"rows": 1000, "dropped": {"too_long": 50}, "cut": {"prompt": 3}}
    said = describe_lost("train", lost)
    assert said == "train: of 1,000 rows 50 dropped (too long), 3 with the end of the prompt cut"
    assert describe_lost("train", {**lost, "dropped": {"bad": 51}}).startswith("warning: train: of 1,000 rows 51")
    assert describe_lost("train", {"rows": 5, "dropped": {}, "cut": {}}) is None


def test_every_stage_reads_the_rows_that_are_left_and_manifest_and_report_count_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    source = {role: tmp_path / f"{role}.jsonl" for role in ("train", "validation", "test")}
    datasets = {role: {"bad_rows": "drop", "path": "json", "data_files": str(source[role])} for role in source}
    datasets["test"] = {"other": datasets["test"] | {"overlap": "drop"}}
    cheap = {"evaluate": {"bootstrap": 0}, "calibrate": {"bootstrap": 0}}
    path = write_recipe(tmp_path, datasets=datasets, task={**TASK, "max_length": 60, "too_long": "drop"}, **cheap)
    train = source["train"].read_text().splitlines()
    long, new = (json.dumps({"text": text, "label": "good"}) for text in ("good " * 80, "book " * 35))
    source["train"].write_text("\n".join([train[0], json.dumps(ODD), *train[1:], long]) + "\n")
    source["test"].write_text("\n".join([json.dumps(ODD), train[5], new]) + "\n")
    for stage in (cache, calibrate, distill, evaluate):
        stage.main([str(path)])
    found = open_cache(tmp_path / "runs/tiny/cache/train")
    assert len(found.dataset) == 40 and found.manifest["rows"]["dropped"] == {"bad": 1, "too_long": 1}
    metrics = json.loads((tmp_path / "runs/tiny/report/metrics.json").read_text())
    assert metrics["arms"]["first"]["other"]["num_examples"] == 1
    assert metrics["lost"]["other"] == {"rows": 3, "dropped": {"bad": 1, "overlap": 1}, "cut": {}}
    assert any("other: of 3 rows 1 dropped" in sentence["text"] for sentence in metrics["summary"])

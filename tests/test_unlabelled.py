"""Rows without labels to distil on: the teacher's own answer stands in, and nobody takes it for a label."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml

import first_trl.scoring
from first_trl.cache.arrays import is_memorised
from first_trl.cache.reader import open_cache
from first_trl.checks import check_recipe
from first_trl.data.choices import has_answer, with_answer
from first_trl.recipe import load_recipe
from first_trl.settings import TaskConfig
from first_trl.stages import cache, calibrate, distill, evaluate
from tests.cache_recipe import write_recipe
from tests.tiny import build_model

TASK = {
    "prompt": "Review : {text} Sentiment :",
    "completion": " {label}",
    "max_length": 60,
    "choices": ["good", "bad"],
}


@pytest.fixture(autouse=True)
def on_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def unlabelled_recipe(folder, task=None, **sections):
    """A recipe whose transfer rows are new texts and nothing else."""
    path = write_recipe(folder, rows=12, task=TASK | (task or {}), **sections)
    lines = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = "".join(json.dumps({"text": f"{text} . the cast is great"}) + "\n" for text in lines)
    (folder / "transfer.jsonl").write_text(rows)
    content = yaml.safe_load(path.read_text())
    content["datasets"]["transfer"] = {"path": "json", "data_files": str(folder / "transfer.jsonl")}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("task", "support"),
    [({}, "top_k"), ({"append_eos": False}, "choices"), ({"choices": ["good film", "bad", "bad plot"]}, "top_k")],
)
def test_the_teachers_most_probable_choice_stands_in_for_each_label(tmp_path, tokenizer, task, support):
    path = unlabelled_recipe(tmp_path, task, cache={"support": support})
    if "choices" in task:
        for name in ("train", "validation", "test"):
            file = tmp_path / f"{name}.jsonl"
            file.write_text(file.read_text().replace('"good"', '"good film"'))
    cache.main([str(path)])
    opened = open_cache(tmp_path / "runs/tiny/cache/train")
    assert opened.manifest["labels"] == "teacher" and len(opened.dataset) == 12
    assert open_cache(tmp_path / "runs/tiny/cache/validation").manifest["labels"] == "given"
    teacher, found = build_model(27).eval(), set()
    ends = [tokenizer.eos_token_id] if task.get("append_eos", True) else []
    for row in opened.dataset:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        scores = {}
        for choice in (TASK | task)["choices"]:
            written = tokenizer(choice)["input_ids"] + ends
            scored = written if "choices" in task else written[:1]
            with torch.no_grad():
                logits = teacher(torch.tensor([row["input_ids"][:start] + scored])).logits[0].log_softmax(-1)
            scores[tuple(written)] = sum(logits[start - 1 + i, token].item() for i, token in enumerate(scored))
        assert tuple(row["input_ids"][start:]) == max(scores, key=scores.get)
        found.add(tuple(row["labels"][start:]))
        log_probs = [logits[start - 1, token].item() for token in row["teacher_ids"][0]]
        np.testing.assert_allclose(row["teacher_log_probs"][0], log_probs, atol=5e-3)
    calibrate.main([str(path), "--bootstrap=0"])
    rows = json.loads((tmp_path / "runs/tiny/calibration.json").read_text())["teacher"]["cached_rows"]
    assert rows["accuracy"] is None and 0 < rows["confidence"] <= 1


def test_a_run_on_unlabelled_rows_ends_with_a_report_that_says_so(tmp_path, capsys, monkeypatch):
    path, folder = unlabelled_recipe(tmp_path), tmp_path / "runs/tiny/cache/train"
    report = check_recipe(load_recipe(path), here=False)  # which does not ask for labels
    assert report.problems == [] and {cost.name: cost.rows for cost in report.costs}["distill.first"] == 12
    cache.main([str(path)])
    before = {file.name: file.read_bytes() for file in folder.glob("train-*")}
    assert len(before) == 3
    (folder / "manifest.json").unlink()  # an interrupted cache keeps its finished shards
    (folder / "train-000001.parquet").unlink()
    made, teacher_rows = [], first_trl.scoring.teacher_rows

    def counted(model, examples, **options):
        made.append(len(examples))
        return teacher_rows(model, examples, **options)

    monkeypatch.setattr("first_trl.scoring.teacher_rows", counted)
    for stage in (cache, calibrate, distill, evaluate):
        stage.main([str(path)])
    assert made == [4] and before == {file.name: file.read_bytes() for file in folder.glob("train-*")}
    said = capsys.readouterr().err
    assert "datasets.transfer has no labels: the teacher's most probable choice stands in" in said
    assert "on the rows it labels the teacher is at confidence" in said
    assert "which have no labels of their own" in (tmp_path / "runs/tiny/report/summary.md").read_text()
    with pytest.raises(SystemExit, match="ce_weight is 0.5.*no labels but the teacher's own"):
        distill.main([str(path), "--distill.ce_weight=0.5"])


def test_open_answers_and_other_splits_need_labels(tmp_path):
    with pytest.raises(SystemExit, match="datasets.transfer: the rows have no answer, and task.choices is not set"):
        cache.main([str(unlabelled_recipe(tmp_path / "open", {"choices": None}))])
    path = write_recipe(tmp_path / "train", rows=4, task=TASK)
    (tmp_path / "train/train.jsonl").write_text('{"text": "a film"}\n')
    with pytest.raises(SystemExit, match="datasets.train, row 0: .*there is no 'label'"):
        cache.main([str(path)])


@pytest.mark.parametrize(
    ("task", "row", "answered"),
    [
        (TaskConfig(**TASK), {"text": "x", "label": None}, {"text": "x", "label": "good"}),
        (TaskConfig(), {"prompt": "x"}, {"prompt": "x", "completion": "good"}),
        (
            TaskConfig(),
            {"messages": [{"role": "user", "content": "x"}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "good"}]},
        ),
        (
            TaskConfig(prompt="{pair[text]}:", completion=" {label[in][1]}"),
            {"pair": {"text": "x"}, "label": None},
            {"pair": {"text": "x"}, "label": {"in": {"1": "good"}}},
        ),
    ],
)
def test_an_answer_is_put_where_the_row_has_none(task, row, answered):
    assert not has_answer(task, row) and has_answer(task, answered)
    assert with_answer(row, task, "good") == answered


def test_an_answer_within_a_column_leaves_the_rest_of_the_column_to_the_prompt():
    task = TaskConfig(prompt="{pair[text]} {others[0]}:", completion=" {pair[label][0]} {others[2]}")
    row = {"pair": {"text": "x", "label": ["bad", "sad"]}, "others": ["a", "b"]}
    assert with_answer(row, task, "good") == {
        "pair": {"text": "x", "label": ["good", "sad"]},
        "others": ["a", "b", "good"],
    }


@pytest.mark.parametrize(
    ("accuracy", "confidence", "expected"),
    [(0.95, 0.7, True), (0.72, 0.76, True), (None, 0.76, True), (0.73, 0.72, False), (None, 0.74, False)],
)
def test_memorised_rows_show_in_accuracy_or_in_confidence(accuracy, confidence, expected):
    cached, validation = {"accuracy": accuracy, "confidence": confidence}, {"accuracy": 0.7, "confidence": 0.7}
    assert is_memorised(cached, validation) is expected

"""Answers with a confidence to act on: from Python and from the command line, out of a folder or off the Hub."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import first_trl
from first_trl.evaluation import describe_student, fit_thresholds, read_student, threshold_for
from first_trl.hub.card import prepare_upload_folder
from first_trl.hub.upload import push_folder
from first_trl.prediction import ROWS_AT_A_TIME, Predictor, answered_lines, main, predict
from first_trl.settings import TaskConfig
from tests.finished_run import make_base, make_run
from tests.test_push import run_elsewhere
from tests.tiny import WORDS

TASK = TaskConfig(prompt="Review: {text}", completion=" {label}", choices=["good", "bad"])


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of a finished student, an adapter of a tiny base."""
    folder = tmp_path_factory.mktemp("student")
    run, _ = make_run(folder / "work", make_base(folder / "base"))
    return run / "students" / "first"


@pytest.fixture(scope="module")
def predictor(student):
    return Predictor(student)


def rows(count):
    words = WORDS.split()
    return [{"text": " ".join(words[(i + j) % len(words)] for j in range(1 + i % 7))} for i in range(count)]


def slow_answers(student, texts):
    """(answer, confidence) by whole-vocabulary logits, one prompt at a time."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    choices = tokenizer.convert_tokens_to_ids(["good", "bad"])
    for text in texts:
        inputs = tokenizer(f"Review: {text} Sentiment :", return_tensors="pt")
        with torch.no_grad():
            shares = model(**inputs).logits[0, -1, choices].softmax(-1)
        yield ["good", "bad"][int(shares.argmax())], float(shares.max())


def test_the_names_are_the_packages_own():
    assert first_trl.predict is predict and first_trl.Predictor is Predictor


def test_a_student_answers_among_the_choices_with_its_confidence_and_abstains_below_the_threshold(student, predictor):
    asked = rows(20)
    answers = predict(predictor, asked, accuracy=0.8)
    threshold = threshold_for(predictor.description, 0.8)
    assert 0 < sum(answer["abstain"] for answer in answers) < 20, "the threshold must tell some of these apart"
    for answer, (word, confidence) in zip(answers, slow_answers(student, [row["text"] for row in asked]), strict=True):
        assert answer["answer"] == word and answer["confidence"] == pytest.approx(confidence, abs=1e-5)
        assert answer["abstain"] == (confidence < threshold)
    assert predictor.predict([]) == []


def test_thresholds_are_the_lowest_confidence_that_reaches_each_target():
    generator = np.random.default_rng(0)
    confidence = generator.random(40_000)
    fitted = fit_thresholds(confidence, generator.random(40_000) < confidence)
    assert [entry["target_accuracy"] for entry in fitted] == [0.8, 0.9, 0.95]
    for entry, expected in zip(fitted, (0.6, 0.8, 0.9), strict=True):  # accuracy above t is (1 + t) / 2
        assert entry["threshold"] == pytest.approx(expected, abs=0.03)
        assert entry["accuracy"] >= entry["target_accuracy"]
        assert entry["coverage"] == pytest.approx(1 - entry["threshold"], abs=0.03)
    assert fit_thresholds([0.9, 0.8], [False, False])[0] == {
        "target_accuracy": 0.8, "threshold": None, "coverage": 0.0, "accuracy": None,
    }  # fmt: skip


def test_a_target_that_validation_never_reached_means_to_abstain_always(predictor, monkeypatch):
    thresholds = [{"target_accuracy": 0.9, "threshold": None}]
    monkeypatch.setitem(predictor.description, "thresholds", thresholds)
    assert all(answer["abstain"] for answer in predictor.predict(rows(5)))
    with pytest.raises(ValueError, match="no threshold was fitted for an accuracy of 0.5; choose among 0.9"):
        predictor.predict(rows(1), accuracy=0.5)


def test_a_row_that_does_not_fit_the_task_is_named(predictor):
    with pytest.raises(ValueError, match="row 1: .*reads the column 'text'.*its columns are txt"):
        predictor.predict([{"text": "a film"}, {"txt": "a film"}])


def lines(predictor, *source):
    return [json.loads(line) for line in answered_lines(predictor, source, 0.9, 512)]


def test_lines_are_answered_in_order_over_several_batches_and_blank_ones_are_passed_over(predictor):
    asked = rows(ROWS_AT_A_TIME + 3)
    source = [json.dumps(row).encode() + b"\n" for row in asked]
    answered, expected = lines(predictor, *source[:5], b" \n", *source[5:]), predictor.predict(asked)
    assert [line["answer"] for line in answered] == [row["answer"] for row in expected]
    np.testing.assert_allclose(
        [line["confidence"] for line in answered], [row["confidence"] for row in expected], atol=1e-5
    )


BAD_LINES = {
    b"not json\n": "line 3 is not JSON in UTF-8",
    b'{"text": "caf\xe9"}\n': "line 3 is not JSON in UTF-8",
    b'"a film"\n': "line 3 holds a str; write one object a line",
    b"[]\n": "line 3 holds a list",
    b'{"texts": "a"}\n': "line 3: .*reads the column 'text'",
    b'{"text": null}\n': "line 3: .*missing",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(predictor, line):
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        lines(predictor, b'{"text": "a film"}\n', b"\n", line, b'{"text": "a film"}\n')


def test_the_command_reads_standard_input_or_a_file_and_writes_answers_whole(student, tmp_path, monkeypatch, capsys):
    asked = "".join(json.dumps(row) + "\n" for row in rows(4))
    (tmp_path / "asked.jsonl").write_text(asked)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(asked.encode())))
    assert main([str(student)]) == 0
    printed = capsys.readouterr().out
    assert [list(json.loads(line)) for line in printed.splitlines()] == [["answer", "confidence", "abstain"]] * 4
    output = tmp_path / "answers.jsonl"
    assert main([str(student), "--input", str(tmp_path / "asked.jsonl"), "--output", str(output)]) == 0
    assert output.read_text() == printed
    (tmp_path / "asked.jsonl").write_text(asked + "oh\n")
    assert main([str(student), "--input", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "no.jsonl")]) == 1
    assert "predict failed: line 5 is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()


def test_the_command_answers_its_help_without_anything_heavy():
    code = (
        "import sys; from first_trl.__main__ import main\ntry: main(['predict', '--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "ADAPTER" in done and "torch" not in done.split()


def test_a_folder_that_cannot_predict_says_what_it_lacks(student, tmp_path, capsys):
    with pytest.raises(ValueError, match="no predict.json .* run `first-trl evaluate RECIPE`"):
        Predictor(tmp_path)
    with pytest.raises(ValueError, match="there is no folder ./nowhere"):
        Predictor("./nowhere")
    (tmp_path / "predict.json").write_text(
        (student / "predict.json").read_text().replace('"schema_version": 1', '"schema_version": 9')
    )
    with pytest.raises(ValueError, match="schema version 9"):
        read_student(tmp_path)
    free = describe_student(
        "first", TaskConfig(prompt="{a}", completion="{b}"), {}, {"confidence": [1], "correct": [1]}
    )
    (tmp_path / "predict.json").write_text(json.dumps(free))
    with pytest.raises(ValueError, match="lists no choices"):
        read_student(tmp_path)
    assert main([str(tmp_path)]) == 1 and "lists no choices" in capsys.readouterr().err


def test_an_adapter_whose_base_model_is_not_here_says_so(student, tmp_path):
    import shutil

    shutil.copytree(student, tmp_path / "student")
    config = tmp_path / "student" / "adapter_config.json"
    content = json.loads(config.read_text()) | {"base_model_name_or_path": "../models/gone"}
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is an adapter of ../models/gone, and there is no such folder"):
        Predictor(tmp_path / "student")


FROM_THE_HUB = """
import json, sys
sys.path.insert(0, sys.argv[1])
from first_trl import predict
print(json.dumps(predict(sys.argv[2], json.loads(sys.argv[3]), accuracy=0.8)))
"""


def test_a_pushed_student_predicts_from_the_hub_as_from_its_folder(hub, tmp_path, predictor, student):
    base = make_base(tmp_path / "tiny-base")
    push_folder(base, "me/tiny-base")
    run, recipe = make_run(tmp_path / "work", base, base_name="me/tiny-base")
    for file in student.glob("adapter_model*"):
        (run / "students" / "first" / file.name).write_bytes(file.read_bytes())
    push_folder(prepare_upload_folder(run, "first", recipe, run / "push"), "me/tiny-student")
    assert {"predict.json", "calibration.json"} <= set(hub.files("me/tiny-student"))
    asked = json.dumps(rows(6))
    root = str(Path(first_trl.__file__).parent.parent)
    *_, printed = run_elsewhere(FROM_THE_HUB, root, "me/tiny-student", asked, cwd=tmp_path / "reader", hub=hub)
    expected = predictor.predict(rows(6), accuracy=0.8)
    for answer, here in zip(json.loads(printed), expected, strict=True):
        assert answer["confidence"] == pytest.approx(here["confidence"], abs=1e-5)
        assert (answer["answer"], answer["abstain"]) == (here["answer"], here["abstain"])

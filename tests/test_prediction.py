"""Answers with a confidence to act on: from Python and from the command line, out of a folder or off the Hub."""

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import first_trl
from first_trl.errors import FirstTrlError
from first_trl.hub.card import prepare_upload_folder
from first_trl.hub.upload import push_folder
from first_trl.prediction import ROWS_AT_A_TIME, Predictor, answered_lines, main, predict
from first_trl.settings import TaskConfig
from first_trl.student import Student, fit_thresholds, read_student, threshold_for
from tests.finished_run import make_base, make_run
from tests.test_push import run_elsewhere
from tests.tiny import WORDS, build_tokenizer

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
            shares = (model(**inputs).logits[0, -1, choices] / 1.3).softmax(-1)  # its closing temperature
        yield ["good", "bad"][int(shares.argmax())], float(shares.max())


def test_a_student_answers_among_the_choices_with_its_confidence_and_abstains_below_the_threshold(student, predictor):
    asked = rows(20)
    answers = predict(predictor, asked, accuracy=0.8)
    threshold = threshold_for(predictor.student, 0.8)
    assert 0 < sum(answer["abstain"] for answer in answers) < 20, "the threshold must tell some of these apart"
    for answer, (word, confidence) in zip(answers, slow_answers(student, [row["text"] for row in asked]), strict=True):
        assert answer["answer"] == word and answer["confidence"] == pytest.approx(confidence, abs=1e-5)
        assert answer["abstain"] == (confidence < threshold)
    assert predictor.predict([]) == [] and first_trl.predict is predict and first_trl.Predictor is Predictor
    with pytest.raises(FirstTrlError, match="row 1: .*no 'text', only txt"):
        predictor.predict([{"text": "a film"}, {"txt": "a film"}])


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


def described(**changes):
    thresholds = [{"target_accuracy": 0.9, "threshold": None, "coverage": 0.0, "accuracy": None}]
    content = {"arm": "first", "task": {}, "loading": {}, "base_is_local": True, "num_examples": 9}
    return Student(**{**content, "thresholds": thresholds, **changes})


def test_a_target_that_validation_never_reached_means_to_abstain_always(predictor, monkeypatch):
    monkeypatch.setattr(predictor, "student", described())
    assert all(answer["abstain"] for answer in predictor.predict(rows(5)))
    with pytest.raises(ValueError, match="no threshold was fitted for an accuracy of 0.5; choose among 0.9"):
        predictor.predict(rows(1), accuracy=0.5)


def test_the_closing_temperature_divides_the_log_probabilities(predictor, monkeypatch):
    before = predictor.predict(rows(5))
    thresholds = [{"target_accuracy": 0.9, "threshold": 0.6, "coverage": 0.5, "accuracy": 0.9}]
    monkeypatch.setattr(predictor, "student", described(temperature=2.0, thresholds=thresholds))
    for answer, old in zip(predictor.predict(rows(5)), before, strict=True):
        odds = (old["confidence"] / (1 - old["confidence"])) ** (1.3 / 2)  # from the fixture's temperature
        assert answer["confidence"] == pytest.approx(odds / (1 + odds), rel=1e-4)
        assert answer["answer"] == old["answer"] and answer["abstain"] == (answer["confidence"] < 0.6)


def test_a_model_without_numbers_abstains_from_everything_with_an_error(predictor, monkeypatch):
    nothing = lambda model, prompts, ids, **_: np.full((len(prompts), 2), np.nan)  # noqa: E731
    monkeypatch.setattr("first_trl.scoring.sequence_log_probs", nothing)
    with pytest.raises(ValueError, match="row 0: the model's probabilities are not numbers"):
        predictor.predict(rows(2))
    assert [list(line) for line in lines(predictor, b'{"text": "a film"}\n')] == [["error"]]


def lines(predictor, *source):
    answer = partial(predictor.choose, accuracy=0.9, tokens_per_batch=512)
    return [json.loads(line) for line in answered_lines(answer, source)]


def test_lines_are_answered_in_order_over_several_batches_and_blank_ones_are_passed_over(predictor):
    asked = rows(ROWS_AT_A_TIME + 3)
    source = [json.dumps(row).encode() + b"\n" for row in asked]
    answered, expected = lines(predictor, *source[:5], b" \n", *source[5:]), predictor.predict(asked)
    for line, row in zip(answered, expected, strict=True):
        assert line["answer"] == row["answer"] and line["confidence"] == pytest.approx(row["confidence"], abs=1e-5)


BAD_LINES = {
    b"not json\n": "line 3: it is not JSON in UTF-8",
    b'{"text": "caf\xe9"}\n': "line 3: it is not JSON in UTF-8",
    b'"a film"\n': "line 3: it holds a str; write one object a line",
    b"[]\n": "line 3: it holds a list",
    b'{"texts": "a"}\n': "line 3: .*no 'text', only texts",
    b'{"text": null}\n': "line 3: .*missing",
    b'{"text": "' + b"film " * 2000 + b'"}\n': "line 3: .*max_length",
    b'{"text": "\\ud800"}\n': "line 3: ",
    b"[" * 100_000 + b"\n": "line 3: it is not JSON",
    b'{"text": {"a": [1]}}\n': "line 3: ",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:20]))
def test_a_bad_line_has_its_error_and_loses_no_other(predictor, line):
    good = b'{"text": "a film"}\n'
    before, answer, after = lines(predictor, good, b"\n", line, good)
    assert before == after and set(before) == {"answer", "confidence", "abstain"}
    assert list(answer) == ["error"] and re.search(BAD_LINES[line], answer["error"])


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
    assert main([str(student), "--input", str(tmp_path / "asked.jsonl"), "--output", str(output)]) == 0
    assert output.read_text().startswith(printed) and '{"error": "line 5: it is not JSON' in output.read_text()
    assert "1 of 5 lines have no answer" in capsys.readouterr().err
    nothing = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr("sys.stdin", nothing)
    assert main([str(student), "--accuracy", "0.5"]) == 1 and "no threshold was fitted" in capsys.readouterr().err


def test_an_output_that_is_no_ordinary_file_is_written_to_or_refused_and_never_replaced(student, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(rows(1)[0]) + "\n")
    kept = asked.read_bytes()

    def run(output):
        return main([str(student), "--input", str(asked), "--output", str(output)])

    link, target, pipe = tmp_path / "link.jsonl", tmp_path / "target.jsonl", tmp_path / "pipe"
    link.symlink_to(target)
    assert run(link) == 0 and link.is_symlink() and '"answer"' in target.read_text()
    assert run("/dev/null") == 0 and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    assert run(pipe) == 0 and stat.S_ISFIFO(pipe.stat().st_mode) and b'"answer"' in reader.communicate(timeout=20)[0]
    (tmp_path / "same.jsonl").symlink_to(asked)
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "same.jsonl", "is the file of the questions")):
        assert run(output) == 1 and said in capsys.readouterr().err
    assert asked.read_bytes() == kept


def test_the_command_answers_its_help_without_anything_heavy():
    code = (
        "import sys; from first_trl.__main__ import main\ntry: main(['predict', '--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "ADAPTER" in done and "torch" not in done.split()


def test_free_text_is_written_with_the_probabilities_of_its_tokens(student, tmp_path, capsys, monkeypatch):
    import torch
    from peft import AutoPeftModelForCausalLM

    with pytest.raises(ValueError, match="lists choices.* leave --generate out"):
        Predictor(student, generate=True)
    shutil.copytree(student, tmp_path / "student")
    edited_task(tmp_path / "student", choices=None)
    asked = b'{"text": "a film"}\n{"txt": 1}\n{"text": "a long and dull book"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(asked)))
    assert main([str(tmp_path / "student"), "--generate", "--max_new_tokens", "6"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(printed[1]) == ["error"] and "line 2" in printed[1]["error"]
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(student), build_tokenizer()
    for found, text in ((printed[0], "a film"), (printed[2], "a long and dull book")):
        ids, words, shares = tokenizer(f"Review: {text} Sentiment :")["input_ids"], [], []
        while len(words) < 6 and (logits := model(torch.tensor([ids + words])).logits[0, -1]).argmax():
            words.append(int(logits.argmax()))
            shares.append(float((logits / 1.3).softmax(-1).max()))  # its closing temperature
        assert found["answer"] == tokenizer.decode(words) and found["ended"] == (len(words) < 6)
        assert found["mean_token_probability"] == pytest.approx(np.mean(shares), abs=1e-5)
        assert found["lowest_token_probability"] == pytest.approx(min(shares), abs=1e-5)


def test_a_writer_without_numbers_gives_errors_and_one_without_words_an_empty_answer(student, tmp_path, monkeypatch):
    import torch

    shutil.copytree(student, tmp_path / "student")
    edited_task(tmp_path / "student", choices=None)
    writer = Predictor(tmp_path / "student", generate=True)
    with monkeypatch.context() as patch:
        patch.setattr("first_trl.generation.written_answers", lambda model, prompts, *_, **__: [[0]] * len(prompts))
        (found,) = writer.generate(rows(1))
    assert found == {"answer": "", "mean_token_probability": None, "lowest_token_probability": None, "ended": True}
    with torch.no_grad():
        next(writer.model.parameters()).fill_(float("nan"))
    assert "are not numbers" in writer.generate(rows(1))[0]["error"]


def edited(path, **changes):
    """A JSON file with other values; a key of None is removed."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_threshold(folder, value):
    threshold = {"target_accuracy": 0.9, "threshold": value, "coverage": 0.5, "accuracy": 0.9}
    edited(folder / "predict.json", thresholds=[threshold])


HOSTILE = {  # what is done to a student's folder -> what the one line says
    "no folder": (shutil.rmtree, "there is no folder"),
    "free text": (lambda f: edited_task(f, choices=None), "lists no choices; write free text with --generate"),
    "no adapter_config": (lambda f: (f / "adapter_config.json").unlink(), ""),
    "adapter_config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
    "adapter_config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "is damaged"),
    "adapter_config is nested": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "is damaged"),
    "no base": (lambda f: edited(f / "adapter_config.json", base_model_name_or_path=None), "is damaged"),
    "base is a number": (lambda f: edited(f / "adapter_config.json", base_model_name_or_path=3), "no such folder"),
    "base is gone": (lambda f: edited(f / "adapter_config.json", base_model_name_or_path="../gone"), "../gone, and"),
    "unknown adapter": (lambda f: edited(f / "adapter_config.json", peft_type="SPELL"), ""),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ""),
    "empty weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), ""),
    "cut weights": (lambda f: os.truncate(f / "adapter_model.safetensors", 200), ""),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], ""),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ""),
    "no predict.json": (lambda f: (f / "predict.json").unlink(), "run `first-trl distill RECIPE`"),
    "predict.json is no JSON": (lambda f: (f / "predict.json").write_text("{"), "not a student's"),
    "predict.json is a list": (lambda f: (f / "predict.json").write_text("[]"), "not a student's"),
    "predict.json is binary": (lambda f: (f / "predict.json").write_bytes(b"\xff\xfe\x00"), "not a student's"),
    "predict.json is nested": (lambda f: (f / "predict.json").write_text("[" * 100_000), "not a student's"),
    "another schema": (lambda f: edited(f / "predict.json", schema_version=9), "schema_version"),
    "no loading": (lambda f: edited(f / "predict.json", loading=None), "loading"),
    "no task": (lambda f: edited(f / "predict.json", task=None), "task"),
    "a task of nothing": (lambda f: edited(f / "predict.json", task={"x": 1}), "task"),
    "no thresholds": (lambda f: edited(f / "predict.json", thresholds=None), "thresholds"),
    "empty thresholds": (lambda f: edited(f / "predict.json", thresholds=[]), "no threshold was fitted"),
    "threshold NaN": (lambda f: with_threshold(f, float("nan")), "threshold"),
    "threshold below 0": (lambda f: with_threshold(f, -1), "threshold"),
    "threshold above 1": (lambda f: with_threshold(f, 1.5), "threshold"),
    "threshold text": (lambda f: with_threshold(f, "0.5"), "threshold"),
    "temperature 0": (lambda f: edited(f / "predict.json", temperature=0), "temperature"),
    "temperature NaN": (lambda f: edited(f / "predict.json", temperature=float("nan")), "temperature"),
    "temperature huge": (lambda f: edited(f / "predict.json", temperature=1e30), "temperature"),
    "dtype of code": (lambda f: edited(f / "predict.json", loading={"dtype": "os.system"}), "dtype"),
    "prompt of 10^12 tokens": (lambda f: edited_task(f, max_length=10**12), "max_length"),
    "choices are numbers": (lambda f: edited_task(f, choices=[1, 2]), "choices"),
    "template runs code": (lambda f: edited_task(f, prompt="{text.__class__}"), "task"),
}  # fmt: skip
FAST = ("free text", "base is gone", "cut weights", "predict.json is nested", "threshold NaN", "no loading")


def edited_task(folder, **changes):
    file = folder / "predict.json"
    edited(file, task=json.loads(file.read_text())["task"] | changes)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in HOSTILE])
def test_a_hostile_or_broken_folder_gives_one_line_and_no_answer(student, tmp_path, capsys, monkeypatch, name):
    damage, said = HOSTILE[name]
    shutil.copytree(student, tmp_path / "student")
    damage(tmp_path / "student")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a film"}\n')))
    capsys.readouterr()
    assert main([str(tmp_path / "student")]) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("[first-trl]")]
    assert line.startswith("[first-trl] predict failed: ") and said in line
    assert "Traceback" not in printed.err and printed.out == ""


def test_what_else_a_description_holds_is_not_read(student, tmp_path):
    shutil.copytree(student, tmp_path / "student")
    edited(
        tmp_path / "student" / "predict.json",
        loading={"attn_implementation": "someone/kernel", "trust_remote_code": True, "model_revision": "other"},
    )
    _, read = read_student(tmp_path / "student")
    assert read.loading.model_dump(exclude_none=True) == {}


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

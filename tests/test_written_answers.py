"""Prompts without answers: the teacher writes them, is cached on what it wrote, and a kill costs no finished shard."""

import json
import os
import signal

import datasets
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from first_trl.__main__ import main
from first_trl.cache.reader import open_cache
from first_trl.checks import check_recipe
from first_trl.constants import IGNORED
from first_trl.data.rows import load_rows
from first_trl.errors import FirstTrlError
from first_trl.generation import answer_ends, written_answers
from first_trl.recipe import RecipeError, load_recipe
from first_trl.scoring import token_log_probs
from first_trl.settings import DatasetConfig, TaskConfig, WriteAnswers
from first_trl.stages import cache, calibrate, distill, evaluate
from tests.cache_samples import contents
from tests.test_cache_stage import caches, finish, launch, num_shards, wait_until
from tests.test_conversations import ONE, chat_tokenizer
from tests.test_unlabelled import unlabelled_recipe
from tests.test_vllm_scoring import FakeVLLM, answers_of
from tests.tiny import build_model

WRITE = {"max_new_tokens": 8}
OPEN = {"choices": None, "max_length": 60}


@pytest.fixture(autouse=True)
def on_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def open_recipe(folder, task=None, **write):
    return unlabelled_recipe(folder, OPEN | (task or {}), cache={"write_answers": WRITE | write})


def greedy(model, prompt, count, vocab_limit=27):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < count and (len(ids) == len(prompt) or ids[-1] != 0):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :vocab_limit].argmax()))
    return ids[len(prompt) :]


def test_a_row_without_a_prompt_is_dropped_or_named_as_any_bad_row(tmp_path, monkeypatch):
    question = {"role": "user", "content": "good?"}
    rows = [
        [question],
        None,
        [{"role": "assistant", "content": "alone"}],
        [question, {**question, "role": "assistant"}],
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))

    def load(bad_rows):
        source, task = DatasetConfig(path=str(path), bad_rows=bad_rows), TaskConfig(max_length=512)
        where = {"place": "datasets.transfer", "write": WriteAnswers(max_new_tokens=8)}
        return load_rows(source, "train", task, chat_tokenizer("qwen2_5"), **where)

    with monkeypatch.context() as older:
        older.setattr("first_trl.data.rows._code_of_tokens", lambda: ["an older release"])
        older.setattr("first_trl.data.choices._ANSWERS", ("No",))
        assert {row["messages"][1]["content"] for row in load("drop").rows} == {"No"}
    found = load("drop")
    assert found.lost["dropped"] == {"bad": 2}
    assert [row["messages"][0]["content"] for row in found.rows] == ["good?"] * 2
    assert {row["messages"][1]["content"] for row in found.rows} == {"yes"}
    with pytest.raises(FirstTrlError, match="datasets.transfer, row 1: .*and 1 more of 4 rows"):
        load("refuse")


def answers(path):
    found = open_cache(path / "runs/tiny/cache/train")
    rows = [(row["input_ids"], row["labels"]) for row in found.dataset]
    starts = [next(i for i, label in enumerate(labels) if label != IGNORED) for _, labels in rows]
    assert all(ids[start:] == labels[start:] for (ids, labels), start in zip(rows, starts, strict=True))
    return found, [(ids[:start], ids[start:]) for (ids, _), start in zip(rows, starts, strict=True)]


def test_a_teacher_writes_the_answers_and_is_cached_on_what_it_wrote(tmp_path, capsys):
    path, teacher = open_recipe(tmp_path), build_model(27).eval()
    report = check_recipe(load_recipe(path), here=False)
    assert report.problems == [] and {cost.name: cost.rows for cost in report.costs}["distill.first"] == 12
    assert main(["show", str(path), "--split", "transfer", "--row", "0"]) == 0
    shown = capsys.readouterr().out
    assert "the teacher writes up to 8 more" in shown and shown.endswith("Sentiment :⟦...⟧\n")
    for stage in (cache, calibrate, distill, evaluate):
        stage.main([str(path)])
    found, written = answers(tmp_path)
    for prompt, answer in written:
        assert answer == greedy(teacher, prompt, 8) and len(answer) <= 8
    ended = sum(answer[-1] == 0 for _, answer in written)
    totals = found.manifest["totals"]
    assert totals["answers_cut"] == 12 - ended and totals["answers_empty"] == sum(a == [0] for _, a in written)
    assert found.manifest["labels"] == "teacher" and found.manifest["write_answers"]["max_new_tokens"] == 8
    assert f"of the written answers {12 - ended} are cut and" in capsys.readouterr().err
    row, (prompt, answer) = found.dataset[0], written[0]
    with torch.no_grad():
        log_probs = teacher(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(np.array(row["teacher_log_probs"])[:, 0], log_probs.max(-1).values, atol=5e-3)
    assert json.loads((tmp_path / "runs/tiny/report/metrics.json").read_text())["arms"]["first"]
    student = tmp_path / "runs/tiny/students/first"
    closing, carried = (json.loads((student / name).read_text()) for name in ("calibration.json", "predict.json"))
    assert carried["temperature"] == closing["vocabulary"]["temperature"]
    path.write_text(path.read_text().replace("max_new_tokens: 8", "max_new_tokens: 9"))
    with pytest.raises(SystemExit, match="max_new_tokens"):
        distill.main([str(path)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": {"choices": ["good", "bad"]}}, "cache.write_answers: the task is closed"),
        ({"task": {"append_eos": False}}, "append_eos = False: cache.write_answers needs what ends an answer"),
        ({"task": {"prompt": None, "completion": None, "supervise": "all"}}, "the teacher writes the last turn alone"),
        ({"task": {"max_length": 8}}, "max_new_tokens = 8: task.max_length = 8 leaves no room"),
        ({"datasets": {"transfer": None}}, "no prompts to answer; write datasets.transfer"),
        ({"distill": {"ce_weight": 0.5}}, "distill.ce_weight = 0.5: .* no labels but the teacher's own"),
        ({"arms": {"mixed": {"ce_weight": 0.1}}}, "arms.mixed.ce_weight = 0.1"),
        ({"cache": {"write_answers": {"top_p": 0.9}}}, "top_p = 0.9: nothing is sampled at temperature 0"),
        ({"cache": {"write_answers": {"temprature": 1}}}, "did you mean temperature"),
    ],
)
def test_what_cannot_be_written_or_learned_is_refused_with_the_recipe(tmp_path, section, message):
    path = open_recipe(tmp_path)
    content = yaml.safe_load(path.read_text())
    for name, settings in section.items():
        for key, value in settings.items():
            content[name][key] = (
                content[name][key] | value if isinstance(value, dict) and key in content[name] else value
            )
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_rows_leave_room_for_their_answer_and_their_own_is_not_read(tmp_path):
    path = open_recipe(tmp_path, {"max_length": 24})
    rows = [{"text": "a film " * length, "label": "no word of the tokenizer's"} for length in (2, 20)]
    (tmp_path / "transfer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = " ".join(check_recipe(load_recipe(path), here=False).problems)
    assert "datasets.transfer: row 1: the prompt is 44 tokens" in problems
    cache.main([str(path), "--task.too_long=drop"])
    found, written = answers(tmp_path)
    assert len(written) == 1 and found.manifest["rows"]["dropped"] == {"too_long": 1}
    assert found.manifest["task"]["max_length"] == 24 and len(written[0][0]) == 8


def test_samples_follow_their_seed_and_probabilities_their_temperature():
    model, prompts = build_model(27).eval(), [[3, 4, 5], [6, 7]]

    def written(**how):
        settings = WriteAnswers(max_new_tokens=12, **how)
        return written_answers(model, prompts, [0], settings, tokens_per_batch=64, vocab_limit=27)

    sampled = written(temperature=1.0, seed=1)
    assert sampled == written(temperature=1.0, seed=1) != written(temperature=1.0, seed=2)
    assert written(temperature=1.0, top_p=1e-6) == written()
    answer = greedy(model, prompts[0], 12)
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0] + answer])).logits[0, 2:-1] / 1.7
    expected = logits.softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    rows, places = [prompts[0] + answer, prompts[1]], [range(2, 2 + len(answer)), range(0)]
    found = token_log_probs(model, rows, places, [1.0, 1.7], tokens_per_batch=64)
    np.testing.assert_allclose(np.exp(found[0][:, 1]), expected, atol=1e-5)
    assert found[1].size == 0


def test_an_adapter_writes_its_own_answers_whatever_its_checkpoint_samples_with():
    model = get_peft_model(build_model(27), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model.get_base_model().generation_config = GenerationConfig(do_sample=True, repetition_penalty=5.0, top_k=3)
    settings, prompts = WriteAnswers(max_new_tokens=12), [[3, 4, 5], [6, 7]]
    found = written_answers(model, prompts, [0], settings, tokens_per_batch=16, vocab_limit=26)
    with model.disable_adapter():
        assert found != written_answers(model, prompts, [0], settings, tokens_per_batch=16, vocab_limit=26)
    for prompt, written in zip(prompts, found, strict=True):
        assert written == greedy(model, prompt, 12, vocab_limit=26)


def test_an_answer_ends_as_a_learned_one_does():
    tokenizer = chat_tokenizer("qwen3")
    ends, closing = answer_ends(TaskConfig(), tokenizer, {"messages": ONE[:1]})
    assert tokenizer.decode(closing) == "<|im_end|>\n" and ends == closing[:1]
    task = TaskConfig(prompt="{text}", completion=" {label}.")
    assert answer_ends(task, tokenizer, {"text": "a"}) == ([tokenizer.eos_token_id], [tokenizer.eos_token_id])
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="no generation stops at text"):
        answer_ends(TaskConfig(), chat_tokenizer(plain), {"messages": ONE[:1]})


def test_a_server_writes_the_same_answers_with_the_same_settings(tmp_path):
    model = build_model(27).eval()
    score = answers_of(model)

    def answer(request):
        if request["max_tokens"] == 1:
            return score(request)
        written = greedy(model, request["prompt"], request["max_tokens"])
        tokens = [f"token_id:{token}" for token in written]
        reason = "stop" if written[-1] in request["stop_token_ids"] else "length"
        return {"choices": [{"logprobs": {"tokens": tokens}, "finish_reason": reason}]}

    path = open_recipe(tmp_path)
    cache.main([str(path)])
    expected = answers(tmp_path)[1]
    with FakeVLLM(answer) as fake:
        cache.main([str(path), "--backend=server", f"--server_url={fake.url}"])
        asked = next(request for request in fake.asked if request["max_tokens"] == 8)
    assert answers(tmp_path)[1] == expected
    assert asked["stop_token_ids"] == [0] and asked["temperature"] == 0 and asked["top_k"] == -1


@pytest.mark.slow
def test_a_killed_run_keeps_what_was_written_and_ends_with_the_same_bytes(tmp_path):
    path, runs = open_recipe(tmp_path, {"max_length": 100}, max_new_tokens=24), tmp_path / "by processes"
    rows = (tmp_path / "transfer.jsonl").read_text()
    (tmp_path / "transfer.jsonl").write_text(rows * 20)
    for processes in (1, 2):
        finish(launch(path, processes, f"--output_dir={runs / str(processes)}"))
    job = launch(path, 1, f"--output_dir={runs / 'killed'}")
    wait_until(lambda: num_shards(runs / "killed", "train") >= 10)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    folder = runs / "killed/tiny/cache/.new/train"
    left = contents(folder)
    assert 10 <= len(left) < 60 and "manifest.json" not in left
    written = {file.name: file.stat().st_mtime_ns for file in folder.glob("train-*")}
    finish(launch(path, 1, f"--output_dir={runs / 'killed'}"))
    found = runs / "killed/tiny/cache/train"
    assert caches(runs / "killed") == caches(runs / "1") == caches(runs / "2")
    assert written.items() <= {file.name: file.stat().st_mtime_ns for file in found.glob("train-*")}.items()

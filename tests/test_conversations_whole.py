"""Conversations through every command of a run, on tiny models with the chat templates that TRL ships."""

import json

import pytest
import yaml

from first_trl.stages import cache, calibrate, distill, evaluate, push, sft
from tests.test_conversations import CALLED, TOOLS, chat_tokenizer
from tests.tiny import build_model

pytestmark = pytest.mark.slow
WORDS = ["a good film", "a bad film", "not a good film", "not at all bad", "a film , not bad"]


def conversation(number, last):
    return [
        {"role": "user", "content": f"{WORDS[number % 5]} {number} ?"},
        {"role": "assistant", "content": "good" if number % 3 else "bad"},
        {"role": "user", "content": f"and {WORDS[(number + 1) % 5]} ?"},
        {"role": "assistant", "content": last},
    ]


def row(shape, number, last):
    messages = conversation(number, last)
    if shape == "ShareGPT":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}
    if shape == "parts":
        return {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]}
    if shape == "two columns":
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    if shape == "tools":
        tail = [{**CALLED[-1], "content": last}]
        return {"messages": [messages[0], *CALLED[1:-1], *tail], "tools": json.dumps(TOOLS)}
    return {"messages": messages}


@pytest.mark.parametrize(
    ("template", "shape", "task"),
    [
        ("qwen3", "messages", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("qwen3", "two columns", {"choices": ["good", "bad"]}),  # after the forced thoughts
        ("qwen3_training", "ShareGPT", {"supervise": "all"}),
        ("llama3_2", "tools", {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}),
        ("gemma3", "parts", {"supervise": "all"}),
        ("gemma3", "messages", {"choices": ["mostly good", "mostly bad"]}),
        ("smolvlm", "two columns", {"choices": ["good", "bad"]}),
        ("qwen3", "prompts alone", {"chat_template_kwargs": {"enable_thinking": False}}),
    ],
)
def test_conversations_go_through_every_stage(template, shape, task, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = chat_tokenizer(template)
    sizes = {"max_position_embeddings": 1024, "eos_token_id": tokenizer.eos_token_id}
    build_model(len(tokenizer), **sizes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = task.get("choices", ["good", "bad", "not bad", "a film"])
    for start, role in ((0, "train"), (40, "validation"), (80, "test")):
        rows = [row(shape, number, words[number % len(words)]) for number in range(start, start + 24)]
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    training = {
        "model_name_or_path": str(tmp_path / "base"), "dtype": "float32", "bf16": False, "use_cpu": True,
        "max_steps": 2, "gradient_checkpointing": False,
    }  # fmt: skip
    source = {role: {"path": str(tmp_path / f"{role}.jsonl")} for role in ("train", "validation", "test")}
    recipe = {
        "name": "chat",
        "output_dir": str(tmp_path / "runs"),
        "task": {"max_length": 900, **task},
        "datasets": {"train": source["train"], "validation": source["validation"], "test": {"other": source["test"]}},
        "sft": training,
        "distill": training,
        "calibrate": {"bootstrap": 0},
        "evaluate": {"bootstrap": 0},
    }
    if shape == "prompts alone":
        prompts = [{"prompt": conversation(number, "")[:-1]} for number in range(120, 132)]
        (tmp_path / "transfer.jsonl").write_text("".join(json.dumps(r) + "\n" for r in prompts))
        recipe["datasets"]["transfer"] = {"path": str(tmp_path / "transfer.jsonl")}
        recipe["cache"] = {"write_answers": {"max_new_tokens": 6}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = str(tmp_path / "recipe.yaml")
    for stage in (sft, cache, calibrate, distill, evaluate):
        stage.main([path])
    push.main([path, "--dry_run"])
    manifest = json.loads((tmp_path / "runs/chat/cache/train/manifest.json").read_text())
    assert tokenizer.decode(manifest["forced"]["closing"]).strip() and manifest["first_row"]["row"]
    assert manifest["labels"] == ("teacher" if shape == "prompts alone" else "given")
    arms = json.loads((tmp_path / "runs/chat/report/metrics.json").read_text())["arms"]
    assert {"teacher", "fine_tuned", "distilled", "first"} <= arms.keys()
    assert (tmp_path / "runs/chat/push/README.md").is_file()

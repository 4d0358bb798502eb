"""Rows of every conversational shape, through the chat templates that TRL ships, and what of them is learned."""

import json
from importlib.resources import files

import numpy as np
import pytest
from datasets import Dataset

from first_trl.__main__ import main
from first_trl.constants import IGNORED
from first_trl.data.choices import forced_positions, forced_tokens, marked_text
from first_trl.data.encoding import TooLongError, check_first_row, encode_example, encode_prompt, first_row
from first_trl.errors import FirstTrlError
from first_trl.settings import TaskConfig
from tests.cache_recipe import write_recipe
from tests.test_trainer import cache_of, trainer_for
from tests.tiny import build_model, byte_level_tokenizer

TEMPLATES = {path.name.removesuffix(".jinja"): path.read_text() for path in files("trl.chat_templates").iterdir()}
# Those that write today's date are refused
MARKED = sorted(name for name, text in TEMPLATES.items() if name.endswith("_training") and "strftime_now(" not in text)
ONE = [{"role": "user", "content": "a good film ?"}, {"role": "assistant", "content": "good"}]
TWO = [*ONE, {"role": "user", "content": "and a bad one ?"}, {"role": "assistant", "content": "bad film"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rate",
            "description": "Rates a film.",
            "parameters": {"type": "object", "properties": {"film": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "rate", "arguments": {"film": "a"}}}],
}
CALLED = [ONE[0], CALL, {"role": "tool", "name": "rate", "content": "4"}, {"role": "assistant", "content": "good"}]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<think>", "</think>")


def chat_tokenizer(template, eos="<|im_end|>"):
    tokenizer = byte_level_tokenizer(chat_template=TEMPLATES.get(template, template))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.eos_token = eos
    return tokenizer


def learned(tokenizer, example):
    """The supervised text, one entry for each run of supervised tokens."""
    runs, last = [], IGNORED
    for label in example["labels"]:
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if last != IGNORED else [*runs, [label]]
        last = label
    return [tokenizer.decode(run) for run in runs]


SHAPES = {
    "messages": {"messages": ONE},
    "prompt and completion": {"prompt": ONE[:1], "completion": ONE[1:]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a good film ?"}, {"from": "gpt", "value": "good"}]},
    "from and value": {"conversations": [{"from": message["role"], "value": message["content"]} for message in ONE]},
    "content parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ONE]},
    "empty keys": {"messages": [{**message, "tool_calls": None, "name": None} for message in ONE]},
}


def pinned(template, **task):
    """A task, with the argument that this template needs."""
    if template == "llama3_2":
        task["chat_template_kwargs"] = {"date_string": "1 Jan 2025"}
    return TaskConfig(**task)


@pytest.mark.parametrize("template", ["qwen3", "llama3_2", "gemma3", "qwen2_5", "qwen3_training"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_of_a_row_becomes_the_same_tokens(template, shape):
    tokenizer, task = chat_tokenizer(template), pinned(template)
    row = Dataset.from_list([SHAPES[shape]])[0]  # with the keys that a table adds
    example = encode_example(task, tokenizer, row)
    assert example == encode_example(task, tokenizer, {"messages": ONE})
    assert "good" in learned(tokenizer, example)[0] and len(learned(tokenizer, example)) == 1
    assert example["input_ids"][: example["num_prompt_tokens"]] == encode_prompt(task, tokenizer, row)


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3_2", "qwen3_training"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
def test_tools_and_tool_calls_reach_the_template_as_trl_hands_them_over(template, tools):
    tokenizer, task = chat_tokenizer(template), pinned(template)
    example = encode_example(task, tokenizer, {"messages": CALLED, "tools": tools})
    messages = [{**message, "content": message.get("content", "")} for message in CALLED]
    expected = tokenizer.apply_chat_template(messages, tools=TOOLS, **(task.chat_template_kwargs or {}))["input_ids"]
    assert example["input_ids"] == expected and "Rates a film." in tokenizer.decode(expected)
    ends_in_a_call = encode_example(task, tokenizer, {"messages": CALLED[:2], "tools": TOOLS})
    assert '"rate"' in learned(tokenizer, ends_in_a_call)[0]


@pytest.mark.parametrize("template", MARKED)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one turn", "two turns"])
def test_all_turns_are_those_of_trls_assistant_only_loss(template, messages):
    tokenizer = chat_tokenizer(template)
    if template.startswith(("idefics3", "smolvlm", "llava", "qwen2_5_vl", "qwen3_vl")):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    trl = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    example = encode_example(TaskConfig(supervise="all", max_length=4096), tokenizer, {"messages": messages})
    assert example["input_ids"] == trl["input_ids"]
    assert [label != IGNORED for label in example["labels"]] == [bool(mark) for mark in trl["assistant_masks"]]
    assert sum(trl["assistant_masks"]) > 0


@pytest.mark.parametrize("template", ["qwen2_5", "gemma3", "llama3_2"])
def test_without_marks_all_turns_are_found_by_the_difference_that_each_makes(template):
    tokenizer = chat_tokenizer(template)
    end = {"qwen2_5": "<|im_end|>\n", "gemma3": "<end_of_turn>\n", "llama3_2": "<|eot_id|>"}[template]
    for row, supervise, turns in (
        ({"messages": TWO}, "all", ["good", "bad film"]),
        ({"messages": TWO}, "last", ["bad film"]),
        ({"prompt": TWO[:1], "completion": TWO[1:]}, "all", ["good", "bad film"]),
        ({"prompt": TWO[:3], "completion": TWO[3:]}, "all", ["bad film"]),
    ):
        example = encode_example(pinned(template, supervise=supervise), tokenizer, row)
        assert learned(tokenizer, example) == [turn + end for turn in turns]


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_with_trls_own_as_the_remedy():
    with pytest.raises(FirstTrlError, match="message 1 .*get_training_chat_template.*supervise: last"):
        encode_example(TaskConfig(supervise="all"), chat_tokenizer("qwen3"), {"messages": TWO})


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        ("llama3_2", r'chat_template_kwargs: \{date_string: "26 Jul 2024"\}'),
        ("gptoss", "a template that writes a fixed date"),
    ],
)
def test_a_template_that_writes_todays_date_is_refused_with_what_pins_it(template, remedy):
    tokenizer = chat_tokenizer(template)
    with pytest.raises(FirstTrlError, match=f"today's date.*{remedy}"):
        encode_example(TaskConfig(), tokenizer, {"messages": ONE})
    if template == "llama3_2":
        ids = encode_example(pinned(template), tokenizer, {"messages": ONE})["input_ids"]
        assert "1 Jan 2025" in tokenizer.decode(ids)


# Forced tokens


@pytest.mark.parametrize(
    ("template", "task", "opening", "closing", "answer"),
    [
        ("qwen3", {}, "<think>\n\n</think>\n\n", "<|im_end|>\n", 0),
        ("qwen3", {"choices": ["good", "bad"]}, "<think>\n\n</think>\n\n", "<|im_end|>\n", 6),
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}, "", "<|im_end|>\n", 0),
        ("gemma3", {"choices": ["mostly good", "mostly bad"]}, "mostly", "<end_of_turn>\n", None),
        ("qwen2_5", {"choices": ["good", "bad"]}, "", "<|im_end|>\n", 0),
    ],
)
def test_forced_tokens_are_what_every_answer_begins_and_ends_with(template, task, opening, closing, answer):
    tokenizer = chat_tokenizer(template)
    forced = forced_tokens(TaskConfig(**task), tokenizer, {"messages": ONE})
    assert tokenizer.decode(forced["opening"]) == opening and tokenizer.decode(forced["closing"]) == closing
    assert forced["answer"] == (len(forced["opening"]) if answer is None else answer)


def test_forced_tokens_of_a_template_of_text_are_its_text_and_the_end_of_sequence(monkeypatch):
    tokenizer = byte_level_tokenizer()
    row = {"text": "a film", "label": "good"}
    task = TaskConfig(prompt="Review: {text}\nSentiment:", completion=" it is {label}.")
    forced = forced_tokens(task, tokenizer, row)
    assert tokenizer.decode(forced["opening"]).startswith(" it is")
    assert tokenizer.decode(forced["closing"]) == ".</s>" and forced["answer"] == 0
    joins = TaskConfig(prompt="Review: {text} ", completion="{label}.")  # the space with `good`, but not with `1`
    assert forced_tokens(joins, tokenizer, row) == {"opening": [], "closing": forced["closing"], "answer": 0}
    nested = TaskConfig(prompt="{pair[text]}:", completion=" {pair[label]}.")  # one column for both
    assert forced_tokens(nested, tokenizer, {"pair": row})["closing"] == forced["closing"]
    with pytest.raises(TooLongError, match="characters"):
        forced_tokens(task.model_copy(update={"max_length": 8}), tokenizer, {**row, "text": "good " * 2000})
    monkeypatch.setattr("first_trl.data.choices._ANSWERS", ("good",))  # as of a vocabulary that knows no other
    assert forced_tokens(task, tokenizer, row) == {"opening": [], "closing": [tokenizer.eos_token_id], "answer": 0}


def test_forced_positions_are_found_in_labels_whatever_was_cut_or_thought():
    forced = {"opening": [1, 2, 3], "closing": [8, 9]}
    examples = {
        (-100, -100, 1, 2, 3, 20, 21, 8, 9): (2, 3, 4, 7, 8),
        (-100, 20, 8, -100, 1, 2, 3, 21, 8, 9): (2, 4, 5, 6, 8, 9),  # two turns, the first as a template marks it
        (-100, 1, 20, 21, 8): (1, 4),  # thoughts after the first token; cut before the last
        (-100, 20, 21): (),
        (-100, -100): (),
    }
    flat = np.concatenate([np.array(labels) for labels in examples])
    starts = np.cumsum([0, *(len(labels) for labels in examples)])[:-1]
    expected = np.concatenate([[i in at for i in range(len(labels))] for labels, at in examples.items()])
    assert forced_positions(flat, starts, forced).tolist() == expected.tolist()
    assert not forced_positions(flat, starts, {"opening": [], "closing": []}).any()


@pytest.mark.parametrize("template", [name for name in MARKED if "<think>" in TEMPLATES[name]])
@pytest.mark.parametrize("thinking", [None, False, True])
def test_thoughts_that_a_template_forces_are_learned_as_trl_masks_them_and_never_measured(template, thinking):
    tokenizer = chat_tokenizer(template)
    arguments = {} if thinking is None else {"enable_thinking": thinking}
    task = TaskConfig(supervise="all", max_length=4096, chat_template_kwargs=arguments or None)
    example = encode_example(task, tokenizer, {"messages": TWO})
    trl = tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True, **arguments)
    labels = np.array(example["labels"])
    assert (labels != IGNORED).tolist() == [bool(mark) for mark in trl["assistant_masks"]]
    forced = forced_positions(labels, np.array([0]), forced_tokens(task, tokenizer, {"messages": TWO}))
    measured = np.where(forced, IGNORED, labels).tolist()
    assert learned(tokenizer, {"labels": measured}) == ["good", "bad film"]


# The same prompts


def test_another_chat_template_beginning_or_normaliser_is_refused_with_both_texts():
    teacher = chat_tokenizer("qwen3")
    cached = json.loads(json.dumps(first_row(TaskConfig(), teacher, {"messages": ONE, "other": object})))
    check_first_row(cached, TaskConfig(), chat_tokenizer("qwen3"))
    with pytest.raises(FirstTrlError, match=r"<think>.*good<\|im_end\|>.*chat template"):
        check_first_row(cached, TaskConfig(), chat_tokenizer("qwen3_instruct_2507"))
    task = TaskConfig(prompt="{text}", completion=" {label}")
    cached = first_row(task, byte_level_tokenizer(), {"text": "a film", "label": "good"})
    with pytest.raises(FirstTrlError, match="<s>"):
        check_first_row(cached, task, byte_level_tokenizer(bos=True))
    with pytest.raises(FirstTrlError, match="make it again"):
        check_first_row(None, task, byte_level_tokenizer())


# What a row looks like


@pytest.mark.parametrize(
    ("template", "task", "row", "shown"),
    [
        ("gemma3", {}, {"messages": ONE}, "<start_of_turn>model\n⟦good⟧⟪<end_of_turn>\n⟫"),
        ("qwen3", {"choices": ["good", "bad"]}, {"messages": ONE}, "⟪<think>\n\n</think>\n\n⟫⟦good⟧⟪<|im_end|>\n⟫"),
        ("qwen2_5", {"supervise": "all"}, {"messages": TWO}, "assistant\n⟦good⟧⟪<|im_end|>\n⟫<|im_start|>user"),
        (None, {"choices": ["good", "bad"]}, {"q": "a", "a": "bad"}, "a:⟦ bad⟧⟪</s>⟫"),
        (None, {"max_length": 12}, {"q": "a", "a": "a good film"}, "a:⟦ a good"),
    ],
    ids=["chat", "closed chat", "all turns", "closed question", "cut"],
)
def test_a_row_is_shown_with_what_is_learned_and_what_is_forced_marked(template, task, row, shown):
    tokenizer = chat_tokenizer(template) if template else byte_level_tokenizer()
    task = task | ({} if template else {"prompt": "{q}:", "completion": " {a}"})
    if task.get("max_length"):
        task["max_length"] = len(encode_example(TaskConfig(**task), tokenizer, row)["input_ids"]) - 2
    text = marked_text(TaskConfig(**task), tokenizer, row)
    assert shown in text
    assert ("cut at task.max_length" in text) == ("max_length" in task)


def test_the_command_shows_a_row_of_a_split(tmp_path, capsys):
    path = write_recipe(tmp_path)
    assert main(["show", str(path), "--row", "0", "--split", "validation"]) == 0
    assert "datasets.validation, row 0: " in (text := capsys.readouterr().out) and "⟪<eos>⟫" in text
    for arguments, message in ((["--row", "99"], "has 40 rows"), (["--row", "0", "--split", "dev"], "no such split")):
        assert main(["show", str(path), *arguments]) == 2 and message in capsys.readouterr().err


# Through the trainer


@pytest.mark.parametrize("template", ["qwen3", "llama3_2", "gemma3", "qwen3_training"])
@pytest.mark.parametrize("supervise", ["last", "all"])
def test_a_student_equal_to_its_teacher_has_no_loss_on_conversations(template, supervise, tmp_path):
    tokenizer, task = chat_tokenizer(template), pinned(template, supervise=supervise)
    rows = list(SHAPES.values())
    if (template, supervise) != ("qwen3", "all"):  # refused: it writes earlier turns otherwise
        rows += [{"messages": TWO}, *[{"messages": CALLED, "tools": TOOLS}] * (template != "gemma3")]
    examples = [encode_example(task, tokenizer, row) for row in rows]
    model = build_model(vocab_size=len(tokenizer), max_position_embeddings=2048, attn_implementation="eager")
    kept = [{name: example[name] for name in ("input_ids", "labels")} for example in examples]
    trainer = trainer_for(model, cache_of(model, kept), tokenizer, tmp_path, per_device_eval_batch_size=3)
    assert abs(trainer.evaluate()["eval_loss"]) < 1e-6

"""What a row becomes: rendering that reaches no object, one encoding for all stages, loading with remedies."""

import errno
import json
import os
import time

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from first_trl.data.choices import choice_token_ids, single_token_ids
from first_trl.data.encoding import TooLongError, encode_example, encode_prompt
from first_trl.data.loading import load_split, local_files, source_identity
from first_trl.data.rows import check_disjoint, usable_rows
from first_trl.errors import FirstTrlError
from first_trl.settings import DatasetConfig, TaskConfig
from first_trl.templates import render_template, template_fields

TEMPLATE = "Review: {text}\nSentiment:"
ROWS = [
    {"text": "a good film", "label": "good"},
    {"text": "a bad film", "label": "bad"},
    {"text": "not a good film , not at all", "label": "bad"},
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}hm{% endif %}{% endif %}"
)
CASES = int(os.environ.get("FIRST_FUZZ_CASES", "300"))
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))


def byte_level_tokenizer(bos=False, eos=False, chat_template=None):
    """A byte-level BPE with merges such as ` good`, as GPT-2, Llama 3 and Qwen have; optionally with what it adds."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [TEMPLATE, *(row["text"] + " " + row["label"] for row in ROWS), "good", "bad"] * 4
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tok():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def chat_tok():
    return byte_level_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)


def reviews(**kwargs):
    return TaskConfig(**{"prompt": TEMPLATE, "completion": " {label}", **kwargs})


def pieces(tokenizer, ids):
    return [tokenizer.decode([token]) for token in ids]


# Rendering


def test_fields_are_filled_from_columns_and_from_indices_into_them():
    row = {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "n": 3, "f": 0.5, "yes": True}
    assert render_template("{question} {choices[text][1]} {n} {f} {yes} {{x}}", row) == "Why? y 3 0.5 True {x}"
    assert template_fields("{question} {choices[text][0]} {choices[text][1]}") == ["question", "choices"]


def test_braces_in_a_value_are_not_read_again():
    assert (
        render_template("{text}", {"text": "{label} {text.__class__}", "label": "good"}) == "{label} {text.__class__}"
    )


@pytest.mark.parametrize(
    "template",
    ["{text.__class__}", "{text[0].__class__}", "{}", "{0}", "{text!r}", "{text:>9}", "{text:{n}}", "{text[}"],
)
def test_a_template_that_asks_for_more_than_columns_is_refused_by_name(template):
    with pytest.raises(ValueError, match="template") as refusal:
        render_template(template, {"text": "x", "n": 5})
    assert repr(template) in str(refusal.value)


def test_a_lone_brace_is_refused_with_the_way_to_write_it():
    with pytest.raises(ValueError, match=r"write|Write \{\{ and \}\}"):
        render_template("a } b", {})


def test_a_missing_column_names_the_nearest_one_and_all_of_them():
    with pytest.raises(ValueError, match=r"did you mean \{text\}\? its columns are text, label"):
        render_template("{txet}", ROWS[0])


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{a}", {"a": None}, "is missing"),
        ("{a}", {"a": float("nan")}, "is missing"),
        ("{a}", {"a": ["x"]}, "is a list"),
        ("{a[0]}", {"a": "text"}, "needs a list"),
        ("{a[3]}", {"a": [1]}, "past the end"),
        ("{a[-1]}", {"a": [1]}, "whole number"),
        ("{a[b]}", {"a": {"c": 1}}, "choose among c"),
        ("{a}", {"a": 10**5000}, "store it as text"),
    ],
)
def test_a_value_that_cannot_be_text_is_refused_with_its_field(template, row, message):
    with pytest.raises(ValueError, match=message) as refusal:
        render_template(template, row)
    assert "{a" in str(refusal.value)


class Watched(str):
    """Text that remembers being asked for anything but its own characters."""

    touched: list[str] = []

    def __getattribute__(self, name):
        Watched.touched.append(name)
        return super().__getattribute__(name)

    def __format__(self, spec):
        Watched.touched.append("__format__")
        return "formatted"


class Trap:
    """An object of a dataset row that must never be looked into."""

    def __getattribute__(self, name):
        if name == "__class__":  # type(x) does not come here; isinstance may
            return object.__getattribute__(self, name)
        Watched.touched.append(name)
        return object.__getattribute__(self, name)


@fuzz
@given(
    st.one_of(
        st.text(alphabet="{}[]().!:_ab0 \n", max_size=30),
        st.lists(
            st.sampled_from(
                [
                    "{",
                    "}",
                    "[",
                    "]",
                    ".",
                    "!r",
                    ":",
                    "trap",
                    "text",
                    "list",
                    "__class__",
                    "__globals__",
                    "0",
                    "{{",
                    "}}",
                ]
            ),
            max_size=12,
        ).map("".join),
        st.from_regex(
            r"\{(trap|text|list|dict)(\.__class__|\[0\]|\[__class__\]|\.a|![rsa]|:.{0,3}){0,3}\}", fullmatch=True
        ),
    )
)
def test_no_template_reaches_an_object_behind_the_data(template):
    Watched.touched.clear()
    row = {
        "trap": Trap(),
        "text": "plain",
        "list": [Trap(), "x"],
        "dict": {"0": Trap(), "a": "y"},
        "watched": Watched("w"),
    }
    try:
        text = render_template(template, row)
    except ValueError:
        text = ""
    assert isinstance(text, str) and "object at" not in text and "<class" not in text
    assert Watched.touched == []


def test_a_subclass_of_text_is_refused_before_its_own_formatting_runs():
    Watched.touched.clear()
    with pytest.raises(ValueError, match="Watched"):
        render_template("{text}", {"text": Watched("x")})
    assert "__format__" not in Watched.touched


# Encoding


def test_the_prompt_is_masked_and_the_completion_with_its_end_is_supervised(tok):
    example = encode_example(reviews(), tok, ROWS[0])
    assert tok.decode(example["input_ids"]) == "Review: a good film\nSentiment: good</s>"
    supervised = [label for label in example["labels"] if label != -100]
    assert pieces(tok, supervised) == [" good", "</s>"]
    assert example["labels"][example["num_prompt_tokens"] :] == example["input_ids"][example["num_prompt_tokens"] :]
    assert encode_prompt(reviews(), tok, ROWS[0]) == example["input_ids"][: example["num_prompt_tokens"]]


def test_the_prompt_of_a_row_without_an_answer_is_the_prompt_of_training(tok):
    assert encode_prompt(reviews(), tok, {"text": "a good film"}) == encode_prompt(reviews(), tok, ROWS[0])


def test_append_eos_can_be_turned_off_and_never_doubles_a_written_one(tok):
    assert encode_example(reviews(append_eos=False), tok, ROWS[0])["input_ids"][-1] != tok.eos_token_id
    written = encode_example(reviews(completion=" {label}</s>"), tok, ROWS[0])["input_ids"]
    assert written == encode_example(reviews(), tok, ROWS[0])["input_ids"]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_what_a_tokenizer_adds_stands_once_in_front_and_never_inside(tok, bos, eos):
    adding = byte_level_tokenizer(bos=bos, eos=eos)
    plain = encode_example(reviews(), tok, ROWS[0])["input_ids"]
    front = [adding.bos_token_id] if bos else []
    example = encode_example(reviews(), adding, ROWS[0])
    assert example["input_ids"] == front + plain
    assert example["labels"][: len(front)] == [-100] * len(front)
    assert encode_prompt(reviews(), adding, ROWS[0]) == front + encode_prompt(reviews(), tok, ROWS[0])
    assert encode_example(reviews(append_eos=False), adding, ROWS[0])["input_ids"] == front + plain[:-1]
    if bos:
        doubled = encode_example(reviews(prompt="<s>" + TEMPLATE), adding, ROWS[0])
        assert doubled["input_ids"] == example["input_ids"]


def test_an_empty_prompt_is_refused_unless_the_tokenizer_begins_it(tok):
    with pytest.raises(FirstTrlError, match="the prompt is empty"):
        encode_example(reviews(prompt=""), tok, ROWS[0])
    with_bos = byte_level_tokenizer(bos=True, eos=True)
    example = encode_example(reviews(prompt=""), with_bos, ROWS[0])
    assert example["labels"][0] == -100 and pieces(with_bos, example["labels"][1:]) == [" good", "</s>"]


def test_a_text_of_fifty_megabytes_is_refused_before_it_is_tokenised(tok):
    row = {"text": "x " * 25_000_000, "label": "good"}
    for encode in (encode_example, encode_prompt):
        start = time.monotonic()
        with pytest.raises(TooLongError, match="50,0.. characters|50,000,0.. characters"):
            encode(reviews(), tok, row)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("size", [120, 4_000, 2_000_000])
def test_a_row_that_is_too_long_is_cut_at_the_end_of_its_longest_text(tok, size):
    row = {"text": "a good film " * (size // 12), "hint": "not bad", "label": "good"}
    task = reviews(prompt="{hint}: {text}\nSentiment:", choices=["good", "bad"], max_length=24, too_long="cut")
    example = encode_example(task, tok, row)
    text = tok.decode(example["input_ids"])
    assert example["cut"] == "prompt" and len(example["input_ids"]) == 24
    assert text.startswith("not bad: a good film") and text.endswith("\nSentiment: good</s>")
    short = encode_example(task, tok, {**row, "text": "a film"})
    assert short["cut"] == "" and len(short["input_ids"]) <= 24


def test_a_row_whose_template_alone_is_too_long_is_refused_even_where_rows_are_cut(tok):
    with pytest.raises(TooLongError, match="its longest text is cut already"):
        encode_example(reviews(max_length=4, too_long="cut"), tok, ROWS[0])
    with pytest.raises(TooLongError, match="no column of text that can be cut"):
        encode_example(
            reviews(prompt="Review: {text[0]}", max_length=4, too_long="cut"), tok, {**ROWS[0], "text": ["x"]}
        )


def test_a_conversation_is_cut_in_its_longest_message(chat_tok):
    messages = [{"role": "user", "content": "a good film " * 100}, {"role": "assistant", "content": "bad"}]
    example = encode_example(TaskConfig(max_length=32, too_long="cut"), chat_tok, {"messages": messages})
    assert len(example["input_ids"]) == 32 and chat_tok.decode(example["input_ids"]).endswith("<|assistant|>bad</s>")


def test_of_a_closed_answer_nothing_is_cut(tok):
    task = reviews(choices=["good film", "bad film"])
    whole = encode_example(task, tok, {"text": "x", "label": "good film"})
    with pytest.raises(TooLongError, match="raise task.max_length"):
        shorter = reviews(choices=task.choices, max_length=len(whole["input_ids"]) - 1)
        encode_example(shorter, tok, {"text": "x", "label": "good film"})


def test_a_merge_across_the_border_is_refused_with_its_tokens_and_the_remedy(tok):
    with pytest.raises(ValueError, match="move the space from the end of the prompt") as refusal:
        encode_example(reviews(prompt=TEMPLATE + " ", completion="{label}"), tok, ROWS[0])
    assert "'Ġ'" in str(refusal.value) and "'Ġgood'" in str(refusal.value)


def test_a_long_completion_is_cut_from_its_end_and_a_long_prompt_is_refused(tok):
    whole = encode_example(reviews(completion=" {text}"), tok, ROWS[2])
    length = whole["num_prompt_tokens"] + 2
    cut = encode_example(reviews(completion=" {text}", max_length=length), tok, ROWS[2])
    assert cut["input_ids"] == whole["input_ids"][:length] and cut["labels"] == whole["labels"][:length]
    for task in (reviews(max_length=whole["num_prompt_tokens"]), reviews(max_length=4)):
        with pytest.raises(ValueError, match="raise task.max_length, shorten the prompt"):
            encode_example(task, tok, ROWS[2])
        with pytest.raises(ValueError, match="raise task.max_length, shorten the prompt"):
            encode_prompt(task, tok, ROWS[2])


def test_an_empty_completion_is_refused(tok):
    with pytest.raises(ValueError, match="empty in this row"):
        encode_example(reviews(), tok, {"text": "a film", "label": ""})


def test_a_tokenizer_without_an_end_token_is_refused_when_one_is_asked_for():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="append_eos: false"):
        encode_example(reviews(), tokenizer, ROWS[0])
    assert encode_example(reviews(append_eos=False), tokenizer, ROWS[0])["labels"][-1] != -100


def test_plain_prompt_and_completion_columns_need_no_templates(tok):
    row = {"prompt": "Review: a good film\nSentiment:", "completion": " good"}
    assert encode_example(TaskConfig(), tok, row) == encode_example(reviews(), tok, ROWS[0])
    with pytest.raises(ValueError, match="its columns are text, label"):
        encode_example(TaskConfig(), tok, ROWS[0])


# Conversations

CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "a good film"},
    {"role": "assistant", "content": "good"},
]


def test_only_the_last_message_of_a_conversation_is_supervised(chat_tok):
    messages = CHAT + [{"role": "user", "content": "a bad film"}, {"role": "assistant", "content": "bad"}]
    example = encode_example(TaskConfig(), chat_tok, {"messages": messages})
    supervised = [label for label in example["labels"] if label != -100]
    assert chat_tok.decode(supervised) == "bad</s>"
    assert example["input_ids"].count(chat_tok.bos_token_id) == 1
    prompt = chat_tok.decode(encode_prompt(TaskConfig(), chat_tok, {"messages": messages}))
    assert prompt.endswith("<|user|>a bad film</s><|assistant|>")
    assert (
        encode_prompt(TaskConfig(), chat_tok, {"messages": messages[:-1]})
        == example["input_ids"][: len(encode_prompt(TaskConfig(), chat_tok, {"messages": messages}))]
    )


def test_messages_split_in_prompt_and_completion_are_the_same_conversation(chat_tok):
    empty_key = [{**message, "tool_calls": None} for message in CHAT]
    split = {"prompt": empty_key[:2], "completion": empty_key[2:]}
    assert encode_example(TaskConfig(), chat_tok, split) == encode_example(TaskConfig(), chat_tok, {"messages": CHAT})


def test_what_the_chat_template_is_told_reaches_prompt_and_example(chat_tok):
    with pytest.raises(ValueError, match="task.chat_template_kwargs"):  # the prompt says "hm", the example does not
        encode_example(TaskConfig(chat_template_kwargs={"think": True}), chat_tok, {"messages": CHAT})
    with pytest.raises(ValueError, match="tokenize cannot be set here"):
        encode_example(TaskConfig(chat_template_kwargs={"tokenize": False}), chat_tok, {"messages": CHAT})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT[:2]}, "not the assistant's"),
        ({"messages": CHAT[2:]}, "nothing before the answer"),
        ({"messages": []}, "holds no messages"),
        ({"messages": "text"}, "holds no messages"),
        ({"messages": [{"role": "user"}]}, "role and content must be text"),
        ({"messages": CHAT[:2] + [{"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "tool", "content": "x"}] + CHAT[2:]}, "no tools"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(chat_tok, row, message):
    with pytest.raises(ValueError, match=message):
        encode_example(TaskConfig(), chat_tok, row)


def test_conversations_without_a_chat_template_are_refused_with_two_remedies(tok):
    with pytest.raises(ValueError, match="chat version of the model, or write task.prompt"):
        encode_example(TaskConfig(), tok, {"messages": CHAT})


# Choices


def test_each_choice_is_its_token_after_the_prompt(tok):
    task = reviews(choices=["good", "bad"])
    for row in (None, ROWS[0]):
        assert [pieces(tok, ids) for ids in choice_token_ids(task, tok, row)] == [[" good"], [" bad"]]
    first = encode_example(task, tok, ROWS[0])
    assert first["input_ids"][first["num_prompt_tokens"]] == choice_token_ids(task, tok, ROWS[0])[0][0]


def test_choices_stand_between_braces_and_text_of_the_templates(tok):
    task = reviews(prompt="{text} {{x}} Sentiment:", completion=" {label}</s>", choices=["good", "bad"])
    for row in (None, ROWS[0]):
        assert [pieces(tok, ids) for ids in choice_token_ids(task, tok, row)] == [[" good"], [" bad"]]
    braces = reviews(completion=" {{ {label} }}", choices=["good", "bad"])
    assert tok.decode(encode_example(braces, tok, ROWS[0])["input_ids"]).endswith("Sentiment: { good }</s>")
    for ids, choice in zip(choice_token_ids(braces, tok, ROWS[0]), braces.choices, strict=True):
        assert tok.decode(ids) == f" {{ {choice} }}</s>"  # the brace before the answer comes first
    with pytest.raises(ValueError, match="which is not one of"):
        encode_example(braces, tok, {"text": "a film", "label": "great"})


def test_choices_in_a_conversation_stop_where_the_answer_stops(chat_tok):
    task = TaskConfig(choices=["good", "bad"])
    ids = choice_token_ids(task, chat_tok, {"messages": CHAT})
    assert [pieces(chat_tok, answer) for answer in ids] == [["good"], ["bad"]]
    assert encode_example(task, chat_tok, {"messages": CHAT})["labels"][-2] == ids[0][0]


def test_plain_columns_carry_choices_with_their_space(tok):
    task = TaskConfig(choices=[" good", " bad"])
    row = {"prompt": "Review: a good film\nSentiment:", "completion": " good"}
    assert [pieces(tok, ids) for ids in choice_token_ids(task, tok, row)] == [[" good"], [" bad"]]


def test_choices_of_several_tokens_are_whole_completions_as_training_supervises_them(tok):
    task = reviews(choices=["good", "good film", "excellent"])
    answers = choice_token_ids(task, tok, ROWS[0])
    assert [tok.decode(ids) for ids in answers] == [" good</s>", " good film</s>", " excellent</s>"]
    for choice, ids in zip(task.choices, answers, strict=True):
        example = encode_example(task, tok, {"text": "a good film", "label": choice})
        assert example["input_ids"][example["num_prompt_tokens"] :] == ids


def test_choices_of_several_tokens_end_with_the_turn_in_a_conversation(chat_tok):
    task, ending = TaskConfig(choices=["excellent", "good"]), {"role": "assistant", "content": "excellent"}
    ids = choice_token_ids(task, chat_tok, {"messages": CHAT})[0]
    example = encode_example(task, chat_tok, {"messages": [*CHAT[:-1], ending]})
    assert chat_tok.decode(ids) == "excellent</s>" and example["input_ids"][-len(ids) :] == ids


def test_a_choice_that_begins_another_is_refused_where_nothing_ends_them(tok):
    with pytest.raises(ValueError, match="'good' is the beginning of 'good film' .*append_eos: true"):
        choice_token_ids(reviews(choices=["good film", "good"], append_eos=False), tok, ROWS[0])


def test_a_cache_of_the_choices_refuses_one_of_several_tokens_with_its_tokens(tok):
    with pytest.raises(ValueError, match="'excellent' is .*cache.support: top_k") as refusal:
        single_token_ids(reviews(choices=["good", "excellent"], append_eos=False), tok, ROWS[0])
    assert "Ġ" in str(refusal.value)


def test_two_choices_with_one_token_and_a_choice_without_one_are_refused(tokenizer):
    task = reviews(prompt="{text} :", choices=["good", "bad"])
    assert choice_token_ids(task, tokenizer) == [[tokenizer.vocab["good"]], [tokenizer.vocab["bad"]]]
    with pytest.raises(ValueError, match="no token for 'maybe'"):
        choice_token_ids(reviews(prompt="{text} :", choices=["good", "maybe"]), tokenizer)
    tokenizer_lower = byte_level_tokenizer()
    from tokenizers import normalizers

    tokenizer_lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="'good' and 'GOOD' are the same token"):
        choice_token_ids(reviews(choices=["good", "GOOD"]), tokenizer_lower)


def test_a_choice_that_is_tokenised_with_the_text_after_it_is_refused(tok):
    with pytest.raises(ValueError, match="is tokenised with the text"):
        choice_token_ids(reviews(completion=" {label}d", choices=["goo", "ba"]), tok)


def test_a_label_outside_the_choices_is_refused_with_its_row_value_and_choices(tok):
    task = reviews(choices=["good", "awful"])
    with pytest.raises(ValueError, match=r"row 1: the column 'label' holds 'bad'.*\['good', 'awful'\]"):
        usable_rows(datasets.Dataset.from_list(ROWS), task, tok)
    with pytest.raises(ValueError, match="remove the spaces"):
        encode_example(task, tok, {"text": "a film", "label": " good"})


# Datasets


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_tokenised_dataset_has_two_columns_and_every_row_in_order(tok):
    dataset = datasets.Dataset.from_list(ROWS * 3)
    tokenised = usable_rows(dataset, reviews(), tok).tokenized
    assert tokenised.column_names == ["input_ids", "labels"]
    assert str(tokenised.features["input_ids"].feature.dtype) == "int32"
    expected = [encode_example(reviews(), tok, row) for row in dataset]
    assert tokenised["input_ids"][:] == [example["input_ids"] for example in expected]
    assert tokenised["labels"][:] == [example["labels"] for example in expected]


def test_the_fingerprint_of_a_tokenised_dataset_follows_what_decides_the_tokens(tok):
    dataset = datasets.Dataset.from_list(ROWS)
    first = usable_rows(dataset, reviews(), tok).tokenized._fingerprint
    tok(["used", "with padding"], padding=True)
    assert usable_rows(dataset, reviews(), tok).tokenized._fingerprint == first
    assert usable_rows(dataset, reviews(append_eos=False), tok).tokenized._fingerprint != first
    assert usable_rows(dataset, reviews(), byte_level_tokenizer(bos=True)).tokenized._fingerprint != first
    assert usable_rows(dataset.select([0, 1]), reviews(), tok).tokenized._fingerprint != first


def test_a_row_that_is_too_long_is_named(tok):
    with pytest.raises(ValueError, match=r"row 2: the prompt is \d+ tokens"):
        lengths = [len(encode_example(reviews(), tok, row)["input_ids"]) for row in ROWS]
        usable_rows(datasets.Dataset.from_list(ROWS), reviews(max_length=max(lengths[:2])), tok)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_is_loaded_by_its_suffix_or_through_data_files(tmp_path, suffix):
    path = str(tmp_path / f"rows.{suffix}")
    dataset = datasets.Dataset.from_list(ROWS)
    {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[suffix](path)
    builder = "json" if suffix == "jsonl" else suffix
    for source in (DatasetConfig(path=path), DatasetConfig(path=builder, data_files=path)):
        assert load_split(source, "test").to_list() == ROWS


@pytest.mark.parametrize(
    "source",
    [
        {"path": "json", "data_files": "{folder}/rows-*.jsonl"},
        {"path": "json", "data_files": ["{folder}/rows-1.jsonl", "{folder}/rows-0.jsonl"]},
        {"path": "{folder}", "data_files": "rows-*.jsonl"},
        {"path": "{folder}", "data_files": "**/rows-0.jsonl"},
        {"path": "{folder}"},
        {"path": "{folder}/rows-0.jsonl"},
    ],
)
def test_changed_content_is_a_changed_source_and_is_what_is_read_whatever_the_time_of_the_file(tmp_path, source):
    folder = tmp_path / "data"
    folder.mkdir()

    def write(text):
        for number in (0, 1):
            write_lines(folder / f"rows-{number}.jsonl", [{"text": text, "label": "good"}])
            os.utime(folder / f"rows-{number}.jsonl", (10**9, 10**9))

    filled = json.loads(json.dumps(source).replace("{folder}", str(folder)))
    config = DatasetConfig(**filled, split="train")
    write("first")
    before = source_identity(config, "train")
    assert load_split(config, "train")["text"][0] == "first" and source_identity(config, "train") == before
    write("other")
    assert load_split(config, "train")["text"][0] == "other"
    after = source_identity(config, "train")
    assert after["files_sha256"] != before["files_sha256"] and "/" not in json.dumps(after["files"])


def test_local_files_are_the_files_that_a_source_reads_in_their_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, ROWS)

    def names(**source):
        return [str(file.relative_to(tmp_path)) for file in local_files(DatasetConfig(**source))]

    assert names(path=str(tmp_path)) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(path=str(tmp_path), data_files=["b.jsonl", "*.jsonl"]) == ["b.jsonl", "a.jsonl"]
    assert names(path="json", data_files=f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(path="json", data_files="https://host/rows.jsonl") == names(path="owner/rows") == []


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("text,label\nNA,None\nnull,nan\n", [["NA", "None"], ["null", "nan"]]),
        ("text,label\n99999999999999999999999,0.50\n007,true\n", [["9" * 23, "0.50"], ["007", "true"]]),
        ('text,label\n"a, b",\n', [["a, b", None]]),
    ],
)
def test_a_cell_of_a_csv_file_is_the_text_that_it_holds(tmp_path, text, rows):
    (tmp_path / "rows.csv").write_text(text)
    found = load_split(DatasetConfig(path=str(tmp_path / "rows.csv")), "train")
    assert [list(row.values()) for row in found] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nx,good\ny,good,more\n", "rows.csv, line 3: 3 cells where the header has 2; quote"),
        ("text,label\nx,good,1\ny,good,2\n", "rows.csv, line 2: 3 cells"),
        ("text,label\nx\n", "rows.csv, line 2: 1 cells"),
        ("text,label,text\nx,good,y\n", "names the column 'text' twice; rename"),
    ],
)
def test_a_csv_file_that_pandas_would_shift_or_rename_is_refused(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(FirstTrlError, match=message):
        load_split(DatasetConfig(path=str(tmp_path / "rows.csv")), "train")


@pytest.mark.parametrize("other", [{"shuffle_seed": 0}, {"split": "train[:50%]"}])
def test_a_stream_that_would_read_other_rows_than_the_other_stages_is_refused(tmp_path, other):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(FirstTrlError, match=rf"datasets.train.{next(iter(other))} is .*streaming: false"):
        load_split(DatasetConfig(path=path, **other), "train", streaming=True)


def test_the_role_names_the_split_of_a_folder(tmp_path):
    for name, row in zip(("train", "validation", "test"), ROWS, strict=True):
        write_lines(tmp_path / f"{name}.jsonl", [row])
        assert load_split(DatasetConfig(path=str(tmp_path), split="train"), "test")[0] == ROWS[0]
    assert [load_split(DatasetConfig(path=str(tmp_path)), role)[0] for role in ("train", "validation", "test")] == ROWS


def test_columns_are_renamed_even_in_a_swap_and_rows_are_shuffled_then_cut(tmp_path):
    rows = [{"sentence": f"s{i}", "text": i, "label": "good"} for i in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    swapped = load_split(DatasetConfig(path=path, columns={"text": "sentence", "sentence": "text"}), "train")
    assert swapped[3] == {"text": "s3", "sentence": 3, "label": "good"}
    replaced = load_split(DatasetConfig(path=path, columns={"text": "sentence"}, max_rows=5), "train")
    assert replaced.to_list() == [{"text": f"s{i}", "label": "good"} for i in range(5)]
    shuffled = load_split(DatasetConfig(path=path, shuffle_seed=1, max_rows=5), "train")["text"][:]
    assert shuffled == load_split(DatasetConfig(path=path, shuffle_seed=1, max_rows=20), "train")["text"][:5]
    assert shuffled != [0, 1, 2, 3, 4]
    streamed = load_split(DatasetConfig(path=path, columns={"text": "sentence"}, max_rows=5), "train", streaming=True)
    assert list(streamed) == replaced.to_list()


def test_class_labels_become_their_names_and_a_missing_one_is_refused(tmp_path, tok):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    dataset = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    loaded = load_split(DatasetConfig(path=str(tmp_path / "rows.parquet")), "train")
    assert loaded["label"][:] == ["good", None]
    with pytest.raises(ValueError, match="row 1: .* is missing"):
        usable_rows(loaded, reviews(), tok)


GOOD = '{"text": "x", "label": "good"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD * 2 + '{"text": "x", "lab\n' + GOOD, r"rows.jsonl, line 3 is not valid JSON"),
        (GOOD * 2 + '{"text": "x"', r"rows.jsonl, line 3 is not valid JSON"),
        ("[1, 2]\n" + GOOD, r"rows.jsonl, line 1 is not a JSON object"),
        (GOOD + '{"text": "x\\ud83d", "label": "good"}\n', r"rows.jsonl, line 2 holds .*half of a character"),
        (GOOD + '{"text": "x", "label": "good", "text": "y"}\n', r"rows.jsonl, line 2 .*the key 'text' stands twice"),
        ("", r"rows.jsonl is empty"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_split(DatasetConfig(path=str(path)), "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "{folder}", "split": "dev"}, r"no split 'dev'. Should be one of \['train'\]"),
        ({"path": "{folder}", "split": "train[:3"}, "slice such as"),
        ({"path": "{folder}", "split": "train[:0]"}, "has no rows"),
        ({"path": "{folder}", "name": "main"}, r"Available: \['default'\]"),
        ({"path": "{folder}/train.jsonl", "columns": {"text": "sentence"}}, "no column 'sentence'; choose among text"),
        ({"path": "{folder}/absent.jsonl"}, "absent.jsonl"),
        ({"path": "json", "data_files": "{folder}/*.none"}, "there is no .*none"),
        ({"path": "json"}, "set data_files"),
        ({"path": "owner/absent"}, "HF_HUB_OFFLINE is set; unset"),
        ({"path": "./absent"}, "it does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_the_remedy(tmp_path, source, message):
    write_lines(tmp_path / "train.jsonl", ROWS)
    source = {k: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for k, v in source.items()}
    with pytest.raises(ValueError, match=message) as refusal:
        load_split(DatasetConfig(**source), "train")
    assert str(refusal.value).startswith("datasets.train")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda: datasets.exceptions.DatasetNotFoundError("Dataset 'o/d' is a gated dataset on the Hub."),
            "hf auth login",
        ),
        (
            lambda: datasets.exceptions.DatasetNotFoundError("Dataset 'o/d' doesn't exist on the Hub"),
            "check the spelling",
        ),
        (lambda: ConnectionError("Couldn't reach 'o/d' on the Hub (ConnectError)"), "check the network"),
        (lambda: RuntimeError("Dataset scripts are no longer supported, but found d.py"), "code of its own"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "point HF_HOME at another disk"),
        (lambda: ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), "Set `name`"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(monkeypatch, error, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*args, **kwargs):
        raise error()

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=message):
        load_split(DatasetConfig(path="o/d"), "train")


def test_nothing_ever_asks_for_the_code_of_a_dataset(monkeypatch):
    asked = {}

    def load_dataset(*args, **kwargs):
        asked.update(kwargs)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_split(DatasetConfig(path="o/d"), "validation")
    assert asked["split"] == "validation" and not asked.get("trust_remote_code")


def test_prompts_shared_between_splits_are_counted_and_pointed_at(tok):
    def split(*texts):
        rows = [{"text": text, "label": "good"} for text in texts]
        return usable_rows(datasets.Dataset.from_list(rows), reviews(), tok).tokenized

    splits = {
        "train": split("a", "b", "c"),
        "validation": split("d"),
        "clean": split("e"),
        "leaky": split("x", "b", "b", "d"),
    }
    overlaps = {(o.first, o.second): o for o in check_disjoint(splits)}
    assert overlaps.keys() == {("train", "leaky"), ("validation", "leaky")}
    assert overlaps["train", "leaky"].count == 2 and overlaps["train", "leaky"].rows == [(1, 1), (1, 2)]
    assert overlaps["validation", "leaky"].rows == [(0, 3)]

"""What a row becomes: filled templates, one encoding for all stages, choices as tokens, and where rows come from."""

import errno
import json
import os
import time

import datasets
import pytest
from tokenizers import normalizers

from first_trl.data.choices import choice_token_ids, single_token_ids
from first_trl.data.encoding import TooLongError, encode_example, encode_prompt
from first_trl.data.loading import load_split, local_files, source_identity
from first_trl.data.rows import check_disjoint, usable_rows
from first_trl.errors import FirstTrlError
from first_trl.settings import DatasetConfig, TaskConfig
from first_trl.templates import render_template, template_fields
from tests.tiny import byte_level_tokenizer

TEMPLATE = "Review: {text}\nSentiment:"
ROWS = [
    {"text": "a good film", "label": "good"},
    {"text": "a bad film", "label": "bad"},
    {"text": "not a good film , not at all", "label": "bad"},
]
CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "a good film"},
    {"role": "assistant", "content": "good"},
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}hm{% endif %}{% endif %}"
)


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


# Templates


def test_fields_are_filled_from_columns_and_indices_and_what_they_hold_is_not_read_again():
    row = {"question": "{n}", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "n": 3, "f": 0.5, "yes": True}
    assert render_template("{question} {choices[text][1]} {n} {f} {yes} {{x}}", row) == "{n} y 3 0.5 True {x}"
    assert template_fields("{question} {choices[text][0]} {choices[text][1]}") == ["question", "choices"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text.__class__}", "not allowed; write a column"),
        ("{text[0].__class__}", "not allowed"),
        ("{}", "not allowed"),
        ("{0}", "not allowed"),
        ("{text!r}", "not allowed"),
        ("{text:>9}", "not allowed"),
        ("{text:{n}}", "not allowed"),
        ("{text[}", "write {{ and }}"),
        ("a } b", "write {{ and }}"),
        ("{txet}", "{txet}: there is no 'txet', only text, none"),
        ("{none}", "{none} is missing in this row; fill it"),
        ("{nan}", "{nan} is missing"),
        ("{list}", "{list} is a list, no text"),
        ("{text[0]}", "{text[0]}: there is no '0', only a str"),
        ("{list[3]}", "{list[3]}: there is no '3', only 1 entries"),
        ("{list[-1]}", "there is no '-1'"),
        ("{dict[b]}", "there is no 'b', only c"),
    ],
)
def test_a_template_or_a_value_that_cannot_be_text_is_refused_by_name(template, message):
    with pytest.raises(FirstTrlError) as refusal:
        render_template(template, {"text": "x", "none": None, "nan": float("nan"), "list": [1], "dict": {"c": 1}})
    assert message in str(refusal.value) and repr(template) in str(refusal.value)


# Encoding


def test_the_prompt_is_masked_and_the_completion_with_its_end_is_supervised(tok):
    example = encode_example(reviews(), tok, ROWS[0])
    assert tok.decode(example["input_ids"]) == "Review: a good film\nSentiment: good</s>"
    supervised = [label for label in example["labels"] if label != -100]
    assert pieces(tok, supervised) == [" good", "</s>"]
    assert example["labels"][example["num_prompt_tokens"] :] == example["input_ids"][example["num_prompt_tokens"] :]
    prompt = example["input_ids"][: example["num_prompt_tokens"]]
    assert prompt == encode_prompt(reviews(), tok, ROWS[0]) == encode_prompt(reviews(), tok, {"text": "a good film"})
    row = {"prompt": "Review: a good film\nSentiment:", "completion": " good"}  # columns that need no templates
    assert encode_example(TaskConfig(), tok, row) == example


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
        assert encode_example(reviews(prompt="<s>" + TEMPLATE), adding, ROWS[0])["input_ids"] == example["input_ids"]
        empty = encode_example(reviews(prompt=""), adding, ROWS[0])
        assert empty["labels"][0] == -100 and pieces(adding, empty["labels"][1:]) == [" good", "</s>"]


def no_end():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("task", "row", "tokenizer", "message"),
    [
        (reviews(prompt=""), {}, byte_level_tokenizer, "the prompt is empty"),
        (reviews(), {"label": ""}, byte_level_tokenizer, "empty in this row"),
        (reviews(), {}, no_end, "append_eos: false"),
        (TaskConfig(), {}, byte_level_tokenizer, "columns are text, label"),
        (TaskConfig(), {"messages": CHAT}, byte_level_tokenizer, "chat version of the model, or write task.prompt"),
        (
            reviews(prompt=TEMPLATE + " ", completion="{label}"),
            {},
            byte_level_tokenizer,
            "'Ġ'.*'Ġgood'.*move the space",
        ),
        (reviews(choices=["bad", "awful"]), {}, byte_level_tokenizer, r"'good', .*\['bad', 'awful'\]; add it"),
        (reviews(choices=["good", "bad"]), {"label": " good"}, byte_level_tokenizer, "remove the spaces"),
    ],
)
def test_a_row_that_cannot_be_learned_is_refused_with_the_remedy(task, row, tokenizer, message):
    with pytest.raises(FirstTrlError, match=message):
        encode_example(task, tokenizer(), ROWS[0] | row)


# What is too long


def test_a_long_completion_is_cut_from_its_end_and_a_long_prompt_or_closed_answer_is_refused(tok):
    whole = encode_example(reviews(completion=" {text}"), tok, ROWS[2])
    length = whole["num_prompt_tokens"] + 2
    cut = encode_example(reviews(completion=" {text}", max_length=length), tok, ROWS[2])
    assert cut["input_ids"] == whole["input_ids"][:length] and cut["labels"] == whole["labels"][:length]
    for task in (reviews(max_length=whole["num_prompt_tokens"]), reviews(max_length=4)):
        for encode in (encode_example, encode_prompt):
            with pytest.raises(
                TooLongError, match=rf"room for {task.max_length} .*raise task.max_length, shorten the prompt"
            ):
                encode(task, tok, ROWS[2])
    closed, row = reviews(choices=["good film", "bad film"]), {"text": "x", "label": "good film"}
    shorter = closed.model_copy(update={"max_length": len(encode_example(closed, tok, row)["input_ids"]) - 1})
    with pytest.raises(TooLongError):
        encode_example(shorter, tok, row)


def test_a_text_of_fifty_megabytes_is_refused_before_it_is_tokenised(tok):
    row, start = {"text": "x " * 25_000_000, "label": "good"}, time.monotonic()
    for encode in (encode_example, encode_prompt):
        with pytest.raises(TooLongError, match="50,000,0.. characters"):
            encode(reviews(), tok, row)
    assert time.monotonic() - start < 10


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


def test_a_row_of_more_characters_than_are_tokenised_is_cut_until_they_are_few_enough(tokenizer):
    task = TaskConfig(prompt="{text} :", completion=" {label}", max_length=8, too_long="cut")
    text = "good" + " " * 4080 + "bad " * 3  # whose spaces are no tokens; 4,096 characters are read
    example = encode_example(task, tokenizer, {"text": text, "label": "bad"})
    assert tokenizer.decode(example["input_ids"]).startswith("good") and example["cut"] == "prompt"


def test_a_conversation_is_cut_in_its_longest_message(chat_tok):
    messages = [{"role": "user", "content": "a good film " * 100}, {"role": "assistant", "content": "bad"}]
    example = encode_example(TaskConfig(max_length=32, too_long="cut"), chat_tok, {"messages": messages})
    assert 30 < len(example["input_ids"]) <= 32 and example["cut"] == "prompt"
    assert chat_tok.decode(example["input_ids"]).endswith("<|assistant|>bad</s>")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ({}, {}, "which keeps template and answer"),
        ({"completion": " {label} and more"}, {}, "which keeps template and answer"),
        ({"prompt": "Review: {text[0]}"}, {"text": ["a good film"]}, "no column of text that can be cut"),
    ],
)
def test_a_row_whose_template_and_answer_are_too_long_is_refused_even_where_rows_are_cut(tok, task, row, message):
    with pytest.raises(TooLongError, match=message):
        encode_example(reviews(**task, max_length=4, too_long="cut"), tok, ROWS[0] | row)


# Conversations


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ({}, {"messages": CHAT[:2]}, "not the assistant's"),
        ({}, {"messages": CHAT[2:]}, "nothing before the answer"),
        ({}, {"messages": []}, "holds no messages"),
        ({}, {"messages": "text"}, "holds no messages"),
        ({}, {"prompt": CHAT[:2]}, "'completion' holds no messages"),
        ({}, {"messages": [{"role": "user"}]}, "message 0: role and content must be text"),
        ({}, {"messages": [CHAT[1], {"role": "assistant", "content": [{"type": "image"}]}]}, "message 1: .*image"),
        ({}, {"messages": CHAT[:2] + [{"role": "assistant", "content": " "}]}, "is empty"),
        ({}, {"messages": [{"role": "tool", "content": "x"}] + CHAT[2:]}, "no tools"),
        ({}, {"messages": CHAT, "tools": "[{"}, "'tools' is not valid JSON"),
        ({"tokenize": False}, {"messages": CHAT}, "tokenize cannot be set here"),
        (
            {"think": True},
            {"messages": CHAT},
            "task.chat_template_kwargs",
        ),  # the prompt says "hm", the example does not
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(chat_tok, task, row, message):
    with pytest.raises(FirstTrlError, match=message):
        encode_example(TaskConfig(chat_template_kwargs=task or None), chat_tok, row)


# Choices


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ({}, [[" good"], [" bad"]]),
        ({"prompt": "{text} {{x}} Sentiment:", "completion": " {label}</s>"}, [[" good"], [" bad"]]),
        ({"completion": " {{ {label} }}"}, " {{ {} }}</s>"),  # the brace before the answer comes first
        ({"completion": " {label[0]}.", "choices": ["a good film", "bad"]}, " {}.</s>"),
        ({"choices": ["good film", "bad film"]}, " {}</s>"),
    ],
)
def test_each_choice_is_its_tokens_after_the_prompt(tok, task, answers):
    task = reviews(**{"choices": ["good", "bad"], **task})
    found = choice_token_ids(task, tok, {"text": "a good film"})
    if isinstance(answers, str):
        answers = [answers.replace("{{", "{").replace("}}", "}").replace("{}", choice) for choice in task.choices]
        assert [tok.decode(ids) for ids in found] == answers
    else:
        assert [pieces(tok, ids) for ids in found] == answers
    for ids, choice in zip(found, task.choices, strict=True):
        label = [choice] if "[0]" in task.completion else choice
        example = encode_example(task, tok, {"text": "a good film", "label": label})
        assert example["input_ids"][example["num_prompt_tokens"] :][: len(ids)] == ids


def test_choices_of_several_tokens_end_with_the_turn_in_a_conversation(chat_tok):
    task, ending = TaskConfig(choices=["excellent", "good"]), {"role": "assistant", "content": "excellent"}
    ids = choice_token_ids(task, chat_tok, {"messages": CHAT})[0]
    example = encode_example(task, chat_tok, {"messages": [*CHAT[:-1], ending]})
    assert chat_tok.decode(ids) == "excellent</s>" and example["input_ids"][-len(ids) :] == ids


def lower_case():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("task", "tokenizer", "message"),
    [
        (
            {"choices": ["good film", "good"], "append_eos": False},
            None,
            "'good' begin .*'good film' .*append_eos: true",
        ),
        ({"choices": ["good", "GOOD"]}, lower_case, "'good' are those of 'GOOD'"),
        ({"completion": " {label}d", "choices": ["goo", "ba"]}, None, "'goo' is tokenised with the text after it"),
        ({"choices": ["good", "excellent"], "append_eos": False}, None, "'excellent' is .*Ġ.*cache.support: top_k"),
    ],
)
def test_choices_that_cannot_be_compared_are_refused(tok, task, tokenizer, message):
    with pytest.raises(FirstTrlError, match=message):
        single_token_ids(reviews(**task), tokenizer() if tokenizer else tok, ROWS[0])


def test_a_choice_that_the_tokenizer_does_not_know_is_refused(tokenizer):
    with pytest.raises(FirstTrlError, match="no token for 'maybe'"):
        choice_token_ids(reviews(prompt="{text} :", choices=["good", "maybe"]), tokenizer, ROWS[0])


# Tokenised splits


def test_a_tokenised_dataset_has_every_row_in_order_and_a_fingerprint_of_what_decides_the_tokens(tok):
    dataset = datasets.Dataset.from_list(ROWS * 3)
    first = usable_rows(dataset, reviews(), tok).tokenized
    assert str(first.features["input_ids"].feature.dtype) == "int32"
    expected = [encode_example(reviews(), tok, row) for row in dataset]
    assert first.to_list() == [{name: row[name] for name in ("input_ids", "labels")} for row in expected]
    tok(["used", "with padding"], padding=True)
    assert usable_rows(dataset, reviews(), tok).tokenized._fingerprint == first._fingerprint
    for other in (
        (dataset, reviews(append_eos=False), tok),
        (dataset, reviews(), byte_level_tokenizer(bos=True)),
        (dataset.select([0, 1]), reviews(), tok),
    ):
        assert usable_rows(*other).tokenized._fingerprint != first._fingerprint


def test_prompts_shared_between_splits_are_counted_and_pointed_at(tok):
    def split(*texts):
        rows = [{"text": text, "label": "good"} for text in texts]
        return usable_rows(datasets.Dataset.from_list(rows), reviews(), tok).tokenized

    texts = {"train": "abc", "validation": "d", "clean": "e", "leaky": "xbbd"}
    splits = {name: split(*letters) for name, letters in texts.items()}
    overlaps = {(o.first, o.second): (o.count, o.rows) for o in check_disjoint(splits)}
    assert overlaps == {("train", "leaky"): (2, [(1, 1), (1, 2)]), ("validation", "leaky"): (1, [(0, 3)])}


# Where rows come from


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


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

    config = DatasetConfig(**json.loads(json.dumps(source).replace("{folder}", str(folder))), split="train")
    write("first")
    before = source_identity(config, "train")
    assert load_split(config, "train")["text"][0] == "first" and source_identity(config, "train") == before
    write("other")
    assert load_split(config, "train")["text"][0] == "other"
    after = source_identity(config, "train")
    assert after["files_sha256"] != before["files_sha256"] and "/" not in json.dumps(after["files"])


def test_local_files_are_the_files_that_a_source_reads_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, ROWS)

    def names(**source):
        return [str(file.relative_to(tmp_path)) for file in local_files(DatasetConfig(**source))]

    assert names(path=str(tmp_path)) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(path=str(tmp_path), data_files=["b.jsonl", "*.jsonl"]) == ["b.jsonl", "a.jsonl"]
    assert names(path="json", data_files=f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(path="json", data_files="https://host/rows.jsonl") == names(path="owner/rows") == []
    assert names(path="owner/rows", data_files="a.jsonl") == [], "of the Hub, though there is such a file here"
    (tmp_path / "json").mkdir()
    assert list(map(str, local_files(DatasetConfig(path="json", data_files="a.jsonl")))) == ["a.jsonl"]
    mixed = DatasetConfig(path="json", data_files=["a.jsonl", "https://host/rows.jsonl"])
    with pytest.raises(FirstTrlError, match="some of these are files here, others addresses"):
        load_split(mixed, "train")


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


def test_the_role_names_the_split_of_a_folder(tmp_path):
    for name, row in zip(("train", "validation", "test"), ROWS, strict=True):
        write_lines(tmp_path / f"{name}.jsonl", [row])
        assert load_split(DatasetConfig(path=str(tmp_path), split="train"), "test")[0] == ROWS[0]
    assert [load_split(DatasetConfig(path=str(tmp_path)), role)[0] for role in ("train", "validation", "test")] == ROWS


def test_columns_are_renamed_even_in_a_swap_and_rows_are_shuffled_then_cut(tmp_path):
    rows = [{"sentence": f"s{i}", "text": i, "label": "good"} for i in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)

    def load(streaming=False, **config):
        return list(load_split(DatasetConfig(path=path, **config), "train", streaming=streaming))

    swapped = load(columns={"text": "sentence", "sentence": "text"})
    assert swapped[3] == {"text": "s3", "sentence": 3, "label": "good"}
    replaced = load(columns={"text": "sentence"}, max_rows=5)
    assert replaced == [{"text": f"s{i}", "label": "good"} for i in range(5)]
    assert load(columns={"text": "sentence"}, max_rows=5, streaming=True) == replaced
    shuffled = load(shuffle_seed=1, max_rows=5)
    assert shuffled == load(shuffle_seed=1)[:5] and shuffled != rows[:5]


def test_class_labels_become_their_names_and_a_missing_one_is_refused(tmp_path, tok):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    dataset = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    loaded = load_split(DatasetConfig(path=str(tmp_path / "rows.parquet")), "train")
    assert loaded["label"][:] == ["good", None]
    with pytest.raises(FirstTrlError, match="row 1: .* is missing"):
        usable_rows(loaded, reviews(), tok)


GOOD = '{"text": "x", "label": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", GOOD * 2 + '{"text": "x", "lab\n' + GOOD, "rows.jsonl, line 3 is not valid JSON"),
        ("rows.json", GOOD * 2 + '{"text": "x"', "rows.json, line 3 is not valid JSON"),
        ("rows.jsonl", "[1, 2]\n" + GOOD, "rows.jsonl, line 1 is not a JSON object: .*write one"),
        (
            "rows.jsonl",
            GOOD + '{"text": "x\\ud83d", "label": "good"}\n',
            "rows.jsonl, line 2 holds .*half of a character",
        ),
        ("rows.jsonl", GOOD + '{"text": "x", "label": "good", "text": "y"}\n', "line 2 .*a key stands twice"),
        ("rows.jsonl", "", "rows.jsonl is empty"),
        ("rows.csv", "text,label\nx,good\ny,good,more\n", "rows.csv, line 3: 3 cells where the header has 2; quote"),
        ("rows.csv", "text,label\nx\n", "rows.csv, line 2: 1 cells"),
        ("rows.csv", "text,label,text\nx,good,y\n", r"rows.csv has the columns .*'text'\]; name each once"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FirstTrlError, match=message):
        load_split(DatasetConfig(path=str(tmp_path / name)), "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "{folder}", "split": "dev"}, r"Unknown split \"dev\". Should be one of \['train'\]"),
        ({"path": "{folder}", "split": "train[:3"}, "train.*correct `split`"),
        ({"path": "{folder}", "split": "train[:0]"}, "no data"),
        ({"path": "{folder}", "name": "main"}, r"Available: \['default'\]"),
        ({"path": "{folder}/train.jsonl", "columns": {"text": "sentence"}}, "no column 'sentence'; choose among text"),
        ({"path": "{folder}", "data_files": "train.*"}, "files of .csv, .jsonl; name one kind"),
        ({"path": "{folder}/absent.jsonl"}, "absent.jsonl': there is no such file; give an existing one"),
        ({"path": "json", "data_files": "{folder}/*.none"}, "there is no such file"),
        ({"path": "json"}, "path = 'json': .*write data_files"),
        ({"path": "owner/absent"}, "owner/absent.*HF_HUB_OFFLINE"),
        ({"path": "./absent"}, "./absent': there is no such folder"),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_the_remedy(tmp_path, source, message):
    write_lines(tmp_path / "train.jsonl", ROWS)
    if "data_files" in source:
        (tmp_path / "train.csv").write_text("text,label\n")
    source = {k: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for k, v in source.items()}
    with pytest.raises(FirstTrlError, match=message) as refusal:
        load_split(DatasetConfig(**source), "train")
    assert str(refusal.value).startswith("datasets.train")


@pytest.mark.parametrize("other", [{"shuffle_seed": 0}, {"split": "train[:50%]"}])
def test_a_stream_that_would_read_other_rows_than_the_other_stages_is_refused(tmp_path, other):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(FirstTrlError, match=rf"datasets.train.{next(iter(other))} = .*streaming: false"):
        load_split(DatasetConfig(path=path, **other), "train", streaming=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("'o/d' is a gated dataset on the Hub."), "gated.*hf auth login"),
        (ConnectionError("Couldn't reach 'o/d' on the Hub (ConnectError)"), "Couldn't reach .*network"),
        (OSError(errno.ENOSPC, "No space left on device"), "point HF_HOME at another disk"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy_and_no_code_of_a_dataset_is_asked_for(
    monkeypatch, error, message
):
    def refuse(*args, **kwargs):
        assert kwargs["split"] == "validation" and not kwargs.get("trust_remote_code")
        raise error

    monkeypatch.setattr("first_trl.data.loading.hub_commit", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FirstTrlError, match=message):
        load_split(DatasetConfig(path="o/d"), "validation")

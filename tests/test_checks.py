"""What would fail late is refused first, every problem at once: with its place, its value and the remedy."""

import json
import random
import shutil

import pytest
import yaml

from first_trl import __main__ as command
from tests.tiny import WORDS, build_model, build_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
DATED = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }} "
DATED += CHAT
SPLITS = {"train": 40, "transfer": 40, "validation": 120, "test": 30}
LONG = "film " * 60


def write_recipe(folder, change=None):
    """A recipe that trains, caches, distils and reports on tiny files; `change(folder, recipe)` breaks it."""
    for name in ("teacher", "student"):
        write_model(folder / name)
    for seed, (split, count) in enumerate(SPLITS.items()):
        dice = random.Random(seed)
        texts = (" ".join(dice.choices(WORDS.split()[:-6], k=dice.randint(4, 12))) for _ in range(count))
        write_rows(folder, split, [{"text": text, "label": dice.choice(["good", "bad"])} for text in texts])
    train = {"max_steps": 2, "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none"}
    source = {split: {"path": "json", "data_files": str(folder / f"{split}.jsonl")} for split in SPLITS}
    task = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "choices": ["good", "bad"]}
    recipe = {
        "name": "checked",
        "output_dir": str(folder / "runs"),
        "task": {**task, "append_eos": False, "max_length": 40},
        "datasets": {"test": {"films": source.pop("test")}, **source},
        "sft": {"model_name_or_path": str(folder / "teacher"), **train},
        "cache": {"tokens_per_batch": 256},
        "calibrate": {"bootstrap": 10},
        "distill": {"model_name_or_path": str(folder / "student"), **train},
        "arms": {"fine_tuned": {"trainer": "sft"}, "first": {}},
        "evaluate": {"bootstrap": 10},
    }
    if change is not None:
        change(folder, recipe)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def write_model(folder, tokenizer=None, **config):
    tokenizer = tokenizer or build_tokenizer()
    build_model(**{"vocab_size": len(tokenizer), **config}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder, split, rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


# Ways to break a recipe or its files


def rows(split, change):
    """Replace the rows of a split by `change(rows, folder)`."""
    return lambda folder, recipe: write_rows(folder, split, change(read_rows(folder, split), folder))


def change_row(split, index, **columns):
    return rows(split, lambda old, _: [row | (columns if i == index else {}) for i, row in enumerate(old)])


def share_rows(first, second, count=3):
    return rows(second, lambda old, folder: old[count:] + read_rows(folder, first)[:count])


def set_to(**sections):
    return lambda folder, recipe: [recipe[name].update(values) for name, values in sections.items()]


def films(**changes):
    return lambda folder, recipe: recipe["datasets"]["test"]["films"].update(changes)


def student(**config):
    return lambda folder, recipe: write_model(folder / "student", **config)


def all_of(*changes):
    return lambda folder, recipe: [change(folder, recipe) for change in changes]


def two_token_choices(folder, recipe):
    set_to(task={"choices": ["good film", "bad film"]}, cache={"support": "choices"})(folder, recipe)
    for split in SPLITS:
        rows(split, lambda old, _: [{**row, "label": f"{row['label']} film"} for row in old])(folder, recipe)


def other_vocabulary(folder, recipe):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["surprise"])
    write_model(folder / "student", tokenizer)


def first_token_added(folder, recipe):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    write_model(folder / "student", tokenizer)


def conversations(teacher=CHAT, student=CHAT):
    def change(folder, recipe):
        for name, template in (("teacher", teacher), ("student", student)):
            tokenizer = build_tokenizer()
            tokenizer.chat_template = template
            write_model(folder / name, tokenizer)
        for split in SPLITS:
            turns = [(("user", row["text"]), ("assistant", row["label"])) for row in read_rows(folder, split)]
            said = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
            write_rows(folder, split, said)
        recipe["task"] = {"max_length": 60}

    return change


def mixture_of_experts(folder, recipe):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=27, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.001, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "student")


def encoder_only(folder, recipe):
    from transformers import T5Config

    sizes = {"vocab_size": 27, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16}
    T5Config(**sizes).save_pretrained(folder / "student")


def encoder_as_decoder(folder, recipe):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=27, is_decoder=True, **sizes)).save_pretrained(folder / "student")


def moved_base(folder, recipe):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(folder / "moved")
    model.save_pretrained(folder / "given")
    build_tokenizer().save_pretrained(folder / "given")
    recipe["cache"]["teacher"] = str(folder / "given")


def add_line(split, line):
    def change(folder, recipe):
        with open(folder / f"{split}.jsonl", "a") as file:
            file.write(line + "\n")

    return change


THINKS = CHAT.replace("m['content']", "m['content'] if m['role'] == 'user' else 'think'")
OTHER = CHAT.replace("} : ", "} : think : ").replace("assistant : ", "assistant : think : ")
UNLABELLED = rows("transfer", lambda old, _: [{"text": row["text"]} for row in old])
# name -> (what breaks the recipe, words of the place, of the value, of the remedy)
CASES = {
    "choices of two tokens under support: choices": (two_token_choices, "task.choices", "good film", "top_k"),
    "rows that learn more than a choice": (
        all_of(set_to(cache={"support": "choices"}), change_row("train", 3, text="good . Sentiment : good"),
               set_to(task={"prompt": "{text} :", "completion": " {label} film"})),
        "datasets.train", "film", "support: top_k",
    ),
    "validation rows of train": (share_rows("train", "validation"), "datasets.validation", "3 of its", "of its own"),
    "transfer rows of train": (share_rows("train", "transfer"), "datasets.transfer", "3 of its", "of its own"),
    "test rows of train": (share_rows("train", "test"), "datasets.test.films", "3 of its 30", "allow_overlap"),
    "test rows of transfer": (share_rows("transfer", "test"), "datasets.transfer", "3 of its 30", "allow_overlap"),
    "test rows of validation": (share_rows("validation", "test"), "datasets.validation", "3 of its", "allow_overlap"),
    "a student of another vocabulary": (other_vocabulary, "distill.model_name_or_path", "student", "share one"),
    "a student that adds a first token": (first_token_added, "distill.model_name_or_path", "<pad>", "tokenizer"),
    "a student of another chat template": (conversations(student=OTHER), "distill", "datasets.train", "tokenizer"),
    "a template that prints the date": (conversations(*[DATED] * 2), "chat_template_kwargs", "", "date_string"),
    "answers that begin alike": (
        all_of(conversations(*[THINKS] * 2), set_to(calibrate={"positions": "answer"})),
        "calibrate.positions", "120 of 120", "enable_thinking: false",
    ),
    "a mixture of experts as student": (mixture_of_experts, "router_aux_loss_coef", "0.001", "0.0"),
    "a label of train that is no choice": (change_row("train", 3, label="fine"), "train: row 3", "fine", "add"),
    "a label of validation that is no choice": (
        change_row("validation", 7, label="fine"), "datasets.validation: row 7", "fine", "add it to the choices",
    ),
    "a label of a test set that is no choice": (
        change_row("test", 2, label=" good"), "datasets.test.films: row 2", "' good'", "remove the spaces",
    ),
    "a test row that is too long": (change_row("test", 5, text=LONG), "test.films: row 5", "max_length", "shorten"),
    "a row to distil on that is too long": (change_row("transfer", 39, text=LONG), "row 39", "64", "max_length"),
    "a missing value in a test row": (change_row("test", 4, text=None), "test.films: row 4", "{text}", "drop the row"),
    "a test set without a column": (
        films(task={"prompt": "Film : {title} Sentiment :"}), "datasets.test.films", "title", "columns",
    ),
    "a test set whose choices begin one another": (
        films(task={"choices": ["good", "good film", "bad"]}), "datasets.test.films", "good film", "append_eos",
    ),
    "a choice that the tokenizer does not know": (
        set_to(task={"choices": ["good", "bad", "mediocre"]}), "task.choices", "mediocre", "another word",
    ),
    "a test file that is not JSON": (add_line("test", '{"text": "a film", '), "test.jsonl, line 31", "JSON", "line"),
    "a test file without rows": (rows("test", lambda *_: []), "films", "empty", "write"),
    "rows to distil on without labels or choices": (
        all_of(UNLABELLED, set_to(task={"choices": None})), "transfer", "choices", "list them",
    ),
    "a column that is not there": (films(columns={"text": "review"}), "datasets.test", "review", "choose among"),
    "a tracker that is not installed": (
        set_to(distill={"report_to": "dvclive"}), "arms.first.report_to", "dvclive", "pip install",
    ),
    "an attention that is not installed": (
        set_to(distill={"attn_implementation": "flash_attention_2"}), "attn_implementation", "flash", "pip install",
    ),
    "a student without weights": (
        lambda folder, _: (folder / "student" / "model.safetensors").unlink(),
        "distill.model_name_or_path", "student", "save_pretrained",
    ),
    "a student that is no causal language model": (encoder_only, "distill.model_name_or_path", "T5", "causal"),
    "a student whose logits are not its head's": (encoder_as_decoder, "distill.model", "nats", "another architecture"),
    "a student made for shorter rows": (student(max_position_embeddings=12), "task.max_length", "12", "lower"),
    "a student with fewer tokens than its tokenizer": (student(vocab_size=20), "student has 20", "27", "tokenizer"),
    "an adapter on layers that the student has not": (
        set_to(distill={"use_peft": True, "lora_target_modules": ["c_attn"]}), "distill.first", "c_attn", "modules",
    ),
    "a given teacher whose base was moved": (moved_base, "cache.teacher", "moved", "base"),
    "a student that nobody downloaded": (
        set_to(distill={"model_name_or_path": "owner/absent"}), "distill.model", "owner/absent", "HF_HUB_OFFLINE",
    ),
    "bfloat16 without an accelerator": (
        set_to(distill={"bf16": True, "use_cpu": False}), "arms.first.bf16", "true", "bf16: false",
    ),
    "too few rows for one batch": (
        set_to(distill={"dataloader_drop_last": True, "per_device_train_batch_size": 64}),
        "arms.first.dataloader_drop_last", "40 rows", "write false",
    ),
    "an output folder that is a file": (
        lambda folder, _: (folder / "runs").write_text(""), "output_dir", "runs", "another output_dir",
    ),
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """`first-trl run` (or another command) without stages: (exit status, output, the stages it would have started)."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")

    def run(recipe, *options, name="run"):
        started = []
        monkeypatch.setattr(command, "launch", lambda stage, *rest: started.append((stage, *rest)) or 3)
        status = command.main([name, str(recipe), *options])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, started

    return run


def problems(printed):
    return [line for line in printed.splitlines() if line.startswith("  - ")]


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_that_would_fail_late_is_refused_before_any_stage(name, run, tmp_path):
    change, *words = CASES[name]
    status, printed, started = run(write_recipe(tmp_path, change))
    assert started == [] and status == 2, printed
    assert any(all(word in line for word in words) for line in problems(printed)), printed


def test_a_sound_recipe_is_started_without_a_word(run, tmp_path):
    status, printed, started = run(write_recipe(tmp_path))
    assert status == 3 and [stage for stage, *_ in started] == ["sft"]
    assert "Problems" not in printed and "Warnings" not in printed


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"model_type": "llamo"}',
        b'{"model_type": "llama", "hidden_size": ',
        b'{"model_type": "llama", "hidden_size": "wide"}', b'{"model_type": "llama", "num_attention_heads": 0}',
        b'{"model_type": "llama", "num_hidden_layers": 100000000}', b'{"model_type": "llama", "hidden_size": 0}',
    ],
)  # fmt: skip
def test_a_broken_config_is_one_line_at_once(content, run, tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "student" / "config.json").write_bytes(content)
    status, printed, started = run(recipe)
    said = {line.partition(": ")[2] for line in problems(printed) if line.startswith("  - distill")}
    assert (status, started, len(said)) == (2, [], 1) and "Traceback" not in printed, printed


def test_every_problem_is_found_at_once_and_rows_are_counted(run, tmp_path):
    fine = rows("train", lambda old, _: [row | ({} if i % 8 else {"label": "fine"}) for i, row in enumerate(old)])
    tracker = set_to(distill={"report_to": ["dvclive"]})
    broken = change_row("train", 3, text=LONG), share_rows("validation", "test"), other_vocabulary, tracker
    status, printed, _ = run(write_recipe(tmp_path, all_of(fine, *broken)))
    for words in ("5 of 40 rows (0, 8, 16, ...), the first", "train: row 3", "3 of its 30", "share one", "dvclive"):
        assert words in printed
    assert status == 2 and len(problems(printed)) == 6  # the tracker is missed by both arms


def test_rows_that_the_recipe_lets_go_are_counted_and_many_of_them_are_a_warning(run, tmp_path):
    def let_go(folder, recipe):
        recipe["task"]["too_long"] = "drop"
        recipe["datasets"]["validation"]["bad_rows"] = "drop"
        recipe["datasets"]["test"]["films"]["overlap"] = "drop"

    bad = [change_row("validation", number, label="fine") for number in range(8)]
    changes = all_of(let_go, share_rows("transfer", "test"), change_row("train", 3, text=LONG), *bad)
    _, printed, started = run(write_recipe(tmp_path, changes))
    lost, _, warned = printed.partition("Warnings")
    assert len(started) == 1 and "datasets.train: of 40 rows 1 dropped (too long)" in lost
    assert "3 of its 30 prompts are in datasets.transfer too (rows 27, 28, 29); they are dropped" in lost
    assert "datasets.validation: of 120 rows 8 dropped" in warned


def test_a_second_look_reads_nothing_and_a_change_of_data_models_or_settings_looks_again(run, tmp_path, monkeypatch):
    from first_trl import checks

    looks, look = [], checks._look
    monkeypatch.setattr(checks, "_look", lambda *arguments: looks.append(1) or look(*arguments))
    recipe = write_recipe(tmp_path)
    run(recipe), run(recipe), run(recipe, "--stages", "cache")
    assert len(looks) == 1
    change_row("test", 2, text="a good film .")(tmp_path, None)
    run(recipe)
    other_vocabulary(tmp_path, None)
    run(recipe)
    run(recipe, "--task.max_length=39")
    assert len(looks) == 4


def test_a_stage_by_itself_checks_what_concerns_it_and_checks_can_be_skipped(run, tmp_path):
    recipe = write_recipe(tmp_path, change_row("test", 2, label="fine"))
    assert run(recipe, name="cache")[2]
    _, printed, started = run(recipe, name="evaluate")
    assert not started and "datasets.test.films: row 2" in printed
    ((_, arguments, _),) = run(recipe, "--skip_checks", name="evaluate")[2]
    assert "--skip_checks" in arguments  # the stage writes it into its record


def test_room_on_the_disk_is_looked_at(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    _, printed, started = run(write_recipe(tmp_path))
    assert "output_dir" in printed and "has room for 0.0 GB" in printed and started == []

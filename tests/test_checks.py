"""What would fail late is refused first, every problem at once: with its place, its value and the remedy."""

import json
import random
import shutil

import pytest
import yaml

from tests.tiny import WORDS, build_model, build_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


DATED = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }} "
DATED += CHAT


def write_recipe(folder, change=None):
    """A recipe that trains, caches, distils and reports on tiny files; `change(folder, recipe)` breaks it."""
    for name in ("teacher", "student"):
        write_model(folder / name)
    for seed, (split, count) in enumerate({"train": 40, "transfer": 40, "validation": 120, "test": 30}.items()):
        dice = random.Random(seed)
        texts = (" ".join(dice.choices(WORDS.split()[:-6], k=dice.randint(4, 12))) for _ in range(count))
        write_rows(folder, split, [{"text": text, "label": dice.choice(["good", "bad"])} for text in texts])
    train = {"max_steps": 2, "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none"}
    source = {split: {"path": "json", "data_files": str(folder / f"{split}.jsonl")} for split in SPLITS}
    recipe = {
        "name": "checked",
        "output_dir": str(folder / "runs"),
        "task": {
            "prompt": "Review : {text} Sentiment :",
            "completion": " {label}",
            "choices": ["good", "bad"],
            "append_eos": False,
            "max_length": 40,
        },
        "datasets": {**{split: source[split] for split in SPLITS[:3]}, "test": {"films": source["test"]}},
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


SPLITS = ("train", "transfer", "validation", "test")


def write_model(folder, tokenizer=None, **config):
    tokenizer = tokenizer or build_tokenizer()
    build_model(**{"vocab_size": len(tokenizer), **config}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder, split, rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def change_row(split, index, **columns):
    def change(folder, recipe):
        rows = read_rows(folder, split)
        rows[index] |= columns
        write_rows(folder, split, rows)

    return change


def share_rows(first, second, count=3):
    return lambda folder, recipe: write_rows(
        folder, second, read_rows(folder, second)[count:] + read_rows(folder, first)[:count]
    )


def set_to(**sections):
    return lambda folder, recipe: [recipe[name].update(values) for name, values in sections.items()]


def two_token_choices(folder, recipe):
    recipe["task"]["choices"] = ["good film", "bad film"]
    recipe["cache"]["support"] = "choices"
    for split in SPLITS:
        write_rows(folder, split, [{**row, "label": f"{row['label']} film"} for row in read_rows(folder, split)])


def unlabelled_without_choices(folder, recipe):
    recipe["task"]["choices"] = None
    write_rows(folder, "transfer", [{"text": row["text"]} for row in read_rows(folder, "transfer")])


def other_vocabulary(folder, recipe):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["surprise"])
    write_model(folder / "student", tokenizer)


def first_token_added(folder, recipe):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    write_model(folder / "student", tokenizer)


def conversations(teacher=CHAT, student=CHAT, **task):
    def change(folder, recipe):
        for name, template in (("teacher", teacher), ("student", student)):
            tokenizer = build_tokenizer()
            tokenizer.chat_template = template
            write_model(folder / name, tokenizer)
        for split in SPLITS:
            rows = [
                {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
                for r in read_rows(folder, split)
            ]
            write_rows(folder, split, rows)
        recipe["task"] = {"max_length": 60, **task}

    return change


def forced_answers(folder, recipe):
    thinks = CHAT.replace("m['content']", "m['content'] if m['role'] == 'user' else 'think'")
    conversations(thinks, thinks)(folder, recipe)
    recipe["calibrate"]["positions"] = "answer"


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

    T5Config(vocab_size=27, d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16).save_pretrained(
        folder / "student"
    )


def encoder_as_decoder(folder, recipe):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=27, is_decoder=True, **sizes)).save_pretrained(folder / "student")


def without_weights(folder, recipe):
    (folder / "student" / "model.safetensors").unlink()


def broken_config(folder, recipe):
    (folder / "student" / "config.json").write_text('{"model_type": "llama", "hidden_size": ')


def moved_base(folder, recipe):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(folder / "moved")
    shutil.rmtree(folder / "student")
    model.save_pretrained(folder / "given")
    build_tokenizer().save_pretrained(folder / "given")
    write_model(folder / "student")
    recipe["cache"]["teacher"] = str(folder / "given")


def add_line(split, line):
    return lambda folder, recipe: (folder / f"{split}.jsonl").write_text(
        (folder / f"{split}.jsonl").read_text() + line + "\n"
    )


def file_in_the_way(folder, recipe):
    (folder / "runs").write_text("")


LONG = "film " * 60
# name -> (what breaks the recipe, words of the place, of the value, of the remedy)
CASES = {
    "choices of two tokens under support: choices": (two_token_choices, "task.choices", "good film", "top_k"),
    "validation rows of train": (share_rows("train", "validation"), "datasets.validation", "3 of its", "of its own"),
    "transfer rows of train": (share_rows("train", "transfer"), "datasets.transfer", "3 of its", "of its own"),
    "test rows of train": (share_rows("train", "test"), "datasets.test.films", "3 of its 30", "allow_overlap"),
    "test rows of transfer": (share_rows("transfer", "test"), "datasets.transfer", "3 of its 30", "allow_overlap"),
    "test rows of validation": (share_rows("validation", "test"), "datasets.validation", "3 of its", "allow_overlap"),
    "a student of another vocabulary": (other_vocabulary, "distill.model_name_or_path", "student", "share one"),
    "a student that adds a first token": (first_token_added, "distill.model_name_or_path", "<pad>", "tokenizer"),
    "a student of another chat template": (
        conversations(student=CHAT.replace("} : ", "} : think : ").replace("assistant : ", "assistant : think : ")),
        "distill.model_name_or_path", "datasets.train", "tokenizer",
    ),
    "a template that prints the date": (
        conversations(*[DATED] * 2), "chat_template_kwargs", "", "date_string",
    ),
    "answers that begin alike": (forced_answers, "calibrate.positions", "120 of 120", "enable_thinking: false"),
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
        set_to(datasets={"test": {"films": {"path": "json", "data_files": "FOLDER/test.jsonl",
                                            "task": {"prompt": "Film : {title} Sentiment :"}}}}),
        "datasets.test.films", "title", "columns",
    ),
    "a test set whose choices begin one another": (
        set_to(datasets={"test": {"films": {"path": "json", "data_files": "FOLDER/test.jsonl",
                                            "task": {"choices": ["good", "good film", "bad"]}}}}),
        "datasets.test.films", "good film", "append_eos",
    ),
    "a choice that the tokenizer does not know": (
        set_to(task={"choices": ["good", "bad", "mediocre"]}), "task.choices", "mediocre", "another word",
    ),
    "a test file that is not JSON": (add_line("test", '{"text": "a film", '), "test.jsonl, line 31", "JSON", "line"),
    "a test file without rows": (lambda folder, recipe: write_rows(folder, "test", []), "films", "empty", "write"),
    "rows to distil on without labels or choices": (unlabelled_without_choices, "transfer", "choices", "list them"),
    "a column that is not there": (
        set_to(datasets={"test": {"films": {"path": "json", "data_files": "FOLDER/test.jsonl",
                                            "columns": {"text": "review"}}}}),
        "datasets.test", "review", "choose among",
    ),
    "a tracker that is not installed": (
        set_to(distill={"report_to": "dvclive"}), "arms.first.report_to", "dvclive", "pip install",
    ),
    "an attention that is not installed": (
        set_to(distill={"attn_implementation": "flash_attention_2"}), "attn_implementation", "flash", "pip install",
    ),
    "a student without weights": (without_weights, "distill.model_name_or_path", "student", "save_pretrained"),
    "a student whose config.json is cut": (broken_config, "distill.model_name_or_path", "student", "fetch"),
    "a student that is no causal language model": (encoder_only, "distill.model_name_or_path", "T5", "causal"),
    "a student whose logits are not its head's": (encoder_as_decoder, "distill.model", "nats", "another architecture"),
    "a student made for shorter rows": (
        lambda folder, recipe: write_model(folder / "student", max_position_embeddings=12),
        "task.max_length", "12", "lower",
    ),
    "a student with fewer tokens than its tokenizer": (
        lambda folder, recipe: write_model(folder / "student", vocab_size=20), "student has 20", "27", "tokenizer",
    ),
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
    "an output folder that is a file": (file_in_the_way, "output_dir", "runs", "another output_dir"),
}  # fmt: skip


def put_folder(recipe, folder):
    recipe.write_text(recipe.read_text().replace("FOLDER", str(folder)))
    return recipe


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """`first-trl run` without stages: (exit status, what it printed, the stages that it would have started)."""
    import datasets

    from first_trl import __main__ as command

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")

    def run(recipe, *options):
        started = []
        monkeypatch.setattr(command, "launch", lambda stage, *rest: started.append(stage) or 3)
        status = command.main(["run", str(recipe), *options])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, started

    return run


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_that_would_fail_late_is_refused_before_any_stage(name, run, tmp_path):
    change, place, value, remedy = CASES[name]
    status, printed, started = run(put_folder(write_recipe(tmp_path, change), tmp_path))
    problems = [line for line in printed.splitlines() if line.startswith("  - ")]
    assert started == [] and status == 2, printed
    assert any(all(word in line for word in (place, value, remedy)) for line in problems), printed


def test_a_sound_recipe_is_started_without_a_word(run, tmp_path):
    status, printed, started = run(write_recipe(tmp_path))
    assert (status, started) == (3, ["sft"])
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
    problems = [line for line in printed.splitlines() if line.startswith("  - distill")]
    assert (status, started, len({line.partition(": ")[2] for line in problems})) == (2, [], 1), printed
    assert "Traceback" not in printed


def test_every_problem_is_found_at_once_and_rows_are_counted(run, tmp_path):
    def change(folder, recipe):
        rows = read_rows(folder, "train")
        write_rows(
            folder, "train", [{**row, "label": "fine" if i % 8 == 0 else row["label"]} for i, row in enumerate(rows)]
        )
        change_row("train", 3, text=LONG)(folder, recipe)
        share_rows("validation", "test")(folder, recipe)
        other_vocabulary(folder, recipe)
        recipe["distill"]["report_to"] = ["dvclive"]

    status, printed, _ = run(write_recipe(tmp_path, change))
    for words in ("5 of 40 rows (0, 8, 16, ...), the first", "train: row 3", "3 of its 30", "share one", "dvclive"):
        assert words in printed
    assert status == 2 and printed.count("  - ") == 6  # the tracker is missed by both arms


def test_rows_that_the_recipe_lets_go_are_counted_and_many_of_them_are_a_warning(run, tmp_path):
    def change(folder, recipe):
        recipe["task"]["too_long"] = "drop"
        recipe["datasets"]["validation"]["bad_rows"] = "drop"
        recipe["datasets"]["test"]["films"]["overlap"] = "drop"
        share_rows("transfer", "test")(folder, recipe)
        change_row("train", 3, text=LONG)(folder, recipe)
        for number in range(8):
            change_row("validation", number, label="fine")(folder, recipe)

    status, printed, started = run(write_recipe(tmp_path, change))
    assert (status, started) == (3, ["sft"])
    assert "datasets.train: of 40 rows 1 dropped (too long)" in printed.partition("Warnings")[0]
    assert "3 of its 30 prompts are in datasets.transfer too (rows 27, 28, 29); they are dropped" in printed
    assert "datasets.validation: of 120 rows 8 dropped" in printed.partition("Warnings")[2]


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


def test_a_stage_by_itself_checks_what_concerns_it_and_checks_can_be_skipped(run, tmp_path, monkeypatch, capsys):
    from first_trl import __main__ as command

    def change(folder, recipe):
        change_row("test", 2, label="fine")(folder, recipe)

    recipe = write_recipe(tmp_path, change)
    started = []
    monkeypatch.setattr(command, "launch", lambda stage, arguments, *rest: started.append((stage, arguments)) or 0)
    assert command.main(["cache", str(recipe)]) == 0
    assert command.main(["evaluate", str(recipe)]) == 2
    assert "datasets.test.films: row 2" in capsys.readouterr().err
    assert command.main(["evaluate", str(recipe), "--skip_checks"]) == 0
    assert [stage for stage, _ in started] == ["cache", "evaluate"]
    assert "--skip_checks" in started[-1][1]  # the stage writes it into its record


def test_room_on_the_disk_and_packages_are_looked_at(run, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    _, printed, started = run(write_recipe(tmp_path))
    assert "output_dir" in printed and "has room for 0.0 GB" in printed and started == []

"""A small caching job as a user has one: a teacher in a folder, rows in files, a recipe. No test is here."""

import json
import random

from tests.tiny import WORDS, build_model, build_tokenizer


def write_recipe(folder, *, rows=40, rows_per_shard=4, vocab_size=None, model=None, **sections):
    """A folder with `teacher/`, `train.jsonl`, `validation.jsonl` and `recipe.yaml`; returns the recipe's path.

    Args:
        rows: of train; validation has three more.
        model: settings of the teacher, for `tests.tiny.build_model`.
        sections: sections of the recipe to add to or replace.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    build_model(vocab_size or len(tokenizer), **(model or {})).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for seed, (role, count) in enumerate({"train": rows, "validation": rows + 3, "test": 2}.items()):
        write_rows(folder / f"{role}.jsonl", count, seed)

    def source(role):
        return {"path": "json", "data_files": str(folder / f"{role}.jsonl")}

    cache = {"teacher": str(folder / "teacher"), "rows_per_shard": rows_per_shard, "tokens_per_batch": 256}
    content = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "task": {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "max_length": 60},
        "datasets": {role: source(role) for role in ("train", "validation")} | {"test": {"test": source("test")}},
        "cache": {**cache, **sections.pop("cache", {})},
        "distill": {
            "model_name_or_path": str(folder / "teacher"),
            "dtype": "float32",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "max_steps": 1,
        },
        "arms": {"first": {"recalibration_method": "none"}},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def write_rows(file, count, seed):
    """Rows of 1 to 30 words of the tiny tokenizer, each with a label."""
    dice, words = random.Random(seed), WORDS.split()
    rows = (
        {"text": " ".join(dice.choices(words, k=dice.randint(1, 30))), "label": dice.choice(["good", "bad"])}
        for _ in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

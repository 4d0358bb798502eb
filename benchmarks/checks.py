"""The first minute, timed: a recipe's rows checked once and again, beside the plain tokenisation of the same rows.

    python -m benchmarks.checks [--rows 200000] [--tokens 40]

Prints seconds, the ratio to plain tokenisation, and the peak memory of this process and of those that it starts.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_job(folder: Path, rows: int, tokens: int) -> Path:
    """A recipe over `rows` rows of about `tokens` tokens of the demo's tokenizer, spread over its splits."""
    import yaml

    from first_trl.demo import models, task

    dice, seen = random.Random(0), set()
    words = [word for text in models.unlabelled_texts(400, 0, set()) for word in text.split()]
    tokenizer = models.build_tokenizer([" ".join(dice.choices(words, k=60)) for _ in range(500)])
    for name in ("teacher", "student"):
        models.build_model(models.BaseModel(64, 1, 0), tokenizer, 0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shares = {"train": rows // 2, "transfer": rows // 4, "validation": rows // 8, "test": rows // 8}
    for split, count in shares.items():
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                text = f"{len(seen)} " + " ".join(dice.choices(words, k=tokens * 9 // 20))
                seen.add(text)
                file.write(json.dumps({"text": text, "label": dice.choice(task.TEAMS)}) + "\n")
    source = {split: {"path": "json", "data_files": str(folder / f"{split}.jsonl")} for split in shares}
    train = {"dtype": "float32", "bf16": False, "use_cpu": True, "max_steps": 1}
    recipe = {
        "name": "big",
        "output_dir": str(folder / "runs"),
        "task": {
            "prompt": "Ticket: {text}\nTeam:",
            "completion": " {label}",
            "choices": task.TEAMS,
            "max_length": 128,
        },
        "datasets": {
            **{name: source[name] for name in ("train", "transfer", "validation")},
            "test": {"test": source["test"]},
        },
        "sft": {"model_name_or_path": str(folder / "teacher"), **train},
        "distill": {"model_name_or_path": str(folder / "student"), **train},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def timed(code: str, folder: Path) -> tuple[float, str]:
    """Seconds of a Python process of its own, imports included, and what it printed."""
    started = time.monotonic()
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "arrow"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.monotonic() - started, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_job(folder, options.rows, options.tokens)
        plain = f"""
import json, glob
from transformers import AutoTokenizer
tokenizer, count = AutoTokenizer.from_pretrained({str(folder / "teacher")!r}), 0
for file in glob.glob({str(folder)!r} + "/*.jsonl"):
    texts = ["Ticket: " + (row := json.loads(line))["text"] + "\\nTeam: " + row["label"] for line in open(file)]
    for start in range(0, len(texts), 1000):
        count += sum(map(len, tokenizer(texts[start : start + 1000])["input_ids"]))
print(count)
"""
        check = f"""
import sys
from first_trl.checks import passed
from first_trl.recipe import load_recipe
from first_trl.constants import STAGES
sys.exit(0 if passed(load_recipe({str(recipe)!r}), STAGES[:-1]) else 1)
"""
        seconds, printed = timed(plain, folder)
        print(
            f"{options.rows:,} rows, {int(printed.split()[0]) / options.rows:.0f} tokens each, {os.cpu_count()} cores"
        )
        print(f"plain tokenisation, one process   {seconds:6.1f} s")
        for title in ("checked for the first time", "checked again"):
            taken, _ = timed(check, folder)
            print(f"{title:<32}  {taken:6.1f} s   {taken / seconds:.2f} of plain tokenisation")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"peak memory of the largest process {peak:.2f} GB")


if __name__ == "__main__":
    main()

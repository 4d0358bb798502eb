"""What `cache.py` measures: teachers and rows, the cache and two loops without it, the stage in its own process.

The loops stand for what people write by hand: (a) as short as it can be, (b) as the paper's released script has it.
"""

import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

DATA = Path(os.environ.get("FIRST_DATA", "../shared"))
K = 5
BLOCK = 512  # tokens that the paper's released script has in every row


def random_teacher(vocab_size: int, hidden_size: int, layers: int, spread: float):
    """A Llama with random weights; `spread` makes its distributions peaked, as a trained model's are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        tie_word_embeddings=True,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config).eval()


def random_rows(count: int, vocab_size: int, supervised: str) -> list[dict]:
    """Tokenised rows of 16 to 160 tokens, most of them short, as texts are; all tokens supervised, or the last."""
    import numpy as np

    dice, rows = np.random.default_rng(0), []
    for length in np.clip(np.exp(dice.normal(3.8, 0.5, count)), 16, 160).astype(int):
        ids = dice.integers(0, vocab_size, length).tolist()
        rows.append(
            {"input_ids": ids, "labels": [-100] + ids[1:] if supervised == "all" else [-100] * (length - 1) + ids[-1:]}
        )
    return rows


def cache_of(folder: Path, model, rows, encode, vocab_limit: int, rows_per_shard: int = 1024):
    """Write a cache of `rows` to `folder`, as the stage does; what it is made from is left out of the manifest."""
    from first_trl.cache.identity import library_versions
    from first_trl.cache.writer import CacheWriter, write_shards
    from first_trl.scoring import teacher_rows

    identity = {"teacher": {}, "dataset": {}, "task": {}, "library_versions": library_versions()}
    identity |= {"tokenizer_sha256": "", "chat_template_sha256": None}
    score = partial(teacher_rows, model, top_k=K, tokens_per_batch=8192, vocab_limit=vocab_limit)
    with CacheWriter(folder, identity, top_k=K, rows_per_shard=rows_per_shard).hold() as writer:
        count = write_shards(
            writer, rows, encode, lambda examples, progress: score(examples, progress=progress), rank=0
        )
        writer.finish(count)


def cached(model, rows, folder: Path) -> None:
    cache_of(folder / "cache", model, rows, lambda row, _: row, 49_152, rows_per_shard=128)


def bare_loop(model, rows: list[dict], folder: Path) -> None:
    """(a): the batches that the cache makes, every position's logits, and their five largest."""
    import torch

    from first_trl.scoring import length_batches

    with torch.inference_mode():
        for start in range(0, len(rows), 128):
            shard = [torch.tensor(row["input_ids"]) for row in rows[start : start + 128]]
            for indices in length_batches([len(ids) for ids in shard], 8192):
                ids = torch.nn.utils.rnn.pad_sequence([shard[i] for i in indices], batch_first=True)
                lengths = torch.tensor([len(shard[i]) for i in indices])
                mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
                best = model(input_ids=ids, attention_mask=mask).logits.topk(K)
                best.indices.tolist(), best.values.tolist()


def batch_of_one(model, rows: list[dict], folder: Path, block: int = 0) -> None:
    """(b), (c): a full log_softmax per row; per position a topk of its own, six reads, and a line of text in the end.

    Args:
        block: tokens to pad every row to; what is padding is computed and written as well.
    """
    import torch

    with torch.inference_mode():
        for row in rows:
            padding = max(block - len(row["input_ids"]), 0)
            text = row["input_ids"] + [0] * padding
            log_probs = model(torch.tensor([text])).logits.log_softmax(-1)[0]
            tops, chosen = [], []
            for position in log_probs:
                tokens = position.topk(K).indices.tolist()
                chosen.append(position[tokens[0]].item())
                tops.append({str(token): position[token].item() for token in tokens})
            mask = [1] * len(row["input_ids"]) + [0] * padding
            with open(folder / "teacher.jsonl", "a") as file:
                file.write(json.dumps({"text": text, "attention_mask": mask, "top_log_probs": tops}) + "\n")


def memory_recipe(folder: Path) -> Path:
    import yaml
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "reviews-teacher-base")
    random_teacher(len(tokenizer), 32, 1, 0.2).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    reviews = (DATA / "data" / "reviews" / "train.jsonl").read_text().splitlines()
    for role, count in {"train": 50_000, "validation": 1_000, "test": 10}.items():
        rows = [reviews[i % len(reviews)] for i in range(count)]
        (folder / f"{role}.jsonl").write_text("\n".join(rows) + "\n")
    sources = {role: {"path": "json", "data_files": str(folder / f"{role}.jsonl")} for role in ("train", "validation")}
    recipe = {
        "name": "memory",
        "task": {"prompt": "Review: {text}\nSentiment:", "completion": " {label}", "max_length": 160},
        "datasets": {**sources, "test": {"test": {"path": "json", "data_files": str(folder / "test.jsonl")}}},
        "cache": {"teacher": str(folder / "teacher"), "rows_per_shard": 256},
        "distill": {"model_name_or_path": str(folder / "teacher")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def stage_in_a_process(recipe: Path, rows: int, streaming: bool) -> dict[str, float]:
    """Peak bytes and tokens per second of one run of the stage."""
    overrides = [f"--datasets.train.max_rows={rows}", f"--streaming={str(streaming).lower()}"]
    overrides += [f"--output_dir={recipe.parent / f'{rows}-{streaming}'}"]
    command = [sys.executable, __file__, str(recipe), *overrides]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(recipe.parent / f"{rows}-{streaming}-data")}
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def stage(arguments: list[str]) -> None:
    """One run of the cache stage in this process; prints what `stage_in_a_process` returns."""
    from first_trl.cache import writer as cache_writer
    from first_trl.stages import cache

    write_shards, seconds, tokens = cache_writer.write_shards, [], []

    def timed(writer, dataset, encode, run_teacher, **options):
        def counted(examples, progress):
            tokens.append(sum(len(row["input_ids"]) for row in examples))
            return run_teacher(examples, progress)

        start = time.perf_counter()
        count = write_shards(writer, dataset, encode, counted, **options)
        seconds.append(time.perf_counter() - start)
        return count

    cache_writer.write_shards = timed
    cache.main(arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    print(json.dumps({"peak": peak, "rate": sum(tokens) / sum(seconds)}))


if __name__ == "__main__":
    stage(sys.argv[1:])

"""What a teacher cache costs: bytes per supervised position, tokens per second, and memory as the dataset grows.

    python benchmarks/cache.py                             # everything; minutes on two CPU cores
    python benchmarks/cache.py --parts bytes memory        # two of its three tables
    python benchmarks/cache.py --clock process --threads 1 # a speed that other work on the machine hardly touches

The reviews and their teacher are read from the folder FIRST_DATA (default ../shared). Written to
benchmarks/results/cache-cpu.md. Speeds are medians over rounds in which every arm runs once over the same rows; a
ratio is the median of the ratios within a round.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from cache_jobs import (
    DATA,
    K,
    bare_loop,
    batch_of_one,
    cache_of,
    cached,
    memory_recipe,
    random_rows,
    random_teacher,
    stage_in_a_process,
)

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("first-trl", "torch", "transformers", "datasets", "pyarrow")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


# Bytes


def table_of_bytes() -> list[str]:
    """Bytes per supervised position of what the teacher says, K = 5, in four formats and two vocabularies."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_trl.config import DatasetConfig, TaskConfig
    from first_trl.data import encode_row, load_split

    path = DATA / "models" / "reviews-teacher-base"
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = TaskConfig(prompt="", completion="{text}", max_length=160)
    reviews = load_split(
        DatasetConfig(path="json", data_files=str(DATA / "data" / "reviews" / "train.jsonl")), "train"
    )
    teacher = AutoModelForCausalLM.from_pretrained(path).eval()
    random = Dataset.from_list(random_rows(1024, 151_936, "all"))
    cases = {
        f"reviews, train: {len(reviews):,} rows, all tokens, V = {len(tokenizer):,}": (
            teacher,
            reviews,
            partial(encode_row, task=task, tokenizer=tokenizer),
            len(tokenizer),
        ),
        "random weights, V = 151,936": (random_teacher(151_936, 64, 1, 0.25), random, lambda row, _: row, 151_936),
    }
    names = ("positions", "this cache", "bit-packed", "Parquet, int64 and float32", "JSONL")
    lines = ["## Bytes on disk per supervised position", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for title, (model, rows, encode, vocab_size) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            sizes = sizes_of(Path(folder), model, rows, encode, vocab_size)
        cells = [f"{sizes['positions']:,}"] + [f"{sizes[name] / sizes['positions']:.1f}" for name in names[1:]]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "What the teacher says alone: 5 ids, 5 log-probabilities, the tail where there is one; not the tokens. "
        "*This cache*: the three `teacher_*` columns. *Bit-packed*, computed: 5 x (ceil(log2 V) bits of id + 16 of "
        "float16) + 32 of tail. *Parquet*: the same three columns as lists of int64 and float32, pyarrow's defaults "
        "(dictionary, snappy). *JSONL*: per position an object of 5 ids and log-probabilities as text, as the paper's "
        "released script writes; it has no tail.",
        "",
    ]


def sizes_of(folder: Path, model, rows, encode, vocab_size: int) -> dict[str, float]:
    """Bytes of each format for the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from first_trl.cache import open_cache
    from first_trl.cache_inspection import teacher_bytes

    cache_of(folder / "cache", model, rows, encode, vocab_size)
    cache = open_cache(folder / "cache")
    positions = cache.manifest["totals"]["supervised_positions"]
    ids, log_probs, tail = (
        cache.dataset[name][:] for name in ("teacher_ids", "teacher_log_probs", "teacher_tail_log_prob")
    )
    wide = {
        "teacher_ids": pa.array(ids, pa.list_(pa.list_(pa.int64()))),
        "teacher_log_probs": pa.array(log_probs, pa.list_(pa.list_(pa.float32()))),
        "teacher_tail_log_prob": pa.array(tail, pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(wide), folder / "wide.parquet")
    with open(folder / "text.jsonl", "w") as file:
        for row_ids, row_log_probs in zip(ids, log_probs, strict=True):
            pairs = zip(row_ids, row_log_probs, strict=True)
            tops = [dict(zip(map(str, tokens), values, strict=True)) for tokens, values in pairs]
            file.write(json.dumps({"top_log_probs": tops}) + "\n")
    return {
        "positions": positions,
        "this cache": teacher_bytes(cache),
        "bit-packed": positions * (K * (math.ceil(math.log2(vocab_size)) + 16) + 32) / 8,
        "Parquet, int64 and float32": (folder / "wide.parquet").stat().st_size,
        "JSONL": (folder / "text.jsonl").stat().st_size,
    }


# Speed


def table_of_speed(args: argparse.Namespace) -> list[str]:
    """Tokens per second of the cache and of two loops without it, over the same rows."""
    from datasets import Dataset

    model = random_teacher(49_152, 576, args.layers, 0.1)
    everything, answers = (random_rows(args.rows, 49_152, supervised) for supervised in ("all", "last"))
    tokens = sum(len(row["input_ids"]) for row in everything)
    arms = {
        "bare": ("(a) bare `model(**batch).logits`, `topk`, the same batches", partial(bare_loop, model, everything)),
        "cache": ("this cache, all tokens supervised", partial(cached, model, Dataset.from_list(everything))),
        "answers": ("this cache, the last token supervised", partial(cached, model, Dataset.from_list(answers))),
        "single": (
            "(b) one row at a time, one position at a time, to JSONL",
            partial(batch_of_one, model, everything),
        ),
    }
    clock, seconds = CLOCKS[args.clock], {arm: [] for arm in arms}
    for round_number in range(args.rounds + 1):
        for arm, (_, work) in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                start = clock()
                work(Path(folder))
                took = clock() - start
            if round_number > 0:  # the first warms up
                seconds[arm].append(took)
        print(f"round {round_number}: " + ", ".join(f"{arm} {seconds[arm][-1]:.1f} s" for arm in arms if seconds[arm]))
    lines = [
        f"## Speed: a Llama of {args.layers} layers x 576 with a vocabulary of 49,152, random weights, float32",
        "",
        f"{args.rows} rows, {tokens:,} tokens, median of {args.rounds} rounds, "
        + ("seconds of the clock." if args.clock == "wall" else "seconds of processor time, all threads together."),
        "",
        "| arm | tokens/s | times (a) | times (b) |",
        "|---|---:|---:|---:|",
    ]
    for arm, (title, _) in arms.items():
        rate = tokens / statistics.median(seconds[arm])
        ratios = [
            statistics.median(other / ours for other, ours in zip(seconds[base], seconds[arm], strict=True))
            for base in ("bare", "single")
        ]
        lines.append(f"| {title} | {rate:,.0f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return [
        *lines,
        "",
        "The cache's time includes checking, encoding, compressing, writing and fsync of every shard, and the "
        "manifest; (a) keeps nothing, and (b) is what the paper's released script does.",
        "",
    ]


# Memory


def table_of_memory() -> list[str]:
    """Peak memory of the cache stage, in a process of its own, over datasets of several sizes."""
    lines = ["## Memory: the cache stage over growing datasets", ""]
    lines += ["| rows | peak resident MiB | streamed | tokens/s |", "|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = memory_recipe(Path(folder))
        for rows in (1_000, 10_000, 50_000):
            runs = [stage_in_a_process(recipe, rows, streaming) for streaming in (False, True)]
            cells = [f"{rows:,}", *(f"{run['peak'] / 2**20:.0f}" for run in runs), f"{runs[0]['rate']:,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return [
        *lines,
        "",
        "Peak of the whole process, libraries included, through both splits: the reviews of train, repeated, and as "
        "many for validation; a teacher of one small layer, so that nothing hides behind its size; 256 rows a shard.",
        "",
    ]


# The report


def preamble(args: argparse.Namespace) -> list[str]:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [
        "# What a teacher cache costs, on a CPU",
        "",
        f"Made by `python benchmarks/cache.py {' '.join(sys.argv[1:])}".rstrip() + "`.",
        "",
        f"* {names[0]}, {args.threads} threads; load average at the start {os.getloadavg()[0]:.1f}",
        f"* Python {platform.python_version()}, {versions}",
        f"* K = {K}, log-probabilities in float16, the tail in float32",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("bytes", "speed", "memory"), default=["bytes", "speed", "memory"]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of the speed table (default 5)")
    parser.add_argument("--rows", type=int, default=256, help="rows of the speed table (default 256)")
    parser.add_argument("--layers", type=int, default=8, help="layers of its teacher (default 8)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads (default all cores)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    lines = preamble(args)
    if "bytes" in args.parts:
        lines += table_of_bytes()
    if "speed" in args.parts:
        lines += table_of_speed(args)
    if "memory" in args.parts:
        lines += table_of_memory()
    print("\n".join(lines))
    if len(args.parts) == 3:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cache-cpu.md").write_text("\n".join(lines))
        print(f"Written to {RESULTS / 'cache-cpu.md'}")


if __name__ == "__main__":
    main()

"""What a teacher cache costs: bytes per supervised position, tokens per second, and memory as the dataset grows.

    python benchmarks/cache.py                         # everything; half an hour on one CPU core
    python benchmarks/cache.py --parts bytes memory    # two of its three tables

The reviews and their teacher are read from the folder FIRST_DATA (default ../shared). Written to
benchmarks/results/cache-cpu.md, and each table as soon as it is there.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from cache_jobs import (
    BLOCK,
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


# Bytes


def table_of_bytes(args: argparse.Namespace) -> list[str]:
    """Bytes per supervised position of what the teacher says, K = 5, in four formats and two vocabularies."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_trl.data.encoding import encode_row
    from first_trl.data.loading import load_split
    from first_trl.settings import DatasetConfig, TaskConfig

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

    from first_trl.cache.reader import open_cache
    from first_trl.cache_tools import teacher_bytes

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
    """Tokens per second of the cache and of loops without it, over the same rows, by two clocks."""
    from datasets import Dataset

    model = random_teacher(49_152, 576, args.layers, 0.1)
    everything, answers = (random_rows(args.rows, 49_152, supervised) for supervised in ("all", "last"))
    some = everything[:: args.rows // 8]  # a padded row takes as long as ten others
    arms = {  # name -> (title, work, its rows)
        "bare": ("(a) bare `model(**batch).logits`, `topk`, the same batches", bare_loop, everything),
        "cache": ("this cache, all tokens supervised", cached, Dataset.from_list(everything)),
        "answers": ("this cache, the last token supervised", cached, Dataset.from_list(answers)),
        "padded": (
            f"(b) one row at a time, padded to {BLOCK} tokens, one position at a time, to JSONL",
            partial(batch_of_one, block=BLOCK),
            some,
        ),
        "single": ("(c) the same without padding", batch_of_one, everything),
    }
    tokens = {arm: sum(len(row["input_ids"]) for row in rows) for arm, (_, _, rows) in arms.items()}
    rates = {arm: [] for arm in arms}  # of each round: (tokens a second of the wall clock, of processor time)
    for round_number in range(args.rounds + 1):
        for arm, (_, work, rows) in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                wall, processor = time.perf_counter(), time.process_time()
                work(model, rows, Path(folder))
                took = time.perf_counter() - wall, time.process_time() - processor
            if round_number > 0:  # the first warms up
                rates[arm].append([tokens[arm] / seconds for seconds in took])
        print(f"round {round_number}: { ({arm: rates[arm][-1:] for arm in arms}) }", flush=True)
    return [
        f"## Speed: a Llama of {args.layers} layers x 576 with a vocabulary of 49,152, random weights, float32",
        "",
        f"{args.rows} rows, {tokens['cache']:,} tokens, {plural(args.threads, 'thread')} for every arm. Medians of "
        f"{args.rounds} rounds, in each of which every arm runs once, in turn; a ratio is the median of the rounds' "
        "ratios. Each figure by the clock, and by processor time of all threads together, which other work on the "
        "machine hardly touches.",
        "",
        "| arm | tokens/s | times (a) | times (b) | times (c) |",
        "|---|---:|---:|---:|---:|",
        *(
            _speed_row(title, rates[arm], [rates[base] for base in ("bare", "padded", "single")])
            for arm, (title, _, _) in arms.items()
        ),
        "",
        f"Tokens are those of the rows, without padding. (b) is the paper's released script over the rows that it is "
        f"given, padded to a block of {BLOCK}; it runs here over {len(some)} of the rows. The cache's time includes "
        "checking, encoding, compressing, writing and fsync of every shard, which a second thread does while the "
        "teacher runs, and the manifest; (a) keeps nothing.",
        "",
    ]


def _speed_row(title: str, ours: list, bases: list[list]) -> str:
    def both(pairs) -> str:
        wall, processor = (statistics.median(values) for values in zip(*pairs, strict=True))
        return f"{wall:,.0f} ({processor:,.0f})" if wall >= 100 else f"{wall:.2f} ({processor:.2f})"

    ratios = (
        [(mine[0] / other[0], mine[1] / other[1]) for mine, other in zip(ours, base, strict=True)] for base in bases
    )
    return f"| {title} | {both(ours)} | " + " | ".join(both(ratio) for ratio in ratios) + " |"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" + "s" * (count != 1)


# Memory


def table_of_memory(args: argparse.Namespace) -> list[str]:
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
        "Peak of the whole process, libraries included: the reviews of train, repeated, and 1,000 for validation; a "
        "teacher of one small layer, so that nothing hides behind its size; 256 rows a shard.",
        "",
    ]


# The report


def preamble() -> list[str]:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [
        "# What a teacher cache costs, on a CPU",
        "",
        f"* {names[0]}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}",
        f"* K = {K}, log-probabilities in float16, the tail in float32",
        "",
    ]


def write(tables: dict[str, list[str]]) -> None:
    """Put tables into the results, in place of earlier ones; a table that was not made again stays."""
    file = RESULTS / "cache-cpu.md"
    earlier = file.read_text().split("\n## ")[1:] if file.exists() else []
    texts = {text.split(maxsplit=1)[0].rstrip(":").lower(): f"## {text.strip()}\n" for text in earlier}
    texts |= {part: "\n".join(lines).strip() + "\n" for part, lines in tables.items()}
    RESULTS.mkdir(exist_ok=True)
    file.write_text("\n".join(["\n".join(preamble()), *(texts[part] for part in PARTS if part in texts)]))
    print(f"Written to {file}", flush=True)


PARTS = {"bytes": table_of_bytes, "speed": table_of_speed, "memory": table_of_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of the speed table (default 5)")
    parser.add_argument("--rows", type=int, default=128, help="rows of the speed table (default 128)")
    parser.add_argument("--layers", type=int, default=8, help="layers of its teacher (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    for part in args.parts:
        load = os.getloadavg()[0]
        lines = PARTS[part](args)
        size = f" --rounds {args.rounds} --rows {args.rows} --layers {args.layers}" * (part == "speed")
        made = f"Made by `python benchmarks/cache.py --parts {part} --threads {args.threads}{size}`"
        lines += [f"{made}; load average of the machine at the start {load:.1f}.", ""]
        print("\n".join(lines), flush=True)
        write({part: lines})


if __name__ == "__main__":
    main()

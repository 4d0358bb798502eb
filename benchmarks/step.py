"""Time and memory of one training step: distilling from the cache, beside TRL's own steps and the limit.

    python benchmarks/step.py                              # the full table, about half an hour on two CPU cores
    python benchmarks/step.py --device cuda
    python benchmarks/step.py --quick                      # small batches, three runs: is anything badly off?
    python benchmarks/step.py --shapes qwen3 --runs 9

Each arm lives in a process of its own, so that its peak memory is its own, and the processes take their steps in turn,
so that whatever else the machine does falls on all of them. The table gives medians over the runs; a ratio is the
median of the ratios within one round, which a slow minute cannot bend. Written to benchmarks/results/step-DEVICE.md;
of one shape alone, to step-SHAPE-DEVICE.md.

What an arm is, and how its memory is read, is in `step_arms.py`.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["first-trl", "torch", "transformers", "trl", "peft", "accelerate"]
ARMS = {
    "backbone": "backbone only (the limit)",
    "renormalize": "`renormalize`",
    "bucket": "`bucket`",
    "bucket_quarter": "`bucket`, mass_fraction 0.25",
    "sft": "TRL `SFTTrainer`",
    "sft_supervised": "TRL's head on supervised positions alone",
    "full_logits": "full logits, log_softmax, gather",
    "live_teacher": "TRL dense divergence, live teacher",
}
if importlib.util.find_spec("liger_kernel"):  # no dependency: `pip install --no-deps liger-kernel`
    ARMS["liger"] = "Liger fused divergence, live teacher"
    PACKAGES.append("liger-kernel")
SUPERVISIONS = {"all": "all tokens", "answer": "answer only (the last token of each row)"}
CLOCKS = {"wall": "seconds", "process": "core seconds"}


@dataclass(frozen=True)
class Shape:
    """A head as a published model has it, on a backbone of its width with few layers."""

    title: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def model(self, layers: int, tokens: int) -> dict:
        """Settings of a LlamaConfig."""
        sizes = {name: value for name, value in vars(self).items() if name != "title"}
        return {**sizes, "num_hidden_layers": layers, "max_position_embeddings": tokens}


SHAPES = {
    "llama": Shape("Llama, 49,152 x 576 (SmolLM2-135M)", 49152, 576, 1536, 9, 3, 64),
    "qwen3": Shape("Qwen3-0.6B, 151,936 x 1,024", 151936, 1024, 3072, 16, 8, 128),
    "llama1b": Shape("Llama-3.2-1B, 128,256 x 2,048", 128256, 2048, 8192, 32, 8, 64),
    "gemma3": Shape("Gemma-3-270m, 262,144 x 640", 262144, 640, 2048, 4, 1, 256),
}


def measure(shape: Shape, supervision: str, args: argparse.Namespace) -> dict[str, list[dict]]:
    """What a step of every arm took: seconds, `args.runs` times in turn, and bytes, once, one arm at a time."""
    from step_arms import Job

    model = shape.model(args.layers, args.tokens)
    jobs = {
        arm: Job(arm, model, args.rows, args.tokens, supervision, args.runs, args.device, args.threads, False)
        for arm in ARMS
    }
    results = take_turns(jobs)
    for arm, job in jobs.items():
        (exact,) = take_turns({arm: replace(job, steps=1, exact_memory=True)})[arm]  # the same in every step
        for run in results[arm]:
            run["bytes"] = exact["bytes"]
    return results


def take_turns(jobs: dict) -> dict[str, list[dict]]:
    """Start a process for every job; then rounds in which each takes one step while the others wait."""
    from step_arms import serve

    context = multiprocessing.get_context("forkserver")  # its server imports once, and every process starts from there
    context.set_forkserver_preload(["first_trl.trainer", "trl.trainer.distillation_trainer", "peft"])
    arms = {}
    try:
        for arm, job in jobs.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()  # so that a dead process is an end of file here, not a silence
            arms[arm] = process, ours
            assert ours.recv() == "ready"
        results = {arm: [] for arm in jobs}
        for _ in range(next(iter(jobs.values())).steps):
            for arm, (_, connection) in arms.items():
                time.sleep(0.2)  # the threads of the last arm are still looking for work
                connection.send("go")
                results[arm].append(connection.recv())
    finally:
        for process, _ in arms.values():
            process.kill()
            process.join()
    return results


def table(results: dict[str, list[dict]], clock: str) -> list[str]:
    lines = [
        f"| arm | {CLOCKS[clock]} | x SFT | x supervised | x limit | peak MiB | x SFT | x supervised | x limit |",
        "|---|" + "---:|" * 8,
    ]
    for arm, title in ARMS.items():
        cells = [title]
        for key, unit, digits in ((clock, 1, 3), ("bytes", 2**20, 0)):
            cells.append(f"{statistics.median(run[key] for run in results[arm]) / unit:.{digits}f}")
            cells += [f"{ratio(results, arm, other, key):.2f}" for other in ("sft", "sft_supervised", "backbone")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ratio(results: dict[str, list[dict]], arm: str, other: str, key: str) -> float:
    """Median over the rounds of what `arm` cost in a round over what `other` did."""
    return statistics.median(
        ours[key] / theirs[key] for ours, theirs in zip(results[arm], results[other], strict=True)
    )


def device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def preamble(args: argparse.Namespace) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    memory = "resident memory of the process" if args.device == "cpu" else "memory of torch's allocator"
    return [
        f"# One training step on {'a CPU' if args.device == 'cpu' else 'a GPU'}",
        "",
        f"Made by `python benchmarks/step.py {' '.join(sys.argv[1:])}`".rstrip("` ") + "`.",
        "",
        f"* {device_name(args.device)}, {args.threads} threads; load average at the start {os.getloadavg()[0]:.1f}",
        f"* Python {platform.python_version()}, {versions}",
        f"* {dtype}; a Llama with random weights, tied frozen head, {args.layers} layers; LoRA r=16 on attention "
        "and MLP; gradient checkpointing (TRL's default); AdamW",
        f"* {args.rows} rows of {args.tokens} tokens; 5 teacher tokens per position; median of {args.runs} "
        "alternating runs, each from the first forward to the end of the optimizer's step",
        "* SFT: where there is no Triton (a CPU), TRL's trainer scores masked positions too, which a GPU does not do: "
        "with the answer alone supervised, compare with `supervised`, which scores what a GPU would. A CPU table "
        "shows the head's arithmetic and memory; it cannot show launches, synchronisation or a GPU's bandwidth",
        "* DistillKit is not on PyPI and has no arm: its losses against a teacher's top tokens take the student's "
        "full logits, as `full logits` does. A live teacher is of the student's size here; real ones are larger",
        f"* peak: highest {memory} during the step, above what it held when the step began",
        "",
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama", "qwen3", "gemma3"])
    parser.add_argument("--supervision", nargs="+", choices=SUPERVISIONS, default=list(SUPERVISIONS))
    parser.add_argument("--runs", type=int, help="measured steps of each arm (default 5)")
    parser.add_argument("--rows", type=int, help="rows of a batch (default 2 on a CPU, 16 on a GPU)")
    parser.add_argument("--tokens", type=int, help="tokens of a row (default 256 on a CPU, 1,024 on a GPU)")
    parser.add_argument("--layers", type=int, help="layers of the backbone (default 2 on a CPU, 16 on a GPU)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads (default all cores)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="`process` counts the cores' time, which other work on the machine hardly touches (use --threads 1)",
    )
    parser.add_argument("--quick", action="store_true", help="64 tokens a row, 3 runs, and no file is written")
    args = parser.parse_args(arguments)
    on_cpu = args.device == "cpu"
    for name, value in {
        "runs": 3 if args.quick else 5,
        "rows": 2 if on_cpu else 16,
        "tokens": 64 if args.quick else 256 if on_cpu else 1024,
        "layers": 2 if on_cpu else 16,
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cpu" and not sys.platform.startswith("linux"):
        parser.error("a process's peak memory is read from Linux's /proc; on this system only --device cuda works")
    return args


def main() -> None:
    args = parse()
    lines = preamble(args)
    print("\n".join(lines), flush=True)
    for name in args.shapes:
        for supervision in args.supervision:
            section = [f"## {SHAPES[name].title}: {SUPERVISIONS[supervision]}", ""]
            section += [*table(measure(SHAPES[name], supervision, args), args.clock), ""]
            print("\n".join(section), flush=True)
            lines += section
    if not args.quick:
        shape = f"-{args.shapes[0]}" if len(args.shapes) == 1 else ""
        path = RESULTS / f"step{shape}-{args.device}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines))
        print(f"Written to {path}")


if __name__ == "__main__":
    main()

"""Does the cost of a token stay the same? Caching and distilling against processes, dataset size and row length.

    python benchmarks/scaling.py                # the full tables, some minutes; wants two quiet cores
    python benchmarks/scaling.py --quick        # two rounds over few rows: is anything badly off? no file is written

Every process has one thread. Two processes do twice the work of one (weak scaling), so that 2.0 times its throughput
is the best there is. Rounds alternate between the arms; a ratio is the median of the ratios within one round. Written
to benchmarks/results/scaling-cpu.md. What is timed is in `scaling_jobs.py`.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
from pathlib import Path

from scaling_jobs import MODEL, VOCAB_SIZE, cache_seconds, distill_seconds

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("first-trl", "torch", "transformers", "trl", "accelerate")
WORKS = {"caching": cache_seconds, "distilling": distill_seconds}


def rates(work, arms: dict[str, dict], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every arm in every round, all its processes together."""
    found = {name: [] for name in arms}
    for number in range(rounds):
        for name, arm in arms.items():
            tokens = arm["processes"] * arm["rows"] * arm["tokens"]
            found[name].append(tokens / work(**arm))
        print(
            f"  round {number}: " + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in found.items()),
            flush=True,
        )
    return found


def table(title: str, unit: str, arms: dict[str, dict], rounds: int) -> list[str]:
    """Throughput of both works over some arms, and each over the first."""
    lines = [f"## {title}", "", f"| {unit} | " + " | ".join(f"{name}: tokens/s | ratio" for name in WORKS) + " |"]
    lines.append("|---|" + "---:|---:|" * len(WORKS))
    found = {}
    for name, work in WORKS.items():
        print(f"{title}: {name}", flush=True)
        found[name] = rates(work, arms, rounds)
    first = next(iter(arms))
    for arm in arms:
        cells = []
        for values in found.values():
            ratio = statistics.median(ours / theirs for ours, theirs in zip(values[arm], values[first], strict=True))
            cells += [f"{statistics.median(values[arm]):,.0f}", f"{ratio:.2f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def preamble(args: argparse.Namespace) -> list[str]:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [
        "# Cost of a token against processes, dataset size and row length, on a CPU",
        "",
        "Made by `python benchmarks/scaling.py`.",
        "",
        f"* {names[0]}, {os.cpu_count()} cores; load average at the start {os.getloadavg()[0]:.1f}",
        f"* Python {platform.python_version()}, {versions}",
        f"* Llama of width {MODEL['hidden_size']}, vocabulary {VOCAB_SIZE:,}, random weights, float32: 4 layers for "
        "the teacher, 2 and LoRA r=8 for the student; every token but the first supervised; one thread a process",
        f"* median of {args.rounds} rounds; the ratio is to the first line of its table",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds of every arm (default 5)")
    parser.add_argument("--rows", type=int, help="rows of a process (default 128)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 64 rows, one table, no file")
    args = parser.parse_args()
    args.rounds, args.rows = args.rounds or (2 if args.quick else 5), args.rows or (64 if args.quick else 128)
    lines = preamble(args)
    base = {"processes": 1, "rows": args.rows, "tokens": 128}
    lines += table(
        "Processes, the same rows in each (weak scaling)",
        "processes",
        {str(count): {**base, "processes": count} for count in (1, 2)},
        args.rounds,
    )
    if not args.quick:
        sizes = [args.rows * factor for factor in (1, 4, 16)]
        lines += table(
            "Dataset size, one process", "rows", {f"{rows:,}": {**base, "rows": rows} for rows in sizes}, args.rounds
        )
        lengths = (64, 128, 256, 512)
        lines += table(
            "Row length, one process, as many tokens in all",
            "tokens of a row",
            {str(t): {**base, "tokens": t, "rows": args.rows * 512 // t // 2} for t in lengths},
            args.rounds,
        )
        lines += ["A longer row costs more in attention alone, whose work grows with the square of its tokens.", ""]
    print("\n".join(lines))
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scaling-cpu.md").write_text("\n".join(lines))
        print(f"Written to {RESULTS / 'scaling-cpu.md'}")


if __name__ == "__main__":
    main()

"""Time of the search for a recalibration on 100,000 cached positions, beside its limits: 2 s, with bootstrap 20 s.

    python benchmarks/search.py                       # some minutes on one core
    python benchmarks/search.py --positions 10000 --large 800000

The bootstrap is linear in the positions: `--large` sizes (0.8 and 8 million), in examples of 20 tokens whose resamples
draw whole examples, are searched once each; the limit for 8 million is 120 s.

Seconds are of processor time on one thread, which other programs on the machine do not lengthen. Each search is run
three times and the least is told, for a program cannot be faster than it is. `auto` is the choice among families, five
folds of each. Written to benchmarks/results/search.md.
"""

import argparse
import importlib.metadata
import platform
import resource
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from first_trl.calibration import choose_family, recalibrate, search

RESULTS = Path(__file__).parent / "results" / "search.md"
KEPT, BOOTSTRAP = 5, 200
LIMIT, LIMIT_WITH_BOOTSTRAP = 2.0, 20.0  # seconds, for 100,000 positions
PLANTED = 2.0
EXAMPLE_TOKENS = 20
METHODS = ("temperature", "probability", "label_smoothing")
PACKAGES = ("first-trl", "torch", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--large", type=int, nargs="*", default=[800_000, 8_000_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    log_probs, target = rows(options.positions)
    lines = [*heading(options.positions), *table(log_probs, target, options.runs)]
    if options.large:
        lines += large_table(options.large)
    text = "\n".join(lines) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


def rows(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Over-confident rows with a tail of some 2 %, whose labels a temperature of `PLANTED` makes true."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(size, KEPT, generator=generator) * 2.5).sort(descending=True)[0]
    tail = torch.sigmoid(torch.randn(size, 1, generator=generator) - 4)
    true = torch.cat([torch.log_softmax(logits, -1) + torch.log1p(-tail), tail.log()], dim=1)
    target = torch.multinomial(true.exp(), 1, generator=generator)[:, 0]
    return recalibrate(true, "temperature", 1 / PLANTED), target


def heading(positions: int) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [
        "# Search for a recalibration",
        "",
        f"`python benchmarks/search.py`: {positions:,} positions, {KEPT} tokens and the tail each, one thread "
        f"({platform.machine()}, Python {platform.python_version()}, {versions}). Processor seconds, the least of the "
        f"runs; a ratio is the time over its limit ({LIMIT:g} s, with {BOOTSTRAP} bootstrap resamples "
        f"{LIMIT_WITH_BOOTSTRAP:g} s). The labels are drawn by a planted temperature of {PLANTED:g}.",
        "",
        "| method | criterion | search | over its limit | with bootstrap | over its limit | value (95 % interval) |",
        "|---|---|---:|---:|---:|---:|---|",
    ]


def table(log_probs, target, runs: int) -> list[str]:
    lines = []
    for method in METHODS:
        for criterion in ("ece", "nll"):
            settings = {"method": method, "criterion": criterion}
            plain, _ = least(runs, lambda settings=settings: search(log_probs, target, **settings))
            full, found = least(runs, lambda s=settings: search(log_probs, target, **s, bootstrap=BOOTSTRAP))
            low, high = found.interval
            lines.append(
                f"| `{method}` | {criterion} | {plain:.2f} s | {plain / LIMIT:.2f} | {full:.1f} s | "
                f"{full / LIMIT_WITH_BOOTSTRAP:.2f} | {found.value:.3f} ({low:.3f} to {high:.3f}) |"
            )
    seconds, choice = least(runs, lambda: choose_family(log_probs, target, ["temperature", "probability"]))
    return [*lines, f"| `auto` | ece | {seconds:.2f} s | - | - | - | chooses `{choice.method}` |"]


def large_table(sizes: list[int]) -> list[str]:
    """Temperature by ECE, with bootstrap by example, of many positions."""
    lines = [
        "",
        "| positions | examples | with bootstrap | peak memory | value (95 % interval) |",
        "|---|---|---:|---:|---|",
    ]
    for size in sizes:
        log_probs, target = rows(size)
        examples = np.arange(size) // EXAMPLE_TOKENS
        settings = {"bootstrap": BOOTSTRAP, "examples": examples}
        seconds, found = least(1, partial(search, log_probs, target, **settings))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        low, high = found.interval
        lines.append(
            f"| {size:,} | {size // EXAMPLE_TOKENS:,} | {seconds:.0f} s | {memory:.1f} GB | {found.value:.3f} "
            f"({low:.3f} to {high:.3f}) |"
        )
    return lines


def least(runs: int, work):
    """(fewest processor seconds of some runs, what the work returned)."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return min(times), result


if __name__ == "__main__":
    main()

"""Does what the demo shows hold over seeds? The whole demo, again with other draws of its task, models and training.

    python benchmarks/demo_seeds.py                        # seeds 0, 1 and 2: about five minutes each on two CPU cores
    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4

Each seed is a run of `first-trl run` in a folder of its own, so that an interrupted benchmark continues. The table is
written to benchmarks/results/demo_seeds.md: mean over the seeds, smallest and largest, and on how many seeds the 95 %
intervals (bootstrap over the test examples) of an arm's ECE and of `first`'s do not overlap.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from first_trl.demo import prepare_demo

RESULTS = Path(__file__).parent / "results" / "demo_seeds.md"
PACKAGES = ("first-trl", "torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="runs/demo_seeds")
    options = parser.parse_args()
    started = time.monotonic()
    reports = [run_seed(Path(options.output_dir) / f"seed-{seed}", seed) for seed in options.seeds]
    text = render(reports, options.seeds, time.monotonic() - started)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


def run_seed(folder: Path, seed: int) -> dict:
    """The metrics of the demo with that seed for its data, its base models and its training."""
    recipe = prepare_demo(folder.resolve(), seed)
    overrides = ["--output_dir", str(folder), "--seed", str(seed)]
    environment = {**os.environ, "FIRST_DEMO": str(folder.resolve())}
    subprocess.run([sys.executable, "-m", "first_trl", "run", str(recipe), *overrides], check=True, env=environment)
    return json.loads((folder / "demo" / "report" / "metrics.json").read_text(encoding="utf-8"))


def render(reports: list[dict], seeds: list[int], seconds: float) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# The demo over seeds",
        "",
        f"`python benchmarks/demo_seeds.py --seeds {' '.join(map(str, seeds))}`: {seconds / 60:.0f} minutes on "
        f"{os.cpu_count()} cores ({platform.machine()}, Python {platform.python_version()}, {versions}). A seed draws "
        "the task, the base models and the training alike. Per cent: mean over the seeds (smallest to largest).",
        "",
    ]
    for dataset in reports[0]["arms"]["first"]:
        lines += table(dataset, [report["arms"] for report in reports])
    return "\n".join(lines)


def table(dataset: str, runs: list[dict]) -> list[str]:
    """The rows of one test set, one per arm."""
    lines = [f"## {dataset}", "", "| arm | accuracy | ECE | trust score | ECE intervals apart from `first`'s |"]
    lines.append("|---|---:|---:|---:|---|")
    for arm in runs[0]:
        cells = [spread([run[arm][dataset][metric] for run in runs]) for metric in ("accuracy", "ece", "trust_score")]
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {verdict(arm, dataset, runs)} |")
    return [*lines, ""]


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def verdict(arm: str, dataset: str, runs: list[dict]) -> str:
    """On how many seeds the 95 % interval of `first`'s ECE lies wholly below, or above, that of the arm."""
    if arm == "first":
        return ""
    pairs = [(run["first"][dataset]["ci"]["ece"], run[arm][dataset]["ci"]["ece"]) for run in runs]
    lower, higher = sum(mine[1] < other[0] for mine, other in pairs), sum(mine[0] > other[1] for mine, other in pairs)
    return f"`first` lower on {lower}, higher on {higher} of {len(runs)} seeds"


if __name__ == "__main__":
    main()

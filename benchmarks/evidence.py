"""What the method buys, over seeds and against every control: the whole pipeline, again and again, on real data.

    python benchmarks/evidence.py                                  # all experiments, seeds 0, 1 and 2: hours
    python benchmarks/evidence.py --experiments demo               # about five minutes a seed on two CPU cores
    python benchmarks/evidence.py --experiments reviews --seeds 0
    python benchmarks/evidence.py --render                         # the table of the runs that are there, no new one

Each seed of an experiment is one `first-trl run` in a folder of its own, `OUTPUT/EXPERIMENT/seed-N`: what is finished
is not done again, and what was interrupted continues. benchmarks/results/evidence.md is written from all finished runs
in the output folder, whoever started them: mean over the seeds, smallest and largest, and on how many seeds the 95 %
intervals (bootstrap over the test examples) of an arm's ECE and of `first`'s do not overlap.

The real data are read from the folder that FIRST_DATA names (../shared if unset).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "evidence.md"
REVIEWS = HERE.parent / "recipes" / "reviews.yaml"
BANKING77 = HERE / "banking77.yaml"
PACKAGES = ("first-trl", "torch", "transformers", "trl", "peft", "bitsandbytes")
# name: (what it is, recipe, overrides of it); the demo's recipe is made with its data
EXPERIMENTS = {
    "demo": ("the generated task of `first-trl demo`: a student that over-fits its labels", None, ()),
    "reviews": ("sentiment of film reviews; teacher and student over-fit their labels", REVIEWS, ()),
    "reviews-short": (
        "the same, teacher and students trained too briefly to over-fit",
        REVIEWS,
        ("--sft.num_train_epochs", "2", "--distill.max_steps", "150"),
    ),
    "reviews-own-rows": (
        "the same, but students learn the 3,000 rows that the teacher was trained on, and no others",
        REVIEWS,
        ("--datasets.transfer", "null"),
    ),
    "banking77": ("77 intents of bank customers, each with a two-letter code as its answer", BANKING77, ()),
}
METRICS = ("accuracy", "ece", "trust_score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--render", action="store_true", help="only write the table of what is finished")
    options = parser.parse_args()
    if not options.render:
        for seed in options.seeds:  # one seed of everything before the next, so that an early stop shows most
            for experiment in options.experiments:
                run(experiment, seed, options.output_dir)
    text = render(options.output_dir)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


def run(experiment: str, seed: int, output_dir: Path) -> None:
    """The whole pipeline with that seed."""
    _, recipe, overrides = EXPERIMENTS[experiment]
    folder = output_dir / experiment
    if experiment == "demo":
        from first_trl.demo import prepare_demo

        recipe = prepare_demo((folder / f"inputs-{seed}").resolve(), seed)  # its task and base models are drawn, too
    if experiment == "banking77":
        write_banking77(output_dir / "banking77-data")
        os.environ["FIRST_BANKING77"] = str(output_dir / "banking77-data")
    where = ["--output_dir", str(folder), "--name", f"seed-{seed}", "--seed", str(seed)]
    subprocess.run([sys.executable, "-m", "first_trl", "run", str(recipe), *overrides, *where], check=True)


def write_banking77(folder: Path) -> None:
    """The rows of banking77, each with the `code` of its label: the recipe's choices, in the order of the labels."""
    import yaml

    source = Path(os.environ.get("FIRST_DATA", "../shared")) / "data" / "banking77"
    codes = yaml.safe_load(BANKING77.read_text(encoding="utf-8"))["task"]["choices"]
    splits = {}
    for split in ("train", "validation", "test"):
        with open(source / f"{split}.jsonl", encoding="utf-8") as lines:
            splits[split] = [json.loads(line) for line in lines]
    labels = sorted({row["label"] for row in splits["train"]})
    code_of = dict(zip(labels, codes, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        coded = [json.dumps({**row, "code": code_of[row["label"]]}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(coded) + "\n", encoding="utf-8")


def render(output_dir: Path) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Evidence over seeds",
        "",
        f"`python benchmarks/evidence.py`, on {os.cpu_count()} cores ({platform.machine()}, Python "
        f"{platform.python_version()}, {versions}). Per cent: mean over the seeds (smallest to largest). A seed draws "
        "the training, and for the demo its task and base models too. Confidence and answer are those of the whole "
        "vocabulary; the tables restricted to the choices are in each run's report. Sure is an arm at or above the "
        "confidence that reached 90 % accuracy on validation, fitted anew for each seed.",
        "",
    ]
    for experiment, (title, _, overrides) in EXPERIMENTS.items():
        reports = sorted((output_dir / experiment).glob("seed-*/report/metrics.json"))
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
        seeds = ", ".join(path.parts[-3].removeprefix("seed-") for path in reports) or "none finished"
        lines += [f"## {experiment}: {title}", "", f"Seeds: {seeds}. Overrides: {' '.join(overrides) or 'none'}.", ""]
        if not runs:
            continue
        values = ", ".join(f"{run['calibration']['method']} {run['calibration']['value']:.3g}" for run in runs)
        lines += [f"Recalibration: {values}.", ""]
        for dataset in runs[0]["arms"]["first"]:
            lines += table(dataset, dataset in runs[0]["out_of_domain"], [report["arms"] for report in runs])
    return "\n".join(lines)


def table(dataset: str, out_of_domain: bool, runs: list[dict]) -> list[str]:
    """The rows of one test set, one per arm."""
    lines = [f"### {dataset}, {'out of' if out_of_domain else 'in'} domain", ""]
    lines += [
        "| arm | accuracy | ECE | trust score | right where sure | share answered | ECE intervals |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for arm in runs[0]:
        cells = [spread([run[arm][dataset][metric] for run in runs]) for metric in METRICS]
        cells += sure([run[arm][dataset].get("selective") for run in runs])
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {verdict(arm, dataset, runs)} |")
    return [*lines, ""]


def sure(fitted: list[dict | None]) -> list[str]:
    """Accuracy at or above the threshold that reached 90 % on validation, and the share of the examples there."""
    reached = [one for one in fitted if one is not None and one["accuracy"] is not None]
    if not reached:
        return ["-", "-"]
    seeds = "" if len(reached) == len(fitted) else f", {len(reached)} of {len(fitted)} seeds"
    return [spread([one["accuracy"] for one in reached]) + seeds, spread([one["coverage"] for one in reached])]


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def verdict(arm: str, dataset: str, runs: list[dict]) -> str:
    """On how many seeds the 95 % interval of `first`'s ECE lies wholly below, or above, that of the arm."""
    if arm == "first":
        return ""
    pairs = [(run["first"][dataset]["ci"]["ece"], run[arm][dataset]["ci"]["ece"]) for run in runs]
    lower, higher = sum(mine[1] < other[0] for mine, other in pairs), sum(mine[0] > other[1] for mine, other in pairs)
    return f"`first` below on {lower}, above on {higher} of {len(runs)}"


if __name__ == "__main__":
    main()

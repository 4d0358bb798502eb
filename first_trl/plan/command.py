"""`first-trl plan RECIPE`: what a recipe will cost and what is wrong with it, before anything is run.

    first-trl plan RECIPE [--config_file configs/fsdp2.yaml] [--accelerator h100] [--utilisation 0.3] [--key value ...]

Prints two tables and every problem found; the exit status is 0 without problems and 2 with. No weight is loaded.
"""

import argparse
import os
import sys

from ..log import RunLog, libraries_into
from ..recipe.loading import RecipeError, load_recipe
from .accelerators import ACCELERATORS, UTILISATION

MIB = 2**20


def main(argv: list[str]) -> int:
    """Plan a recipe; returns the exit status."""
    parser = argparse.ArgumentParser(prog="first-trl plan", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the experiment's YAML file")
    parser.add_argument("--config_file", help="an accelerate configuration; without one, a single process")
    parser.add_argument("--accelerator", default="h100", help=f"one of {', '.join(ACCELERATORS)} (default h100)")
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, help=f"share of its peak that is reached ({UTILISATION})"
    )
    options, overrides = parser.parse_known_args(argv)
    try:
        recipe = load_recipe(options.recipe, overrides)
        from .machine import read_machine

        machine = read_machine(options.config_file, options.accelerator, options.utilisation)
    except (RecipeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    plan = _make_quietly(recipe, machine)
    print("\n".join(describe(plan)))
    return 2 if plan.problems else 0


def _make_quietly(recipe, machine):
    """The plan, without the libraries' progress bars and warnings, which are no part of it."""
    import datasets

    from .estimate import make_plan

    with libraries_into(RunLog(os.devnull)):
        datasets.disable_progress_bars()
        try:
            return make_plan(recipe, machine)
        finally:
            datasets.enable_progress_bars()


def describe(plan) -> list[str]:
    """The plan as lines of text: costs, memory, what was not looked up, problems."""
    machine = plan.machine
    lines = _table(
        ("", "rows", "tokens", "supervised", "steps", "cache", "FLOPs", "hours"),
        [
            (
                work.name,
                _count(work.rows),
                _count(work.tokens),
                _count(work.supervised),
                _count(work.steps),
                _bytes(work.cache_bytes),
                "-" if work.flops is None else f"{work.flops:.2g}",
                _hours(work.hours),
            )
            for work in plan.works
        ],
    )
    devices = f"{machine.processes} x {machine.accelerator.title}"
    lines += [
        "",
        "Rows, tokens and supervised positions are a split's, once. FLOPs are the whole work's, padding included.",
        f"Hours: {devices}, at {100 * machine.utilisation:.0f} % of the published peak (an assumption; "
        f"{_peaks(machine.accelerator)}).",
        "",
        *_memory_table(plan),
    ]
    for title, entries in (("Could not be looked up", plan.unknown), ("Problems", plan.problems)):
        if entries:
            lines += ["", f"{title}:", *(f"  - {entry}" for entry in dict.fromkeys(entries))]
    where = " in what could be looked at" if plan.unknown else ""
    return lines if plan.problems else [*lines, "", f"No problems found{where}."]


def _memory_table(plan) -> list[str]:
    names = ("weights", "adapter", "gradients", "optimizer", "activations", "head chunk", "in all")
    rows = [
        (work.name, *(_bytes(value) for value in (*vars(work.memory).values(), work.memory.total)))
        for work in plan.works
        if work.memory is not None
    ]
    if not rows:
        return ["Memory: not known without the models' configurations and the rows."]
    return [
        f"Memory of each device at its peak ({plan.machine.kind}, {plan.machine.processes} processes on "
        f"{plan.machine.machines} machines), tensors alone: libraries and the driver take up to 1 GB more.",
        *_table(("", *names), rows),
    ]


def _table(head: tuple, rows: list[tuple]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (head, *rows)
    ]


def _count(value) -> str:
    return "-" if value is None else f"{round(value):,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def _hours(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 0.1 else f"{3600 * value:.1f} s"


def _peaks(accelerator) -> str:
    half = "no bfloat16" if accelerator.bfloat16_tflops is None else f"{accelerator.bfloat16_tflops:g} TFLOPS bfloat16"
    return f"{half}, {accelerator.float32_tflops:g} float32"

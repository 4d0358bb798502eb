"""The pipeline, written once: which work a recipe asks for, what each piece is made from, and how one is run.

A stage is a command; a piece of work is what it makes: one per stage, and one per arm for `distill`. `inputs_of` says
what a piece is made from, `run_work` makes it if that has changed. Nothing here trains or scores anything.
"""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from .config import SPEED_SETTINGS
from .recipe.loading import STAGES, Recipe, RecipeError, load_recipe
from .running.folder import RunFolder, path_fingerprint
from .running.log import say

METHODS_WITHOUT_VALUE = ("none",)


def parse_stage(stage: str, argv: list[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe and the options of `python -m first_trl.stages.STAGE RECIPE [--key value ...]`."""
    parser = argparse.ArgumentParser(
        prog=f"first-trl {stage}",
        allow_abbrev=False,
        epilog="Any setting of the recipe can be overridden: --key value for this stage's own, --section.key value.",
    )
    parser.add_argument("recipe", help="the experiment's YAML file")
    if stage == "distill":
        parser.add_argument("--arm", help="train this arm only, or one of its seeds: first/seed-1")
    if stage == "push":
        parser.add_argument("--dry_run", action="store_true", help="write the folder to upload, and upload nothing")
    parser.add_argument("--quiet", action="store_true", help="print errors alone; the run's log.txt has the rest")
    options, overrides = parser.parse_known_args(argv)
    try:
        recipe = load_recipe(options.recipe, overrides, stage=stage)
    except RecipeError as error:
        raise SystemExit(str(error) if os.environ.get("RANK", "0") == "0" else 1) from None
    if getattr(options, "arm", None) and options.arm not in [*recipe.arms, *recipe.students]:
        parser.error(f"unknown arm {options.arm!r}; the recipe has {', '.join(recipe.arms)}")
    return recipe, options


def works_of(recipe: Recipe, stage: str) -> list[str]:
    """The pieces of work of a stage, in order; `push` leaves nothing behind and is not among them."""
    if stage == "distill":
        return [f"distill.{student}" for student in recipe.students]
    if stage == "sft" and recipe.cache.teacher is not None:
        return []  # the teacher is given
    return [stage] if stage != "push" else []


def recalibration_of(recipe: Recipe, arm: str) -> tuple[str, float | None]:
    """(method, value) of an arm; value None is the one that `calibrate` finds, `auto` the method that it chooses."""
    section = recipe.arm_section(arm)
    if recipe.arm_trainer(arm) == "sft":
        return "none", None
    return section.get("recalibration_method", recipe.calibrate.method), section.get("recalibration_value")


def needs_calibration(recipe: Recipe, arm: str) -> bool:
    """Whether an arm reads `calibration.json`."""
    method, value = recalibration_of(recipe, arm)
    return method not in METHODS_WITHOUT_VALUE and value is None


def calibration_methods(recipe: Recipe) -> list[str]:
    """The families that `calibrate` fits: the recipe's own, and those that an arm asks for."""
    wanted = control_methods(recipe)
    wanted += [recalibration_of(recipe, arm)[0] for arm in recipe.arms if needs_calibration(recipe, arm)]
    return [method for method in dict.fromkeys(wanted) if method != "auto"]


def control_methods(recipe: Recipe) -> list[str]:
    """The families that `evaluate` may lay over answers: the recipe's own, or all that `auto` chooses among."""
    method = recipe.calibrate.method
    return calibration_candidates(recipe) if method == "auto" else [method]


def calibration_candidates(recipe: Recipe) -> list[str]:
    """The families among which `calibrate.method: auto` chooses: those that this cache can serve.

    Not label smoothing: rows that nobody has seen may have less on their first token than it takes away.
    """
    return ["temperature", "probability", *(["vocabulary_temperature"] if recipe.cache.tail_knots else [])]


def cached_roles(recipe: Recipe) -> tuple[str, ...]:
    """The splits that the teacher is run over: without rows for students to learn from, validation alone."""
    learnt = recipe.datasets.transfer or recipe.datasets.train
    return ("train", "validation") if learnt else ("validation",)


def teacher_path(recipe: Recipe) -> str:
    """The teacher's model id or folder: the one given, or the one that `sft` makes, the first of several."""
    return recipe.cache.teacher or teacher_folders(recipe)[0]


def teacher_folders(recipe: Recipe) -> list[str]:
    """The folders of the teachers that `sft` makes: one, or with `sft.cross_fit` one for each fold."""
    folder = recipe.run_folder / "teacher"
    return [str(folder / f"fold-{fold}") for fold in range(recipe.cross_fit)] or [str(folder)]


def _local(path) -> str | None:
    """A fingerprint of a path on this machine; None for a Hub id, which its revision identifies."""
    return path_fingerprint(path) if path and Path(path).exists() else None


def _dataset(config) -> dict | None:
    if config is None:
        return None
    files = config.data_files or []
    files = [files] if isinstance(files, str) else files
    return {"config": vars(config), "files": [_local(file) for file in files] or _local(config.path)}


def inputs_of(recipe: Recipe, work: str) -> dict:
    """Everything that a piece of work is made from, as plain data; equal inputs mean that it need not be redone."""
    run = RunFolder(recipe.run_folder)
    data = recipe.datasets
    if work == "sft":
        return {
            "task": vars(recipe.task),
            "train": _dataset(data.train),
            "validation": _dataset(data.validation),
            "settings": recipe.sft,
            "seed": recipe.seed,
            "base": _local(recipe.sft["model_name_or_path"]),
        }
    if work == "cache":
        given = recipe.cache.teacher
        return {
            "task": vars(recipe.task),
            "train": _dataset(data.transfer or data.train),
            "validation": _dataset(data.validation),
            "settings": {name: value for name, value in vars(recipe.cache).items() if name not in SPEED_SETTINGS},
            "teacher": _local(given) if given else run.identity("sft"),
        }
    if work == "calibrate":
        settings = {**vars(recipe.calibrate), "methods": calibration_methods(recipe)}
        return {"settings": settings, "cache": run.identity("cache")}
    if work == "evaluate":
        return {
            "task": vars(recipe.task),
            "validation": _dataset(data.validation),
            "test": {name: _dataset(config) for name, config in data.test.items()},
            "settings": vars(recipe.evaluate),
            "made": {name: run.identity(name) for name in ("sft", "calibrate", *works_of(recipe, "distill"))},
        }
    arm = work.removeprefix("distill.")
    if recipe.arm_trainer(arm) == "sft":
        rows: dict = {
            "task": vars(recipe.task),
            "train": _dataset(data.train),
            "validation": _dataset(data.validation),
        }
    else:
        rows = {"cache": run.identity("cache")}
    return {
        "settings": recipe.arm_section(arm),
        "trainer": recipe.arm_trainer(arm),
        "recalibration": recalibration_of(recipe, arm),
        "seed": recipe.seed_of(arm),
        "base": _local(recipe.arm_section(arm)["model_name_or_path"]),
        **rows,
        "calibration": run.identity("calibrate") if needs_calibration(recipe, arm) else None,
    }


def reads_of(recipe: Recipe, work: str) -> list[str]:
    """What a piece of work reads, as people name it: models, files and folders."""
    run, data = recipe.run_folder, recipe.datasets
    if work == "sft":
        return [recipe.sft["model_name_or_path"], *_files(data.train)]
    if work == "cache":
        return [teacher_path(recipe), *_files(data.transfer or data.train), *_files(data.validation)]
    if work == "calibrate":
        return [str(run / "cache" / "validation")]
    if work == "evaluate":
        students = [str(run / "students" / student) for student in recipe.students]
        return [teacher_path(recipe), *students, f"{len(data.test)} test sets"]
    arm = work.removeprefix("distill.")
    rows = _files(data.train) if recipe.arm_trainer(arm) == "sft" else [str(run / "cache" / "train")]
    calibration = [str(run / "calibration.json")] if needs_calibration(recipe, arm) else []
    return [recipe.arm_section(arm)["model_name_or_path"], *rows, *calibration]


def _files(config) -> list[str]:
    if config is None:
        return []
    files = config.data_files or config.path
    return [files] if isinstance(files, str) else files


def is_current(recipe: Recipe, work: str) -> bool:
    """Whether a piece of work is finished and what it was made from has not changed."""
    return RunFolder(recipe.run_folder).is_current(work, inputs_of(recipe, work))


def require(recipe: Recipe, *works: str) -> None:
    """Check that earlier pieces of work are there.

    Raises:
        FileNotFoundError: one is missing; the message names the command that makes it.
    """
    for work in works:
        if work in works_of(recipe, work.split(".")[0]) and RunFolder(recipe.run_folder).identity(work) is None:
            raise FileNotFoundError(
                f"{recipe.run_folder} has no finished '{work}' yet. Run `first-trl {work.split('.')[0]} RECIPE`, or "
                "`first-trl run RECIPE` for everything."
            )


def join_processes(patient: bool = False):
    """Join the processes that `accelerate launch` started; returns accelerate's `PartialState`.

    Without an accelerator, accelerate takes each process for the only one unless it is told to use the CPU.

    Args:
        patient: processes that are done wait for the others as long as that takes; one that dies still ends the job.
    """
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the trainers' own states too
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return PartialState(cpu=use_cpu, **({"timeout": timedelta(days=30)} if patient else {}))


def run_work(recipe: Recipe, work: str, make: Callable[[bool], list[str]], patient: bool = False) -> None:
    """Make a piece of work unless it is current, and record it. The main process holds its lock meanwhile.

    Args:
        make: makes it on every process of the job, given whether this continues an interrupted attempt; returns the
            paths that it wrote, relative to the run folder.
        patient: see `join_processes`; for work whose processes do not train together.
    """
    from accelerate.utils import broadcast_object_list

    state, run = join_processes(patient), RunFolder(recipe.run_folder)
    with run.held(work) if state.is_main_process else nullcontext():
        inputs = inputs_of(recipe, work)
        decision: list = [None]
        if state.is_main_process:
            decision = ["current" if run.is_current(work, inputs) else run.start(work, inputs)]
            recipe.write_resolved(recipe.run_folder / "recipe.resolved.yaml")
        continues = broadcast_object_list(decision)[0]
        if continues == "current":
            say(f"{work}: up to date, nothing to do")
            return
        started = time.monotonic()
        outputs = make(continues)
        state.wait_for_everyone()
        if state.is_main_process:
            run.finish(work, inputs, outputs, time.monotonic() - started)
    read, written = ", ".join(reads_of(recipe, work)), ", ".join(str(recipe.run_folder / name) for name in outputs)
    say(f"{work}: read {read}; wrote {written} in {time.monotonic() - started:.0f} s; next: {_next(recipe, work)}")


def _next(recipe: Recipe, work: str) -> str:
    works = [each for stage in STAGES for each in works_of(recipe, stage)]
    return [*works, "push, or the report in a browser"][works.index(work) + 1]

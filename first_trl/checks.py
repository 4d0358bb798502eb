"""What is wrong with a recipe, every problem at once, before anything is trained; `run` and `plan` ask here first.

    first-trl plan RECIPE [--config_file configs/fsdp2.yaml] [--accelerator h100] [--utilisation 0.3] [--key value ...]

One pass over the rows, the tokenizers and configurations of the models, and a look at this machine; no weights are
read. What follows from recipe, rows and models is kept in the run folder, so that a second look is instant. What a
recipe file may say is checked before, by `first_trl.recipe`; what the jobs cost is `first_trl.plan`.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .constants import STAGES
from .data.loading import load_split
from .errors import FirstTrlError
from .files import read_json, write_atomically
from .log import RunLog, libraries_into, recording, screen, show, status
from .model_checks import model_problems, read_models
from .plan import ACCELERATORS, UTILISATION, Cost, Machine, Split, costs, describe, machine_limits, read_machine
from .recipe import Recipe, load_recipe
from .run import Run, positions_of

MOST_SHARED = 0.01  # of two splits to fit on: short texts repeat by chance; slices that overlap share more
SMALLEST_VALIDATION = 100  # rows; a calibration on fewer is a guess within a wide interval
# Trackers -> the modules, any of which serves them, where that is not one of the same name.
TRACKERS = {"azure_ml": ("azureml",), "flyte": ("flytekit",), "tensorboard": ("tensorboard", "tensorboardX")}


@dataclass
class Report:
    """What was found. Problems stop a run; what is unknown could not be looked up, and stops it on this machine."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)  # of each split
    disk: int = 0  # bytes that all jobs leave behind
    costs: list[Cost] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Everything that was found, each kind under its title."""
        titles = {"Rows dropped or cut": self.lost, "Could not be looked up": self.unknown}
        titles |= {"Warnings": self.warnings, "Problems": self.problems}
        found = {f"{title}:": dict.fromkeys(entries) for title, entries in titles.items() if entries}
        return [line for title in found for line in (title, *(f"  - {entry}" for entry in found[title]))]


@contextmanager
def _refusals_into(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Let a refusal end the block, and be a problem."""
    try:
        yield
    except FirstTrlError as error:
        problems.append(f"{prefix}{error}")


def check_recipe(
    recipe: Recipe, stages: Sequence[str] = STAGES, machine: Machine | None = None, *, here: bool = True
) -> Report:
    """Look for everything that would stop these stages later.

    Args:
        stages: those that are about to run; each looks at the splits and models that it reads.
        machine: the devices that they run on; one process by default.
        here: whether they run on this machine, whose packages, folders and accelerator are then looked at too. The
            report of an earlier look is then enough, and has no costs.
    """
    machine, run = machine or Machine(), Run(recipe)
    file, key = run.path / ".records" / "checks.json", _made_from(run)
    report = _remembered(file, key, stages) if here else None
    if report is None:
        with libraries_into(RunLog(os.devnull)), redirect_stderr(screen()):
            report = _look(recipe, stages, machine)
        if here and not report.unknown:
            content = {**vars(report), "costs": [], "made_from": key, "stages": list(stages)}
            with suppress(OSError):  # a folder that cannot be written to is a problem of its own
                write_atomically(file, json.dumps(content, indent=1))
    if here:
        report.problems, report.unknown = [*report.unknown, *report.problems], []
        report.problems += folder_problems(recipe.run_folder, report.disk)
        sections = {"sft": recipe.sft} if "sft" in stages and recipe.cache.teacher is None else {}
        sections |= {f"arms.{arm}": recipe.arm_section(arm) for arm in recipe.arms if "distill" in stages}
        for place, section in sections.items():
            report.problems += _section_problems(place, section, machine, report.rows)
    return report


def _made_from(run: Run) -> str:
    """A digest of everything that a look follows from, but for this machine."""
    inputs = {name: {**run.inputs(name), "jobs": None} for name in run.jobs}
    run.digests.save()
    versions = [version(name) for name in ("first-trl", "transformers", "datasets", "trl", "peft")]
    return hashlib.sha256(json.dumps([inputs, versions], sort_keys=True).encode()).hexdigest()


def _remembered(file: Path, key: str, stages: Sequence[str]) -> Report | None:
    """The report of an earlier look at these stages, or at more of them where it found no problem."""
    content = read_json(file) or {}
    if content.pop("made_from", None) != key:
        return None
    seen, report = set(content.pop("stages")), Report(**content)
    return report if seen == set(stages) or (seen > set(stages) and not report.problems) else None


def _look(recipe: Recipe, stages: Sequence[str], machine: Machine) -> Report:
    """What follows from the recipe, its rows and its models."""
    import datasets

    from .data.choices import room_to_write
    from .data.rows import with_stand_ins

    datasets.disable_progress_bars()  # of loading; encoding has a bar, under a terminal
    report, run = Report(), Run(recipe)
    configs, tokenizers = read_models(recipe, stages, report.problems, report.unknown)
    splits: dict[str, Split] = {}
    encoded: dict[str, Any] = {}
    for place, config, task in _sources(run, stages):
        name = place.removeprefix("datasets.")
        splits[name] = Split()
        try:
            rows = load_split(config, "train" if name in ("train", "transfer") else name.partition(".")[0])
            splits[name].rows = report.rows[name] = len(rows)
            if write := recipe.cache.write_answers if name == "transfer" else None:
                rows, task = with_stand_ins(rows, task), room_to_write(task, write)
            if tokenizers:
                encoded[name] = _check_split(report, recipe, place, config, task, rows, tokenizers, splits[name])
        except FirstTrlError as error:
            is_here = config.data_files is not None or Path(config.path).exists()
            text = str(error) if str(error).startswith(place) else f"{place}: {str(error).partition(': ')[2] or error}"
            (report.problems if is_here else report.unknown).append(text)
    _check_overlaps(report, recipe, encoded)
    tokenizer = next(iter(tokenizers.values()), ())
    longest = max((split.lengths[-1] for split in splits.values() if split.lengths), default=0)
    report.problems += model_problems(recipe, stages, configs, tokenizer or None, longest)
    report.costs = costs(recipe, run.jobs.values(), machine, splits, configs, len(tokenizer))
    report.disk = sum(cost.disk or 0 for cost in report.costs)
    for problem in dict.fromkeys(cost.problem for cost in report.costs if cost.problem):
        names = ", ".join(cost.name for cost in report.costs if cost.problem == problem)
        report.problems.append(f"{names}: {problem}")
    return report


# Rows


def _sources(run: Run, stages: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """(place in the recipe, where it comes from, task) of every split that these stages read."""
    from .evaluation import task_of_set

    recipe, read = run.recipe, {place for job in run.jobs.values() if job.stage in stages for place in job.data}
    for role in ("train", "transfer", "validation"):
        if (config := getattr(recipe.datasets, role)) and (f"datasets.{role}" in read or "evaluate" in stages):
            yield f"datasets.{role}", config, recipe.task
    for name, config in recipe.datasets.test.items() if "evaluate" in stages else ():
        yield f"datasets.test.{name}", config, task_of_set(recipe.task, config.task)


def _check_split(
    report: Report, recipe: Recipe, place: str, config, task, rows, tokenizers: dict, split: Split
) -> Any:
    """Encode every row of a split as its stages will; returns the encoded rows, and fills in report and split."""
    import datasets
    import numpy as np

    from .data.choices import encode_answer_row, forced_tokens, refuse_forced
    from .data.rows import describe_lost, encode_rows, learned_tokens, lost_rows

    _check_tokens(report, place, task, rows[0], tokenizers)
    tokenizer, labelled = next(iter(tokenizers.values())), place != "datasets.transfer"
    kept: list[int] = []
    try:
        kept = _check_choices(recipe, place, task, tokenizer, rows[0])
    except FirstTrlError as error:
        whose = "" if str(error).startswith(("datasets.", "task.")) and task == recipe.task else f"{place}: "
        report.problems.append(f"{whose}{error}")
    if screen().isatty():
        datasets.enable_progress_bars()
    encoded = encode_rows(rows, task, tokenizer, place=place, labelled=labelled)
    datasets.disable_progress_bars()
    if place == "datasets.validation" and len(rows) < SMALLEST_VALIDATION:
        few = f"{place} has {len(rows)} rows: a calibration on fewer than {SMALLEST_VALIDATION} is a guess"
        report.warnings.append(few)
    refused, lost = lost_rows(encoded, task, config.bad_rows)
    report.problems += _grouped(place, len(rows), {number: encoded[number]["problem"] for number in refused})
    if line := describe_lost(place, lost):
        (report.warnings if line.startswith("warning: ") else report.lost).append(line.removeprefix("warning: "))
    lengths_N = encoded.data.column("input_ids").combine_chunks().value_lengths().to_numpy()
    row_M, _, token_M = learned_tokens(encoded)
    split.tokens, split.supervised = int(lengths_N.sum()), len(row_M)
    if len(row_M) and place == "datasets.transfer" and (write := recipe.cache.write_answers):  # the most it may write
        lengths_N = np.where(lengths_N, lengths_N + write.max_new_tokens, 0)
        split.tokens = int(lengths_N.sum())
        split.supervised += write.max_new_tokens * int((lengths_N > 0).sum())
    if len(row_M):
        split.lengths = np.percentile(lengths_N[lengths_N > 0], range(101)).round().astype(int).tolist()
        number_R, start_R, count_R = np.unique(row_M, return_index=True, return_counts=True)
        if kept and len(wrong := number_R[(count_R != 1) | ~np.isin(token_M[start_R], kept)].tolist()):
            with _refusals_into(report.problems, f"{len(wrong):,} of {len(rows):,} rows, the first: "):
                encode_answer_row(rows[wrong[0]], wrong[0], task, tokenizer, kept, place)
        if place == "datasets.validation" and positions_of(recipe) == "answer":
            with _refusals_into(report.problems):
                at_R = start_R + np.minimum(forced_tokens(task, tokenizer, rows[0])["answer"], count_R - 1)
                refuse_forced(task, tokenizer, token_M[at_R])
    return encoded


def _check_choices(recipe: Recipe, place: str, task, tokenizer, first_row: dict) -> list[int]:
    """The tokens that a cache with `support: choices` keeps, else none; refuses choices that cannot be compared."""
    from .data.choices import choice_token_ids, has_answer, single_token_ids, unlabelled_encoder
    from .generation import answer_ends

    if task.choices:
        choice_token_ids(task, tokenizer, first_row)
    if place == "datasets.transfer" and recipe.cache.write_answers:
        answer_ends(task, tokenizer, first_row)
    elif place == "datasets.transfer" and not has_answer(task, first_row):
        if recipe.cache.backend != "hf":
            raise FirstTrlError(f"{place}: rows without labels need cache.backend: hf, not {recipe.cache.backend}")
        unlabelled_encoder(task, tokenizer, first_row, place)
    return single_token_ids(task, tokenizer, first_row) if recipe.cache.support == "choices" and task.choices else []


def _check_tokens(report: Report, place: str, task, row: dict, tokenizers: dict[str, Any]) -> None:
    """What makes a student see other tokens than its teacher: another vocabulary, template or first token."""
    from .cache.format import tokenizer_fingerprint
    from .data.encoding import check_first_row, first_row

    (whose, teacher), *others = tokenizers.items()
    seen = None
    with suppress(FirstTrlError):  # reported with the other rows
        seen = first_row(task, teacher, row)
    for other, tokenizer in others:
        what = f"{other}: {tokenizer.name_or_path}"
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(teacher):
            report.problems.append(f"{what}: its tokenizer is not that of {whose}; take models that share one")
        elif seen is not None:
            with _refusals_into(report.problems, f"{what}: {place}: "):
                check_first_row(seen, task, tokenizer)


def _grouped(place: str, rows: int, wrong: dict[int, str]) -> Iterator[str]:
    """Rows with the same problem together: how many, the first three, and what is wrong with the first."""
    groups: dict[str, list[int]] = {}
    for number, text in wrong.items():
        groups.setdefault(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", text), []).append(number)
    for members in groups.values():
        count = f"{len(members):,} of {rows:,} rows ({_first(members)}), the first"
        yield f"{place}: {count if len(members) > 1 else f'row {members[0]}'}: {wrong[members[0]]}"


def _first(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + ", ..." * (len(numbers) > 3)


def _check_overlaps(report: Report, recipe: Recipe, encoded: dict[str, Any]) -> None:
    """Rows of one split that another has too: figures on them flatter, and a calibration on learned rows is wrong."""
    from .data.rows import check_disjoint

    for found in check_disjoint(encoded):
        test = found.second.removeprefix("test.") if found.second.startswith("test.") else None
        if test and recipe.evaluate.allow_overlap:
            continue
        size = len(encoded[found.second])
        shared = f"datasets.{found.second}: {found.count:,} of its {size:,} prompts are in datasets.{found.first} too "
        shared += f"(rows {_first([here for _, here in found.rows])})"
        if test and recipe.datasets.test[test].overlap == "drop":
            report.lost.append(f"{shared}; they are dropped")
        elif test:
            report.problems.append(f"{shared}; remove them, set overlap: drop there, or evaluate.allow_overlap: true")
        elif found.count <= MOST_SHARED * size:
            report.warnings.append(shared)
        else:
            report.problems.append(f"{shared}; give it rows of its own: a model is over-confident on what it learned")


# This machine


def _section_problems(place: str, section: dict, machine: Machine, rows: dict[str, int]) -> Iterator[str]:
    """What a training asks of this machine and of the number of its processes."""
    trackers = section.get("report_to") or []
    for name in {trackers} if isinstance(trackers, str) else trackers:
        modules = TRACKERS.get(name, (name,))
        if name not in ("none", "all") and not any(map(find_spec, modules)):
            yield f"{place}.report_to: {name} is not installed; run `pip install {modules[0]}`, or set report_to: none"
    if str(section.get("attn_implementation")).startswith("flash_attention_2") and find_spec("flash_attn") is None:
        yield f"{place}.attn_implementation: flash_attn is not installed; run `pip install flash-attn`, or write sdpa"
    if machine.shards() > 1:
        from .training import missing_quant_storage

        if problem := missing_quant_storage(section):
            yield f"{place}.bnb_4bit_quant_storage: {problem}"
    half = next((key for key in ("bf16", "fp16") if section.get(key) and not section.get("use_cpu")), None)
    if half:
        import torch

        if not torch.accelerator.is_available():
            yield f"{place}.{half}: true, and this machine has no accelerator; write {half}: false or use_cpu: true"
    batch = section.get("per_device_train_batch_size", 8) * machine.processes
    fewest = min((count for name, count in rows.items() if name in ("train", "transfer")), default=batch)
    if section.get("dataloader_drop_last") and fewest < batch:
        yield f"{place}.dataloader_drop_last: true, and {fewest} rows are no batch of {batch}; write false"


def folder_problems(folder: Path, needed: int = 0) -> Iterator[str]:
    """Whether the run folder can be made and written to, and has room for `needed` bytes."""
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield f"output_dir: {there} cannot be written to ({error.strerror}); choose another output_dir"
        return
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(there).free + held
    if needed > free:
        room = f"has room for {free / 1e9:.1f} GB, and the run takes about {needed / 1e9:.1f} GB"
        yield f"output_dir: {there} {room}; free some, or choose an output_dir on another disk"


# Commands


def passed(recipe: Recipe, stages: Sequence[str], config_file: str | None = None, quiet: bool = False) -> bool:
    """Whether these stages may start here; whatever was found is printed, every problem at once, and logged.

    Raises:
        FirstTrlError: the run folder cannot be written to, or there is no such accelerate configuration.
    """
    started, machine = time.monotonic(), read_machine(config_file)
    if problems := list(folder_problems(recipe.run_folder)):  # there is no place for a log
        raise FirstTrlError("\n".join(Report(problems).lines()))
    with recording(recipe.run_folder / "log.txt", quiet=quiet):
        report = check_recipe(recipe, stages, machine)
        for line in report.lines():
            show(line)
        count, taken = len(report.problems), time.monotonic() - started
        found = f"{count} problem{'s' * (count > 1)}; nothing was started" if count else "no problems"
        status(f"checked {sum(report.rows.values()):,} rows, the models and this machine in {taken:.0f} s: {found}")
    return not report.problems


def main(argv: list[str]) -> int:
    """`first-trl plan`: print costs and problems; the exit status is 0 without problems and 2 with."""
    parser = argparse.ArgumentParser(prog="first-trl plan", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the experiment's YAML file")
    parser.add_argument("--config_file", help="an accelerate configuration; without one, a single process")
    parser.add_argument("--accelerator", default="h100", choices=ACCELERATORS, help="(default h100)")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help=f"share of its peak ({UTILISATION})")
    options, overrides = parser.parse_known_args(argv)
    if not 0 < options.utilisation <= 1:
        parser.error(f"--utilisation is {options.utilisation}; it is a share, above 0 and at most 1")
    recipe, machine = load_recipe(options.recipe, overrides), read_machine(options.config_file)
    machine = replace(machine, accelerator=options.accelerator, utilisation=options.utilisation)
    report = check_recipe(recipe, machine=machine, here=False)
    report.problems += machine_limits(recipe, machine, report.costs)
    print("\n".join([*describe(report.costs, machine), "", *report.lines()]))
    if not report.problems:
        print(f"\nNo problems found{' in what could be looked at' * bool(report.unknown)}.")
    return 2 if report.problems else 0

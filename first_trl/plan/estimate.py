"""What a recipe will cost, before it is run: rows, tokens, steps, bytes, memory, FLOPs, and what is wrong with it.

The rows are read and tokenised, the models are built without storage, and the rest is arithmetic. No weight is loaded.
What cannot be looked up, as a model of the Hub without a network, is said and left out; the rest is still planned.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..cache.identity import kept_tokens
from ..run import jobs_of
from .machine import Machine
from .memory import (
    Batch,
    Memory,
    Scorer,
    compute_dtype,
    scoring_cost,
    training_flops,
    training_memory,
)
from .rows import Split, cache_bytes, id_bytes, padded_tokens
from .sources import Sources


@dataclass
class Work:
    """One piece of work; None where a figure is not known or has no meaning."""

    name: str
    rows: int | None = None
    tokens: float | None = None  # of the rows, once
    supervised: float | None = None  # positions of the rows, once
    steps: int | None = None
    cache_bytes: int | None = None
    flops: float | None = None  # of the whole work
    hours: float | None = None
    memory: Memory | None = None


@dataclass
class Plan:
    """Every piece of work of a recipe, in order; what is wrong; and what could not be looked up."""

    machine: Machine
    works: list[Work]
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def make_plan(recipe, machine: Machine) -> Plan:
    """Plan a checked recipe for a machine."""
    sources = Sources(recipe)
    plan = Plan(machine, [])
    for stage in ("sft", "cache", "calibrate", "distill", "evaluate"):
        for name in jobs_of(recipe, stage):
            plan.works.append(_plan_work(recipe, name, sources, machine))
    plan.unknown = sources.unknown
    plan.problems = sources.problems + machine.problems(recipe, plan.works)
    return plan


def _plan_work(recipe, name: str, sources: Sources, machine: Machine) -> Work:
    if name == "cache":
        return _cache(recipe, sources, machine)
    if name == "calibrate":
        return _whole(Work(name), [sources.splits["validation"]])
    if name == "evaluate":
        return _evaluate(recipe, sources, machine)
    if name == "sft":
        section, role, on_labels = recipe.sft, "train", True
    else:
        arm = name.removeprefix("distill.")
        section, on_labels = recipe.arm_section(arm), recipe.arm_trainer(arm) == "sft"
        role = "train" if on_labels or recipe.datasets.transfer is None else "transfer"
    return _train(recipe, name, section, sources.splits[role], on_labels, sources, machine)


def _whole(work: Work, splits: list[Split]) -> Work:
    """The work with what its splits hold."""
    if all(split.rows for split in splits):
        work.rows = sum(split.rows for split in splits)
    if all(split.known for split in splits):
        work.tokens = sum(split.total(split.tokens) for split in splits)
        work.supervised = sum(split.total(split.supervised) for split in splits)
    return work


def _train(recipe, name, section, split, on_labels: bool, sources: Sources, machine: Machine) -> Work:
    work = _whole(Work(name), [split])
    args, model_args = _arguments(recipe, name, section, on_labels)
    packed = (args.max_length or recipe.task.max_length) if args.packing else None
    rows = work.rows
    if packed:
        rows = None if work.tokens is None else math.ceil(work.tokens / packed)
    if rows is None:
        return work
    work.steps = training_steps(args, rows, machine.processes)
    config = sources.config(model_args.model_name_or_path, model_args.model_revision)
    if config is None or work.supervised is None:
        return work
    batch = args.per_device_train_batch_size
    per_row = work.supervised / rows
    longest = packed or int(split.tokens.max())
    try:
        work.memory, per_token = training_memory(
            config, args, model_args, Batch(batch, longest, math.ceil(batch * per_row)), machine
        )
    except ValueError as error:
        sources.problems.append(f"{name}: {error}")
        return work
    seen = batch * args.gradient_accumulation_steps * machine.processes * work.steps
    width = packed or padded_tokens(split.tokens, batch)
    work.flops = training_flops(config, per_token, seen, width, seen * per_row)
    work.hours = machine.hours(work.flops, compute_dtype(args, model_args))
    return work


def _arguments(recipe, name: str, section: dict, on_labels: bool):
    """TRL's own dataclasses of a section, and so TRL's defaults; made as for a CPU, which every machine has."""
    from trl import SFTConfig

    from ..first_config import FIRSTConfig
    from ..training import training_arguments

    section = {key: value for key, value in section.items() if not key.startswith("recalibration_")}
    config_class = SFTConfig if on_labels else FIRSTConfig
    return training_arguments({**section, "use_cpu": True}, config_class, Path(name), recipe.seed)


def training_steps(args, rows: int, processes: int) -> int:
    """Optimizer steps of a training run, as transformers' Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(rows / (args.per_device_train_batch_size * processes))
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * per_epoch)


def _cache(recipe, sources: Sources, machine: Machine) -> Work:
    settings = recipe.cache
    splits = [sources.splits.get("transfer") or sources.splits.get("train"), sources.splits["validation"]]
    splits = [split for split in splits if split is not None]
    work = _whole(Work("cache"), splits)
    if work.rows is None or work.supervised is None:
        return work
    layout = {name: getattr(settings, name) for name in ("dtype", "rows_per_shard")}
    layout["top_k"] = kept_tokens(recipe)
    closed = recipe.task.choices is not None and work.supervised <= 2 * work.rows  # the answer, and perhaps its end
    layout["bytes_of_id"] = id_bytes(settings.support, closed, len(sources.tokenizer))
    work.cache_bytes = sum(cache_bytes(split, **layout) for split in splits)
    teacher = _scorer(recipe, sources, "teacher", settings.tokens_per_batch)
    if teacher is not None and settings.backend != "server":
        work.memory, work.flops = scoring_cost(teacher, splits, work.supervised)
        work.hours = machine.hours(work.flops, teacher.dtype)
    return work


def _evaluate(recipe, sources: Sources, machine: Machine) -> Work:
    splits = [split for name, split in sources.splits.items() if name == "validation" or name.startswith("test.")]
    work = _whole(Work("evaluate"), splits)
    times = {"teacher": 1, "student": len(recipe.students) + 1} if recipe.arms else {"teacher": 1}  # the base too
    found = [_scorer(recipe, sources, whose, recipe.evaluate.tokens_per_batch) for whose in times]
    models = [model for model in found if model is not None]
    if work.rows is None or work.tokens is None or len(models) < len(times):
        return work
    costs = [scoring_cost(model, splits, work.rows) for model in models]
    work.flops = sum(count * flops for count, (_, flops) in zip(times.values(), costs, strict=True))
    work.memory = max((memory for memory, _ in costs), key=lambda memory: memory.total)
    work.hours = machine.hours(work.flops, models[-1].dtype)
    return work


def _scorer(recipe, sources: Sources, whose: str, tokens_per_batch: int) -> Scorer | None:
    from ..training import teacher_section

    path, revision = sources.models()[whose]
    config = sources.config(path, revision) if path else None
    if config is None:
        return None
    section = teacher_section(recipe) if whose == "teacher" else recipe.distill
    return Scorer(
        config,
        section.get("dtype", "float32"),
        section.get("attn_implementation"),
        bool(section.get("load_in_4bit")),
        tokens_per_batch,
    )

"""What a recipe costs, by formula: rows, tokens, steps, bytes on disk, memory of each device, FLOPs and hours.

The rows are counted by `first_trl.checks`, the models are built without storage, and the rest is arithmetic, within
30 % of a real run. No weights are read.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FirstTrlError
from .recipe import Recipe, teacher_section

# Devices by their makers' dense peak: title, TFLOPS in bfloat16 (None: it has none) and in float32, memory in GB.
ACCELERATORS: dict[str, tuple[str, float | None, float, float]] = {
    "h100": ("NVIDIA H100 SXM", 989, 67, 80),
    "h200": ("NVIDIA H200 SXM", 989, 67, 141),
    "a100": ("NVIDIA A100 80GB", 312, 19.5, 80),
    "l40s": ("NVIDIA L40S", 362, 91.6, 48),
    "l4": ("NVIDIA L4", 121, 30.3, 24),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 165, 82.6, 24),
    "t4": ("NVIDIA T4", None, 8.1, 16),
    "mi300x": ("AMD Instinct MI300X", 1307, 163, 192),
}
UTILISATION = 0.3  # of the peak: what well-fed training of small batches reaches
# Numbers of optimizer state for each trained parameter, by a part of the optimizer's name; AdamW's two otherwise.
STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "adagrad": 1, "rmsprop": 1}
TILE_BYTES = 2**25  # of the logits that `first_trl.head` holds at one time
# Bytes in a cache after compression, measured: of a row, a position's tail, a kept log-probability; and of the bits of
# a token id the share that remains.
ROW, TAIL, LOG_PROB, ID_SHARE = 42, 2.9, {"float16": 1.6, "float32": 3.4}, 0.75


@dataclass(frozen=True)
class Machine:
    """`processes` devices of one kind, each with one process; `kind` is accelerate's distributed_type."""

    processes: int = 1
    kind: str = "NO"
    zero_stage: int = 0
    accelerator: str = "h100"
    utilisation: float = UTILISATION

    def shards(self, gradients: bool = False) -> int:
        """Over how many devices the weights are sharded, or gradients and optimizer."""
        return self.processes if self.kind == "FSDP" or self.zero_stage >= (2 if gradients else 3) else 1

    def hours(self, flops: float, dtype: str | None) -> float | None:
        """Hours on all devices together; None where the accelerator has no such type."""
        _, bfloat16, float32, _ = ACCELERATORS[self.accelerator]
        tflops = bfloat16 if dtype in ("bfloat16", "float16", "auto") else float32
        return None if tflops is None else flops / (tflops * 1e12 * self.utilisation * self.processes) / 3600


def read_machine(config_file: str | None) -> Machine:
    """The devices of an accelerate configuration; one process without a file."""
    if config_file is None:
        return Machine()
    if not Path(config_file).is_file():
        raise FirstTrlError(f"There is no {config_file}; give an accelerate configuration, such as configs/cpu.yaml.")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(config_file)
    except (ValueError, TypeError, KeyError) as error:
        raise FirstTrlError(f"--config_file {config_file} is no accelerate configuration: {error}") from error
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    stage = int((getattr(config, "deepspeed_config", None) or {}).get("zero_stage", 0))
    return Machine(config.num_processes or 1, kind, stage)


@dataclass
class Split:
    """Counts of a split's encoded rows; `tokens` is None where no tokenizer could be read."""

    rows: int = 0
    tokens: int | None = None
    supervised: int = 0
    lengths: list[int] = field(default_factory=list)  # in tokens, the 0th to the 100th percentile


@dataclass
class Cost:
    """One job; None where a figure is not known or has no meaning."""

    name: str
    rows: int | None = None
    tokens: int | None = None  # of the rows, once
    supervised: int | None = None  # positions of the rows, once
    steps: int | None = None
    disk: int | None = None  # bytes that it leaves behind: shards, or a student with its last checkpoint
    flops: float | None = None  # of the whole job
    hours: float | None = None
    memory: dict[str, int] = field(default_factory=dict)  # bytes on each device at the moment of most
    problem: str | None = None  # why it cannot run as its section says


def build_on_meta(config, dtype: str | None = None, peft_config=None):
    """The model of a configuration, with its adapter, without storage; a FirstTrlError where there is none such."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    chosen = getattr(torch, dtype) if dtype not in (None, "auto") else getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen)
            return model if peft_config is None else get_peft_model(model.requires_grad_(False), peft_config)
    except Exception as error:  # whatever the values of a broken config.json lead to, a division by zero too
        reason = str(error) if peft_config is not None else f"no model is as its config.json says: {error}"
        raise FirstTrlError(f"{reason} ({type(error).__name__}); correct it, or fetch the model again") from error


class Size(NamedTuple):
    """Numbers of parameters (`active`: of the blocks, that one token passes through), and bytes of the weights."""

    active: int
    trained: int
    frozen_bytes: int
    trained_bytes: int
    outside_bytes: int  # of embeddings and head, which a sharded run gathers to compute


def size_of(model, bits: int = 16, trained_itemsize: int | None = None) -> Size:
    """Parameters and bytes of a model: frozen matrices in `bits`, each trained number in `trained_itemsize` bytes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    outside = {*base.get_input_embeddings().parameters(), *base.get_output_embeddings().parameters()}
    packed = {8: 1.0, 4: 0.5 + 4 / 64}.get(bits)  # bytes, with the scales
    text = base.config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    passed = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    active = trained = frozen_bytes = trained_bytes = outside_bytes = 0.0
    for name, weight in model.named_parameters():
        count, is_outside = weight.numel(), weight in outside
        active += 0 if is_outside else count * (passed if ".experts." in name else 1)
        outside_bytes += count * weight.itemsize if is_outside else 0
        if weight.requires_grad:
            trained += count
            trained_bytes += count * (trained_itemsize or weight.itemsize)
        else:
            # bitsandbytes leaves the experts of a mixture, which are one tensor of three dimensions, as they are
            frozen_bytes += count * (packed if packed and weight.ndim == 2 and not is_outside else weight.itemsize)
    return Size(*map(round, (active, trained, frozen_bytes, trained_bytes, outside_bytes)))


def block_elements(config, dropout: bool = False) -> int:
    """Numbers that one block keeps of each token for its backward: 17 D for the classic block of I = 4 D."""
    # Two norms and two residuals, queries, keys, values and the output of attention, and the middle of the MLP, four
    # times where it is gated. With `dropout` an adapter keeps its own copy of the input of every matrix.
    text = config.get_text_config()
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", 1)
    head = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * head, (getattr(text, "num_key_value_heads", None) or heads) * head
    middle = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
    middle *= getattr(text, "num_experts_per_tok", None) or 1
    gated = 4 if getattr(text, "hidden_act", None) in ("silu", "gelu_pytorch_tanh", "swish") else 2
    return (5 + 5 * dropout) * hidden + (3 + dropout) * queries + 2 * keys + (gated + dropout) * middle


def head_flops(config, positions: float, backward: bool) -> float:
    """2NVD to read the head once, and as much again for the gradient of the hidden states."""
    text = config.get_text_config()
    return 2 * positions * text.vocab_size * text.hidden_size * (2 if backward else 1)


def training_steps(args, rows: int, processes: int) -> int:
    """Optimizer steps of a training run, as transformers' Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(rows / (args.per_device_train_batch_size * processes))
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def costs(
    recipe: Recipe, jobs: Iterable[Any], machine: Machine, splits: dict[str, Split], configs: dict, vocab_size: int
) -> list[Cost]:
    """The cost of every job of a recipe, by the splits, the configurations and the tokenizer that could be read."""
    found = []
    for job in jobs:
        names, trains = [place.removeprefix("datasets.") for place in job.data], job.stage in ("sft", "distill")
        if trains:
            on_labels = job.stage == "sft" or recipe.arm_trainer(job.name.removeprefix("distill.")) == "sft"
            names = ["train" if on_labels or recipe.datasets.transfer is None else "transfer"]
        read = [splits[name] for name in names if name in splits]
        cost = Cost(job.name, sum(split.rows for split in read) or None)
        known = bool(read) and all(split.tokens is not None for split in read)
        if known:
            cost.tokens = sum(split.tokens or 0 for split in read)
            cost.supervised = sum(split.supervised for split in read)
        try:
            if trains:
                _train(recipe, cost, on_labels, read[0] if read else Split(), machine, configs)
            elif job.stage in ("cache", "evaluate") and known and all(split.lengths for split in read):
                _score(recipe, cost, max(split.lengths[-1] for split in read), machine, configs)
        except (ValueError, TypeError) as error:  # of TRL's or PEFT's arguments, or of an adapter that does not fit
            cost.problem = " ".join(str(error).split())
        if job.stage == "cache" and known:
            settings, bytes_of_id = recipe.cache, ID_SHARE * math.log2(vocab_size) / 8
            top_k = len(recipe.task.choices or ()) if settings.support == "choices" else settings.top_k
            of_position = TAIL + top_k * (LOG_PROB[settings.dtype] + bytes_of_id)
            of_rows = (split.rows * ROW + (split.tokens or 0) * bytes_of_id for split in read)
            cost.disk = round(sum(of_rows) + sum(split.supervised for split in read) * of_position)
        found.append(cost)
    return found


def _train(recipe: Recipe, cost: Cost, on_labels: bool, split: Split, machine: Machine, configs: dict) -> None:
    """Fill in the steps, disk, memory, FLOPs and hours of a training, as far as rows and configuration are known."""
    from trl import SFTConfig, get_peft_config

    from .first_config import FIRSTConfig
    from .training import second_round_steps, training_arguments

    section = recipe.sft if cost.name == "sft" else recipe.arm_section(cost.name.removeprefix("distill."))
    given = {key: value for key, value in section.items() if not key.startswith("recalibration_")} | {"use_cpu": True}
    args, model_args = training_arguments(given, SFTConfig if on_labels else FIRSTConfig, Path(cost.name), 0)
    config, packed = configs.get(section["model_name_or_path"]), args.max_length if args.packing else None
    rows = math.ceil((split.tokens or 0) / packed) if packed else split.rows
    if rows:
        cost.steps = training_steps(args, rows, machine.processes)
        if cost.name != "sft" and recipe.has_second_round(cost.name.removeprefix("distill.")):
            cost.steps += second_round_steps(cost.steps)
    if config is None or not split.lengths or not cost.steps:
        return
    adapter, batch, text = model_args.use_peft, args.per_device_train_batch_size, config.get_text_config()
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else model_args.dtype
    itemsize = 2 if dtype in ("bfloat16", "float16", "auto") else 4
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16
    # TRL holds the adapter of a quantised base in bfloat16, and PEFT any other in float32
    trained = (2 if bits < 16 and itemsize == 2 else 4) if adapter else None
    size = size_of(build_on_meta(config, model_args.dtype, get_peft_config(model_args)), bits, trained)
    block = block_elements(config, dropout=bool(adapter and model_args.lora_dropout))
    again = args.gradient_checkpointing  # blocks are computed again in the backward
    kept = text.num_hidden_layers * (text.hidden_size if again else block) + (block if again else 0)
    moments = next((count for name, count in STATES.items() if name in args.optim.value), 2)
    states = moments * (size.trained if "8bit" in args.optim.value else size.trained_bytes)
    positions = batch * split.supervised / rows
    weights = size.frozen_bytes + (0 if adapter else size.trained_bytes)
    gathered = size.outside_bytes + 2 * weights // text.num_hidden_layers if machine.shards() > 1 else 0
    cost.memory = {
        "weights": weights // machine.shards() + gathered,
        "adapter": size.trained_bytes // machine.shards() if adapter else 0,
        "gradients": size.trained_bytes // machine.shards(gradients=True),
        "optimizer": states // machine.shards(gradients=True),
        "activations": round(batch * (packed or split.lengths[-1]) * kept * itemsize),
        "head": round(positions * text.hidden_size * (itemsize + 8)) + TILE_BYTES,
    }
    checkpoints = 0 if args.save_strategy == "no" else args.save_total_limit or 1
    cost.disk = size.trained_bytes + checkpoints * (size.trained_bytes + states)
    batches = args.gradient_accumulation_steps * machine.processes * cost.steps
    # 2 operations forward, 2 for the gradient of what flows back, 2 for that of trained weights, 2 to compute again
    operations = (4 if adapter else 6) + (2 if again else 0)
    tokens = batches * batch * (packed or split.lengths[round(100 * batch / (batch + 1))])  # the longest of a batch
    cost.flops = tokens * operations * size.active + head_flops(config, batches * positions, backward=True)
    cost.hours = machine.hours(cost.flops, dtype)


def _score(recipe: Recipe, cost: Cost, longest: int, machine: Machine, configs: dict) -> None:
    """The teacher over the cached splits, or every model over validation and the test sets."""
    section, caching = teacher_section(recipe), cost.name == "cache"
    models = [(recipe.cache.teacher or recipe.sft["model_name_or_path"], section, 1)]
    if not caching and "model_name_or_path" in recipe.distill:
        models.append((recipe.distill["model_name_or_path"], recipe.distill, len(recipe.students) + 1))  # and the base
    if (caching and recipe.cache.backend == "server") or any(path not in configs for path, *_ in models):
        return
    tokens, rows = cost.tokens or 0, cost.rows or 1
    in_batch = max(longest, min((recipe.cache if caching else recipe.evaluate).tokens_per_batch, tokens))
    positions, cost.flops = (cost.supervised or 0) if caching else rows, 0.0
    for path, how, times in models:
        config, model = configs[path], build_on_meta(configs[path], how.get("dtype") or "float32")
        size = size_of(model.requires_grad_(False), 4 if how.get("load_in_4bit") else 16)
        hidden, itemsize = config.get_text_config().hidden_size, model.dtype.itemsize
        memory = {
            "weights": size.frozen_bytes,
            # one block at a time: its input, its output, and the middle of its MLP
            "activations": in_batch * itemsize * (block_elements(config) // 2 + hidden),
            "head": round(positions / rows * in_batch / longest * hidden * itemsize) + TILE_BYTES,
        }
        cost.memory = max(cost.memory, memory, key=lambda held: sum(held.values()))
        cost.flops += times * (2 * tokens * size.active + head_flops(config, positions, backward=False))
    cost.hours = machine.hours(cost.flops, section.get("dtype"))


def machine_limits(recipe: Recipe, machine: Machine, found: list[Cost]) -> Iterator[str]:
    """What the jobs ask of these devices that they do not have."""
    title, bfloat16, _, memory = ACCELERATORS[machine.accelerator]
    sections = {"sft": recipe.sft} | {f"arms.{arm}": recipe.arm_section(arm) for arm in recipe.arms}
    for name, section in sections.items():
        if bfloat16 is None and (section.get("bf16") or section.get("dtype") == "bfloat16"):
            yield f"{name}: {title} has no bfloat16; write float16 or choose another"
    for cost in found:
        if sum(cost.memory.values()) > memory * 1e9:
            parts = ", ".join(f"{part} {_bytes(size)}" for part, size in cost.memory.items() if size)
            yield (
                f"{cost.name}: needs {_bytes(sum(cost.memory.values()))} on each device ({parts}), more than {title} "
                "has; lower per_device_train_batch_size or tokens_per_batch, write gradient_checkpointing: true or "
                "load_in_4bit: true, or shard the weights (configs/fsdp2.yaml)"
            )


def describe(found: list[Cost], machine: Machine) -> list[str]:
    """The costs as lines of text."""
    table: list[tuple] = [("", "rows", "tokens", "supervised", "steps", "on disk", "memory", "FLOPs", "hours")]
    for cost in found:
        counts = ("-" if n is None else f"{n:,}" for n in (cost.rows, cost.tokens, cost.supervised, cost.steps))
        sizes = map(_bytes, (cost.disk, sum(cost.memory.values()) or None))
        floats = ("-" if n is None else "< 0.01" if n < 0.01 else f"{n:.2g}" for n in (cost.flops, cost.hours))
        table.append((cost.name, *counts, *sizes, *floats))
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return [
        *("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in table),
        "",
        "Rows, tokens and supervised positions are those of one pass over a split; FLOPs are the whole job's, padding "
        "included.",
        f"Memory: of each device at its peak, within 30 %. Hours: {machine.processes} x "
        f"{ACCELERATORS[machine.accelerator][0]} at {100 * machine.utilisation:.0f} % of the published peak, which is "
        "an assumption.",
    ]


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if value >= size), ("kB", 1e3))
    return f"{value / size:.1f} {unit}"

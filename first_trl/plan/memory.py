"""Bytes and FLOPs of the two things that a recipe does with a model: train it, and run it over rows.

From what was counted on the meta device (`first_trl.plan.footprint`) to what one device of a machine holds and
computes.
"""

import math
from dataclasses import dataclass

import torch

from ..scoring import length_batches
from .footprint import (
    attention_flops,
    build_on_meta,
    count_step,
    head_chunk_bytes,
    head_flops,
    optimizer_bytes,
    weights_of,
)
from .machine import Machine
from .rows import Split

_PROBE = 64  # tokens that multiplications per token are counted with; all but attention's are proportional


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the moment of most."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head_chunk: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Batch:
    """One step of one device: rows, their longest row in tokens, and the supervised positions of all."""

    rows: int
    tokens: int
    positions: int


def compute_dtype(args, model_args) -> str | None:
    """The type that activations have: that of mixed precision where it is on, else the weights'."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else model_args.dtype


def training_memory(config, args, model_args, batch: Batch, machine: Machine) -> tuple[Memory, float]:
    """(memory, FLOPs per token without attention and head) of a training step.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    from trl import get_peft_config

    model = build_on_meta(
        config,
        dtype=compute_dtype(args, model_args),
        attn_implementation=model_args.attn_implementation,
        peft_config=get_peft_config(model_args),
    )
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16
    mixed, given = args.bf16 or args.fp16, getattr(torch, str(model_args.dtype), None)
    # TRL holds the adapter of a quantised base in bfloat16, and PEFT any other in float32; see adapters_to_float32
    adapter = torch.bfloat16 if bits < 16 and mixed else torch.float32
    weights = weights_of(
        model,
        bits=bits,
        nested=model_args.use_bnb_nested_quant,
        trained_dtype=adapter if model_args.use_peft else given,
        frozen_dtype=given,
    )
    step = count_step(model, batch.rows, batch.tokens, backward=True, checkpointing=args.gradient_checkpointing)
    head = head_chunk_bytes(config, batch.positions, next(model.parameters()).dtype.itemsize, backward=True)
    gathered = 2 * weights.largest_block + weights.outside_blocks if machine.shards_weights else 0
    buckets = weights.trained if machine.processes > 1 and not machine.shards_gradients else 0  # DDP's
    optimizer = optimizer_bytes(str(args.optim.value), weights.trained_parameters, weights.trained)
    held = weights.frozen + (0 if model_args.use_peft else weights.trained)
    memory = Memory(
        weights=held // machine.shards + gathered,
        adapter=weights.trained // machine.shards if model_args.use_peft else 0,
        gradients=weights.trained // machine.gradient_shards + buckets,
        optimizer=optimizer // machine.gradient_shards,
        activations=max(step.peak_bytes - head, step.saved_bytes) + weights.dequantised,
        head_chunk=head,
    )
    probe = count_step(model, 1, _PROBE, backward=True, checkpointing=args.gradient_checkpointing)
    return memory, probe.flops / _PROBE


def training_flops(config, per_token: float, rows: float, width: float, positions: float) -> float:
    """FLOPs of a training run over `rows` rows of `width` tokens, padding included, in all steps of all devices."""
    attention = attention_flops(config, rows, width, backward=True)
    return rows * width * per_token + attention + head_flops(config, positions, backward=True)


@dataclass(frozen=True)
class Scorer:
    """A model that is run over rows, by `first_trl.scoring`."""

    config: object
    dtype: str | None
    attn_implementation: str | None
    load_in_4bit: bool
    tokens_per_batch: int


def scoring_cost(scorer: Scorer, splits: list[Split], positions: float) -> tuple[Memory, float]:
    """(memory, FLOPs) of the forward over whole splits, in batches of equal lengths."""
    model = build_on_meta(scorer.config, dtype=scorer.dtype, attn_implementation=scorer.attn_implementation)
    model.requires_grad_(False)
    weights = weights_of(model, bits=4 if scorer.load_in_4bit else 16)
    longest = max(int(split.tokens.max()) for split in splits)
    rows = max(1, min(scorer.tokens_per_batch // longest, max(split.rows for split in splits)))
    step = count_step(model, rows, longest, backward=False)
    in_batch = math.ceil(rows * positions / sum(split.rows for split in splits))
    head = head_chunk_bytes(scorer.config, in_batch, next(model.parameters()).dtype.itemsize, backward=False)
    activations = max(step.peak_bytes - head, step.saved_bytes) + weights.dequantised
    memory = Memory(weights.frozen, 0, 0, 0, activations, head)
    per_token = count_step(model, 1, _PROBE, backward=False).flops / _PROBE
    flops = head_flops(scorer.config, positions, backward=False)
    for split in splits:
        lengths = split.tokens.tolist()
        for batch in length_batches(lengths, scorer.tokens_per_batch):
            width = lengths[batch[0]]
            own = len(batch) * width * per_token
            own += attention_flops(scorer.config, len(batch), width, backward=False)
            flops += own * split.rows / len(lengths)
    return memory, flops

"""Bytes and FLOPs of a model's step, counted on tensors without storage: no weight is loaded, nothing is multiplied.

The model is built from its configuration on torch's meta device, and its real forward and backward run there, so that
adapters, gradient checkpointing and every family of models are counted by the code that will run. Attention is
counted as the fused kernels have it, which keep no (tokens, tokens) matrix, unless the recipe asks for `eager`. What
is not counted: the head, which `first_trl.head` reads in tiles (`head_chunk_bytes`), libraries, and fragmentation.

Shapes: B rows, T tokens, N supervised positions, D hidden, V vocabulary.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..head import _TILE_ELEMENTS, CHUNK_SIZE

_COUNTED = "first_trl_counted"  # the name of the attention below
# Optimizer state per trained parameter, in numbers of the parameter's type or in bytes; AdamW's two moments otherwise.
_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "adagrad": 1, "rmsprop": 1}


@dataclass(frozen=True)
class Weights:
    """Bytes of a model at rest, before anything is shared out over devices."""

    frozen: int
    trained: int
    trained_parameters: int
    largest_block: int  # the transformer block with the most bytes, which a sharded run makes whole to compute
    outside_blocks: int  # embeddings, final norm and head, which a sharded run holds whole while it computes
    dequantised: int  # the largest 4-bit or 8-bit matrix, made whole to be multiplied


@dataclass(frozen=True)
class Step:
    """One forward, or forward and backward, of the backbone over B rows of T tokens."""

    saved_bytes: int  # alive when the head begins
    peak_bytes: int  # most alive at one time, head and weights left out
    flops: int


class _CountedAttention(torch.autograd.Function):
    """A fused attention's shapes: it keeps its inputs, its output and one number per query."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Meter(TorchDispatchMode):
    """Follows every storage that operations make until it is freed, and adds up their multiplications."""

    def __init__(self, known: Iterator[torch.Tensor]):
        super().__init__()
        self.live, self.peak, self.flops = 0, 0, 0
        self.known: dict[int, weakref.ref | None] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in flop_registry:
            self.flops += flop_registry[operation.overloadpacket](*args, **(kwargs or {}), out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf.untyped_storage())
        return output

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known[key] = weakref.ref(storage, lambda _: self._part(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _part(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


def build_on_meta(config, *, dtype: str | None, attn_implementation: str | None, peft_config=None):
    """The model of a configuration, with its adapter, without storage.

    Args:
        dtype: of the weights; None for the configuration's own.
        attn_implementation: as the recipe has it; all but `eager` are counted as one fused kernel.
    """
    from peft import get_peft_model
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_COUNTED, lambda module, q, k, v, mask, **_: (_attend(q, k, v), None))
    chosen = getattr(torch, dtype) if dtype not in (None, "auto") else getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=chosen,
            attn_implementation="eager" if attn_implementation == "eager" else _COUNTED,
        )
    if peft_config is not None:
        model.requires_grad_(False)
        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
    return model.to("meta")


def _attend(query, key, value) -> torch.Tensor:
    return _CountedAttention.apply(query, key, value).transpose(1, 2)


def weights_of(
    model,
    *,
    bits: int = 16,
    nested: bool = False,
    trained_dtype: torch.dtype | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> Weights:
    """Bytes of a model's weights.

    Args:
        bits: 4 or 8 where the matrices of the blocks are quantised; anything else leaves them as they are.
        nested: whether the scales of 4-bit weights are quantised too.
        trained_dtype, frozen_dtype: of what is trained and of what is not, where that is not as built: under mixed
            precision a model computes in another type than it is held in.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dense, quantised = set(base.get_output_embeddings().parameters()), set()
    if bits in (4, 8):
        for module in base.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and module.weight not in dense:
                quantised.add(module.weight)
    per_weight = {8: 1.0, 4: 0.5 + (1 / 64 + 4 / (64 * 256) if nested else 4 / 64)}.get(bits, 0.0)

    def size(parameter) -> float:
        held = (trained_dtype if parameter.requires_grad else frozen_dtype) or parameter.dtype
        return parameter.numel() * (per_weight if parameter in quantised else held.itemsize)

    blocks = [sum(map(size, block.parameters())) for block in _blocks(base)]
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    total = sum(map(size, every))
    return Weights(
        frozen=round(total - sum(map(size, trained))),
        trained=round(sum(map(size, trained))),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        largest_block=round(max(blocks, default=0)),
        outside_blocks=round(total - sum(blocks)),
        dequantised=max((parameter.numel() * parameter.dtype.itemsize for parameter in quantised), default=0),
    )


def _blocks(model) -> list[torch.nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def optimizer_bytes(optim: str, trained_parameters: int, trained: int) -> int:
    """Bytes of the optimizer's state: AdamW's two moments unless the name says otherwise."""
    states = next((count for name, count in _STATES.items() if name in optim), 2)
    return states * (trained_parameters if "8bit" in optim else trained)


def count_step(model, rows: int, tokens: int, *, backward: bool, checkpointing: bool = False) -> Step:
    """Run the backbone over (rows, tokens) and, with `backward`, back from a gradient of its hidden states."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if checkpointing and backward:
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        base.enable_input_require_grads()
    model.train(backward)
    ids_BT = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    # A mask of four dimensions is taken as it is; any other is looked into, and there is nothing to see
    mask_B1TT = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
    known = [*model.parameters(), *model.buffers(), ids_BT, mask_B1TT]
    with torch.set_grad_enabled(backward), _Meter(iter(known)) as meter:
        hidden_BTD = base.base_model(input_ids=ids_BT, attention_mask=mask_B1TT, use_cache=False).last_hidden_state
        saved = meter.live
        if backward and hidden_BTD.requires_grad:
            hidden_BTD.backward(torch.empty_like(hidden_BTD))
    for parameter in model.parameters():
        parameter.grad = None
    return Step(saved_bytes=saved, peak_bytes=meter.peak, flops=meter.flops)


def attention_flops(config, rows: float, tokens: float, *, backward: bool) -> float:
    """Multiplications of queries, keys and values, twice each: what the fused kernel does, without skipping a half.

    The backward computes the scores again and four products from them: 2.5 times the forward.
    """
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    forward = 4 * rows * tokens**2 * text.num_attention_heads * head_dim * text.num_hidden_layers
    return forward * (3.5 if backward else 1)


def head_flops(config, positions: float, *, backward: bool) -> float:
    """2NVD to read the head once, and as much again for the gradient of the hidden states."""
    text = config.get_text_config()
    return 2 * positions * text.vocab_size * text.hidden_size * (2 if backward else 1)


def head_chunk_bytes(config, positions: int, itemsize: int, *, backward: bool) -> int:
    """What the head holds beside the weights: hidden states, their gradients in float32, and a tile of logits."""
    text = config.get_text_config()
    rows = min(CHUNK_SIZE, max(positions, 1))
    tile = rows * max(1, min(_TILE_ELEMENTS // rows, math.ceil(text.vocab_size / 2)))
    hidden = positions * text.hidden_size
    return (
        hidden * itemsize + (hidden * (4 + 4) if backward else 0) + tile * (2 * 4 + (itemsize if itemsize < 4 else 0))
    )

"""How a `transformers` causal language model exposes its backbone and its head, and the forward that distils.

`add_partition_head` gives a model a second way to be called: with `partition_ids` it runs the backbone, projects only
the supervised positions and returns log-probabilities of the K teacher tokens and of the tail, never logits. The call
goes through whatever wraps the model (PEFT, DDP, FSDP, DeepSpeed), so gradients synchronise as in any other step.
The mathematics of the head is in `first_trl.head`; nothing here knows the teacher's probabilities.

Shapes: B batch, T tokens, N supervised positions, D hidden, V vocabulary, K kept tokens.
"""

import functools
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .constants import IGNORED
from .head import partition_log_probs_and_tail_max, selected_logits


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    quantization_config=None,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """A causal language model in evaluation mode: a Hub id, a model folder, or an adapter folder with its base.

    Args:
        path: model id or folder; a folder with `adapter_config.json` is loaded on the base that it names.
        dtype: `float32`, `bfloat16`, ... of the weights that are not quantised.
        quantization_config: `transformers.BitsAndBytesConfig` for a 4-bit base, or None.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    is_adapter = (Path(path) / "adapter_config.json").is_file()
    auto_class = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    model = auto_class.from_pretrained(
        path,
        revision=revision,
        dtype=dtype,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device_map=None if quantization_config is None else {"": device},
    )
    if quantization_config is None:
        model = model.to(device)
    return model.eval()


def innermost(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Head(NamedTuple):
    """A language-model head: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


@dataclass
class PartitionOutput(ModelOutput):
    """What a model returns when called with `partition_ids`; row-major over the supervised positions.

    Args:
        log_probs: (M, K+1) nats, last column the tail, at the M positions of `partition_positions` (all N by default).
        tail_max: (M,) nats, the largest log-probability in the tail, without gradient.
        logits: (N, K) logits of the K tokens at every position, where they were asked for.
        label_log_probs: (M,) nats, log-probability of the label, where it was asked for.
    """

    log_probs: Any = None
    tail_max: Any = None
    logits: Any = None
    label_log_probs: Any = None


def supervised_mask(labels_BT: torch.Tensor) -> torch.Tensor:
    """(B, T-1) mask of the hidden states whose next token is in the loss."""
    return labels_BT[:, 1:] != IGNORED


def logit_scale(config) -> float:
    """The factor that a model multiplies its logits by; 1.0 for most. Each family has its own name for it."""
    text_config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(text_config, name, None) is not None:
            return float(getattr(text_config, name))
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if text_config.model_type == "hyperclovax" else 1 / scaling)  # Granite, MiniCPM3 divide


def language_model_head(model: PreTrainedModel) -> Head:
    """The model's [`Head`]. FSDP2 and ZeRO-3 may hold it in pieces; `first_trl.head` gathers them when it reads."""
    module = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(module.weight, getattr(module, "bias", None), logit_scale(model.config), softcap)


def backbone_hidden_states(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """(B, T, D) last hidden states of `model`, whose backbone transformers calls `base_model`; no head is applied."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def add_partition_head(model: PreTrainedModel) -> None:
    """Let `model(..., partition_ids=ids_NK)` return a [`PartitionOutput`]; any other call is unchanged.

    Add it to the innermost model, after TRL's own fused head and before `accelerate` wraps anything. New arguments:
    `partition_ids` (N, K) int64, one row per supervised position of `labels`; `partition_positions` (M,) int64, the
    positions that pay for the whole vocabulary (default all); `partition_logits`, whether to return the K logits at
    every position; `partition_labels`, whether to return the label's log-probability; `partition_grad`, whether the
    log-probabilities carry a gradient, which costs as much again as their values (the K logits always do).
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        partition_ids=None,
        partition_positions=None,
        partition_logits=False,
        partition_labels=False,
        partition_grad=True,
        labels=None,
        **kwargs,
    ):
        if partition_ids is None:
            return (
                original_forward(*args, **kwargs)
                if labels is None
                else original_forward(*args, labels=labels, **kwargs)
            )
        kwargs["use_cache"] = False
        hidden_BTD = self.base_model(*args, **kwargs).last_hidden_state
        mask = supervised_mask(labels)
        head = language_model_head(self)
        # With the model split over devices, the backbone can end on another device than the head.
        hidden_ND = hidden_BTD[:, :-1][mask.to(hidden_BTD.device)].to(head.weight.device)
        labels_N = labels[:, 1:][mask].to(head.weight.device)
        return _project(
            hidden_ND,
            labels_N,
            head,
            partition_ids,
            partition_positions,
            want_logits=partition_logits,
            want_labels=partition_labels,
            want_grad=partition_grad,
        )

    model.forward = types.MethodType(forward, model)


def _project(
    hidden_ND, labels_N, head: Head, ids_NK, positions_M, want_logits: bool, want_labels: bool, want_grad: bool
) -> PartitionOutput:
    if len(ids_NK) != len(hidden_ND):
        raise ValueError(
            f"The batch has {len(ids_NK)} teacher rows for {len(hidden_ND)} supervised positions; the teacher's rows "
            "do not belong to these labels."
        )
    output = PartitionOutput()
    if want_logits:
        output["logits"] = selected_logits(hidden_ND, head.weight, ids_NK, *head[1:])
    if positions_M is not None:
        hidden_ND, ids_NK, labels_N = hidden_ND[positions_M], ids_NK[positions_M], labels_N[positions_M]
    if not want_grad:
        hidden_ND = hidden_ND.detach()
    if positions_M is None or len(positions_M):
        log_probs_MK1, tail_max_M = partition_log_probs_and_tail_max(hidden_ND, head.weight, ids_NK, *head[1:])
        output["log_probs"], output["tail_max"] = log_probs_MK1, tail_max_M
        if want_labels:
            # log p(label) = z_label - log Z, and log Z = z_1 - log p_1 for any token 1 of the partition
            logits_M2 = selected_logits(
                hidden_ND, head.weight, torch.stack([labels_N, ids_NK[:, 0]], dim=1), *head[1:]
            )
            output["label_log_probs"] = logits_M2[:, 0] - logits_M2[:, 1] + log_probs_MK1[:, 0]
    return output


def adapters_to_float32(model: torch.nn.Module) -> None:
    """Hold trainable weights in float32, where a run asks for no mixed precision.

    TRL stores the adapter of a quantised base in bfloat16, whose 8 bits of mantissa lose most of Adam's small steps;
    under `bf16: true` that is the user's choice, in a float32 run it is not.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()

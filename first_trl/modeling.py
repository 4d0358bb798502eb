"""How a `transformers` causal language model exposes its backbone and its head, and the forward that distils.

`add_partition_head` gives a model a second way to be called: with `partition_ids` it runs the backbone, projects only
the supervised positions and returns log-probabilities of the K teacher tokens and of the tail, never logits. The call
goes through whatever wraps the model (PEFT, DDP, FSDP, DeepSpeed), so gradients synchronise as in any other step.
The mathematics of the head is in `first_trl.head`; nothing here knows the teacher's probabilities.

Shapes: B batch, T tokens, N supervised positions, D hidden, V vocabulary, K kept tokens.
"""

import functools
import re
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput, find_adapter_config_file, logging

from .errors import FirstTrlError
from .head import partition_log_probs, partition_log_probs_and_tail_max, selected_logits

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

# What an adapter holds once and several layers refer to: saved once, and missing at the others
_SHARED_BY_LAYERS = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d")


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or an adapter: a Hub id or a folder. Code that comes with it is never run.

    Raises:
        FirstTrlError: the tokenizer needs code of its own.
    """
    with _own_code_refused(path):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    quantization_config=None,
    attn_implementation: str | None = None,
    device: torch.device | str | None = "cpu",
    **options,
) -> "PreTrainedModel | PeftModel":
    """A causal language model in evaluation mode, its head checked: a Hub id, a model folder, or an adapter.

    Training, caching, evaluation, prediction and merging all load here, so that a checkpoint is the same class with
    the same names of weights everywhere: of one that also sees images, the text model where transformers has it.

    Args:
        path: Hub id or folder; an adapter is loaded on the base, and the revision of it, that it names.
        revision: branch, tag or commit of `path`; of the base, where `path` is a local adapter that names none.
        dtype: `float32`, `bfloat16`, ... of the weights that are not quantised, or `auto`.
        quantization_config: `transformers.BitsAndBytesConfig` for a 4-bit base, or None.
        device: the one device that the weights go to, directly; None leaves that to a job that shares them out.
        **options: other arguments of `from_pretrained`.

    Raises:
        FirstTrlError: the model needs code of its own, an adapter's weights do not fit, or the head is not understood.
    """
    if named := [name for name in ("trust_remote_code", "use_kernels") if options.pop(name, False)]:
        raise FirstTrlError(f"{path}: {named[0]} would run code that comes with a model, and is refused; remove it.")
    if "/" in (attn_implementation or ""):
        raise FirstTrlError(
            f"attn_implementation is {attn_implementation!r}: kernels of the Hub are code, which is never run; take "
            "one of transformers' own, such as sdpa or flash_attention_2."
        )
    options |= {"dtype": dtype, "quantization_config": quantization_config, "attn_implementation": attn_implementation}
    options["device_map"] = None if device is None or torch.device(device).type in ("cpu", "mps") else {"": device}
    with _own_code_refused(path):
        if find_adapter_config_file(str(path), revision=revision) is None:
            model = _load_base(path, revision, options)
        else:
            model = _load_adapter(path, revision, options, device)
    if device is not None and quantization_config is None:
        model = model.to(device)
    check_head(model)
    return model.eval()


@contextmanager
def _own_code_refused(path):
    """Translate transformers' advice to trust remote code, which nothing here ever follows."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise FirstTrlError(
            f"{path} needs code of its own, which first-trl never runs; take a model that transformers itself knows."
        ) from None


def _load_base(path, revision, options: dict) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        model_class = AutoModelForImageTextToText
    else:  # a text model that was saved on its own, such as Mllama's
        model_class = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    model = model_class.from_pretrained(path, revision=revision, trust_remote_code=False, **options)
    settle_names(model)
    return model


def _load_adapter(path, revision, options: dict, device) -> "PeftModel":
    from peft import PeftConfig, PeftModel

    revision_of_base, adapter_revision = (revision, None) if Path(path).is_dir() else (None, revision)
    config = PeftConfig.from_pretrained(str(path), revision=adapter_revision)
    base = _load_base(config.base_model_name_or_path, config.revision or revision_of_base, options)
    if (Path(path) / "tokenizer_config.json").is_file():
        num_tokens = len(load_tokenizer(path))
        if num_tokens > base.get_input_embeddings().weight.shape[0]:  # tokens were added before it was trained
            base.resize_token_embeddings(num_tokens)
    kwargs = {"revision": adapter_revision, "torch_device": str(device or "cpu")}
    try:
        model = PeftModel.from_pretrained(base, str(path), **kwargs)
        loaded = model.load_adapter(str(path), "default", **kwargs)  # once more, for what PEFT keeps to itself
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FirstTrlError(f"The adapter {path} does not fit {config.base_model_name_or_path}: {reason}") from error
    strangers = [] if config.is_prompt_learning else [*loaded.missing_keys, *loaded.unexpected_keys]
    if strangers := [name for name in strangers if not any(shared in name for shared in _SHARED_BY_LAYERS)]:
        raise FirstTrlError(
            f"{len(strangers)} weights of the adapter {path} have no counterpart on its base "
            f"{config.base_model_name_or_path}, e.g. {strangers[0]}: without them it would be the base that answers. "
            "Give the base that it was trained on, loaded as it was then, or train it again."
        )
    return model


def settle_names(model: torch.nn.Module) -> None:
    """Call the backbone and the soft cap of a few architectures as TRL, and most of transformers, call them."""
    inner = innermost(model)
    if inner.base_model is inner and hasattr(inner, "model"):  # Llama 4's and Mllama's text models
        inner.base_model_prefix = "model"
    config = inner.config.get_text_config()
    for name in ("logits_soft_cap", "output_logit_soft_cap"):  # RecurrentGemma, xLSTM
        if getattr(config, name, None):
            config.final_logit_softcapping = getattr(config, name)


def innermost(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keep_to_text(peft_config, model: PreTrainedModel) -> None:
    """Keep an adapter off whatever of a model is not its text model, such as the tower that reads images."""
    model = innermost(model)
    if peft_config is None or model.config.get_text_config() is model.config:
        return
    if getattr(peft_config, "exclude_modules", "") is not None:  # chosen by the user, or not of this kind of adapter
        return
    text = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is text)
    if any(not name.startswith(prefix) for name, module in model.named_modules() if isinstance(module, nn.Linear)):
        peft_config.exclude_modules = rf"(?!{re.escape(prefix)}\.|lm_head).*"


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
        log_probs: (M, K+1) nats, last column the tail, at the M positions of `sample` (all N by default).
        tail_max: (M,) nats, the largest log-probability in the tail, without gradient.
        logits: (N, K) logits of the K tokens at every position, where they were asked for.
        label_log_probs: (M,) nats, log-probability of the label, where it was asked for.
    """

    log_probs: Any = None
    tail_max: Any = None
    logits: Any = None
    label_log_probs: Any = None


def logit_scale(config) -> float:
    """The factor that a model multiplies its logits by; 1.0 for most. Each family has its own name for it."""
    text_config = config.get_text_config()
    if text_config.model_type == "mpt":  # reads its `logit_scale` from checkpoints and never applies it
        return 1.0
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


def backbone_hidden_states(model: PreTrainedModel, *args, **inputs) -> torch.Tensor:
    """(B, T, D) last hidden states of `model`, whose backbone transformers calls `base_model`; no head is applied."""
    return model.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state


@torch.no_grad()
def check_head(model: torch.nn.Module, fused: bool = False) -> None:
    """Refuse a model whose logits are not what its head, as understood here, makes of its last hidden states.

    Eight tokens go through `model(...).logits` and through [`language_model_head`] (with `fused`, through the head
    that TRL's SFTTrainer adds); their log-probabilities may differ by 1e-2 nats and by what the dtype rounds away.
    A model whose weights are shared out already (ZeRO-3) cannot run on its own, and is not checked.

    Raises:
        FirstTrlError: they differ by more, naming the architecture and both numbers; or the model computes NaN.
    """
    inner, training = innermost(model), model.training
    if any(hasattr(weight, "ds_id") or weight.is_meta for weight in inner.parameters()):
        logger.info(f"The head of {type(inner).__name__} is not checked: its weights are shared out over processes.")
        return
    model.eval()
    keep_gradients(inner)
    embeddings = inner.get_input_embeddings().weight
    ids_BT = torch.arange(10, 18, device=embeddings.device)[None] % len(embeddings)
    logits_TV = inner(input_ids=ids_BT, use_cache=False).logits[0]
    start_TV = inner(input_ids=ids_BT[:, :4], use_cache=False).logits[0]
    expected_TV = logits_TV.float().log_softmax(dim=-1).to(ids_BT.device)
    if expected_TV.isnan().any():
        raise FirstTrlError(
            f"{type(inner).__name__} computes NaN from eight ordinary tokens: its weights, or its adapter's, are "
            f"damaged, or overflow in {logits_TV.dtype}; train it again, or load it in another dtype."
        )
    try:
        if fused:
            found = inner(input_ids=ids_BT, labels=ids_BT, fused_lm_head=True).log_probs.to(ids_BT.device).T
            expected = expected_TV[:-1].gather(1, ids_BT[0, 1:, None])
        else:
            head, hidden_BTD = language_model_head(inner), backbone_hidden_states(inner, input_ids=ids_BT)
            top_TK = expected_TV.topk(min(5, expected_TV.shape[1] - 1)).indices
            hidden_TD, ids_TK = (tensor.to(head.weight.device) for tensor in (hidden_BTD[0], top_TK))
            found = partition_log_probs(hidden_TD, head.weight, ids_TK, *head[1:])[:, :-1].to(ids_BT.device)
            expected = expected_TV.gather(1, top_TK)
    except (AttributeError, ValueError) as error:
        raise FirstTrlError(
            f"{type(inner).__name__} has no backbone and head of the usual kind: {error}; take another architecture."
        ) from error
    model.train(training)
    if not torch.allclose(start_TV, logits_TV[:4], rtol=0.05, atol=0.05 * float(logits_TV.float().std())):
        raise FirstTrlError(
            f"{type(inner).__name__} is no causal model: what it says of a token depends on those after it."
        )
    worst = (found - expected).abs().argmax()
    # Half precision rounds a logit to a share of itself, a few times on its way
    rounding = 4 * torch.finfo(logits_TV.dtype).eps * logits_TV.float().abs().nan_to_num(posinf=0).max()
    if (found - expected).abs().flatten()[worst] > 1e-2 + rounding:
        raise FirstTrlError(
            f"{type(inner).__name__} ({inner.config.model_type}) computes logits as {'TRL' if fused else 'first-trl'} "
            f"does not: the log-probability of a token is {expected.flatten()[worst]:.4f} nats by the model, "
            f"{found.flatten()[worst]:.4f} by its head. All that follows would be wrong; take another architecture."
        )


def add_partition_head(model: PreTrainedModel) -> None:
    """Let `model(..., partition_ids=ids_NK)` return a [`PartitionOutput`]; any other call is unchanged.

    Add it to the innermost model, after TRL's own fused head and before `accelerate` wraps anything. New arguments:
    `partition_ids` (N, K) int64 and `places` (N,) int64, one per supervised position: its kept tokens, and where its
    hidden state is among the flattened (B, T); `sample` (M,) int64, the positions that pay for the whole vocabulary
    (default all); `want_logits`, for the K logits at every position; `want_labels`, for the label's log-probability;
    `want_grad`, whether the log-probabilities carry a gradient, which costs as much again as their values (the K
    logits always do).
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, partition_ids=None, places=None, sample=None, labels=None, **kwargs):
        if partition_ids is None:
            return original_forward(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        wanted = {name: kwargs.pop(name, name == "want_grad") for name in ("want_logits", "want_labels", "want_grad")}
        hidden_BTD = backbone_hidden_states(self, *args, **kwargs)
        head = language_model_head(self)
        # With the model split over devices, the backbone can end on another device than the head.
        device = head.weight.device
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places.to(hidden_BTD.device)).to(device)
        labels_N = labels.flatten().index_select(0, places.to(labels.device) + 1).to(device)
        return _project(hidden_ND, labels_N, head, partition_ids.to(device), sample, **wanted)

    model.forward = types.MethodType(forward, model)


def _project(
    hidden_ND, labels_N, head: Head, ids_NK, sample_M, want_logits: bool, want_labels: bool, want_grad: bool
) -> PartitionOutput:
    output = PartitionOutput()
    if want_logits:
        output["logits"] = selected_logits(hidden_ND, head.weight, ids_NK, *head[1:], check_ids=False)
    if sample_M is not None:
        hidden_ND, ids_NK, labels_N = hidden_ND[sample_M], ids_NK[sample_M], labels_N[sample_M]
    if not want_grad:
        hidden_ND = hidden_ND.detach()
    if sample_M is None or len(sample_M):
        log_probs_MK1, tail_max_M = partition_log_probs_and_tail_max(
            hidden_ND, head.weight, ids_NK, *head[1:], check_ids=False
        )
        output["log_probs"], output["tail_max"] = log_probs_MK1, tail_max_M
        if want_labels:
            # log p(label) = z_label - log Z, and log Z = z_1 - log p_1 for any token 1 of the partition
            ids_M2 = torch.stack([labels_N, ids_NK[:, 0]], dim=1)
            logits_M2 = selected_logits(hidden_ND, head.weight, ids_M2, *head[1:], check_ids=False)
            output["label_log_probs"] = logits_M2[:, 0] - logits_M2[:, 1] + log_probs_MK1[:, 0]
    return output


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, for good, at the first forward without gradient.

    The kernels for repacked weights return no gradient: a training that is evaluated once would go on without those of
    every layer but the last, and nothing would say so. Nor can repacked weights be dequantised.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def adapters_to_float32(model: torch.nn.Module) -> None:
    """Hold the trained weights of adapters in float32, where a run asks for no mixed precision.

    TRL stores the adapter of a quantised base in bfloat16, whose 8 bits of mantissa lose most of Adam's small steps;
    under `bf16: true` that is the user's choice, in a float32 run it is not. Other trained weights keep their type:
    their neighbours multiply in it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        for part in (getattr(module, name) for name in module.adapter_layer_names if hasattr(module, name)):
            for parameter in part.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()

"""How a `transformers` causal language model is loaded, where its backbone and head are, and the forward that distils.

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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
from transformers.utils import find_adapter_config_file, logging

from .errors import FirstTrlError
from .head import partition_log_probs, partition_log_probs_and_tail_max, selected_logits

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

# What an adapter holds once and several layers refer to: saved once, and missing at the others
_SHARED_BY_LAYERS = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d")


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or an adapter: a Hub id or a folder. Code that comes with it is never run."""
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

    Every stage loads here, so that a checkpoint is the same class with the same names of weights everywhere: of one
    that also sees images, the text model where transformers has it.

    Args:
        path: Hub id or folder; an adapter is loaded on the base, and the revision of it, that it names.
        revision: branch, tag or commit of `path`; of the base, where `path` is a local adapter that names none.
        dtype: of the weights that are not quantised, or `auto`.
        device: the one device that the weights go to, directly; None leaves that to a job that shares them out.
        **options: other arguments of `from_pretrained`.

    Raises:
        FirstTrlError: the model needs code of its own, an adapter's weights do not fit, or the head is not understood.
    """
    runs_code = [name for name in ("trust_remote_code", "use_kernels") if options.pop(name, False)]
    if runs_code or "/" in (attn_implementation or ""):  # attention kernels of the Hub
        name = runs_code[0] if runs_code else f"attn_implementation={attn_implementation!r}"
        raise FirstTrlError(f"{path}: {name} would run code that is not transformers' own, and is refused; remove it")
    options |= {"dtype": dtype, "quantization_config": quantization_config, "attn_implementation": attn_implementation}
    options["device_map"] = None if device is None or torch.device(device).type in ("cpu", "mps") else {"": device}
    with _own_code_refused(path):
        load = _load_base if find_adapter_config_file(str(path), revision=revision) is None else _load_adapter
        model = load(path, revision, options)
    if device is not None and quantization_config is None:
        model = model.to(device)
    check_head(model)
    return model.eval()


@contextmanager
def _own_code_refused(path):
    """Replace transformers' advice to trust remote code, which nothing here ever follows."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise FirstTrlError(f"{path} needs code of its own, which first-trl never runs; take another model") from None


def _load_base(path, revision, options: dict) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    model = class_of(config).from_pretrained(path, revision=revision, trust_remote_code=False, **options)
    settle_names(model)
    return model


def class_of(config):
    """The class of transformers by which a checkpoint is loaded."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    # a text model that was saved on its own, such as Mllama's
    return getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])


def _load_adapter(path, revision, options: dict) -> "PeftModel":
    from peft import PeftConfig, PeftModel

    revision_of_base, adapter_revision = (revision, None) if Path(path).is_dir() else (None, revision)
    config = PeftConfig.from_pretrained(str(path), revision=adapter_revision)
    base = _load_base(config.base_model_name_or_path, config.revision or revision_of_base, options)
    if (Path(path) / "tokenizer_config.json").is_file():
        num_tokens = len(load_tokenizer(path))
        if num_tokens > base.get_input_embeddings().weight.shape[0]:  # tokens were added before it was trained
            base.resize_token_embeddings(num_tokens)
    kwargs = {"revision": adapter_revision, "torch_device": str((options["device_map"] or {"": "cpu"})[""])}
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
            f"{config.base_model_name_or_path}, e.g. {strangers[0]}; give the base that it was trained on"
        )
    return model


def settle_names(model: nn.Module) -> None:
    """Call the backbone and the soft cap of a few architectures as TRL, and most of transformers, call them."""
    inner = innermost(model)
    if inner.base_model is inner and hasattr(inner, "model"):  # Llama 4's and Mllama's text models
        inner.base_model_prefix = "model"
    config = inner.config.get_text_config()
    for name in ("logits_soft_cap", "output_logit_soft_cap"):  # RecurrentGemma, xLSTM
        if getattr(config, name, None):
            config.final_logit_softcapping = getattr(config, name)


def innermost(model: nn.Module) -> PreTrainedModel:
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


def language_model_head(model: PreTrainedModel) -> Head:
    """The model's [`Head`]. FSDP2 and ZeRO-3 may hold it in pieces; `first_trl.head` gathers them when it reads."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, getattr(module, "bias", None), _logit_scale(config), softcap)


def _logit_scale(config) -> float:
    """The factor that a model multiplies its logits by. Each family has its own name for it."""
    if config.model_type == "mpt":  # reads its `logit_scale` from checkpoints and never applies it
        return 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)  # Granite, MiniCPM3 divide


def backbone_hidden_states(model: PreTrainedModel, *args, **inputs) -> torch.Tensor:
    """(B, T, D) last hidden states of `model`, whose backbone transformers calls `base_model`; no head is applied."""
    return model.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state


@torch.no_grad()
def check_head(model: nn.Module, fused: bool = False) -> None:
    """Refuse a model whose logits are not what its head, as understood here, makes of its last hidden states.

    Eight tokens go through `model(...).logits` and through [`language_model_head`] (with `fused`, through the head
    that TRL's SFTTrainer adds); their log-probabilities may differ by 1e-2 nats and by what the dtype rounds away.
    A model whose weights are shared out already (ZeRO-3) cannot run on its own, and is not checked.

    Raises:
        FirstTrlError: they differ by more, naming the architecture and both numbers; or the model computes NaN.
    """
    inner, training = innermost(model), model.training
    name = type(inner).__name__
    if any(hasattr(weight, "ds_id") or weight.is_meta for weight in inner.parameters()):
        logger.info(f"The head of {name} is not checked: its weights are shared out over processes.")
        return
    for module in inner.modules():
        # On a CPU bitsandbytes repacks 4-bit weights, for good, at the first forward without gradient, and its kernels
        # for those return no gradient: a training evaluated once would go on with its last layer alone
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval()
    embeddings = inner.get_input_embeddings().weight
    ids_BT = torch.arange(10, 18, device=embeddings.device)[None] % len(embeddings)
    logits_TV = inner(input_ids=ids_BT, use_cache=False).logits[0]
    start_TV = inner(input_ids=ids_BT[:, :4], use_cache=False).logits[0]
    log_probs_TV = logits_TV.float().log_softmax(dim=-1).to(ids_BT.device)
    if log_probs_TV.isnan().any():  # also where logits overflow
        raise FirstTrlError(f"{name} computes NaN from eight ordinary tokens; train it again, or change its dtype")
    try:
        if fused:
            ids_TK = ids_BT[0, 1:, None]
            found_TK = inner(input_ids=ids_BT, labels=ids_BT, fused_lm_head=True).log_probs.to(ids_BT.device).T
        else:
            ids_TK = log_probs_TV.topk(min(5, log_probs_TV.shape[1] - 1)).indices
            head, hidden_TD = language_model_head(inner), backbone_hidden_states(inner, input_ids=ids_BT)[0]
            rows_TK1 = partition_log_probs(
                hidden_TD.to(head.weight.device), head.weight, ids_TK.to(head.weight.device), *head[1:]
            )
            found_TK = rows_TK1[:, :-1].to(ids_BT.device)
    except (AttributeError, ValueError) as error:
        raise FirstTrlError(f"{name} has no backbone and head of the usual kind: {error}; take another") from error
    model.train(training)
    spread = float(logits_TV[logits_TV.isfinite()].float().std())  # a model may forbid tokens by -inf
    if not torch.allclose(start_TV, logits_TV[:4], rtol=0.05, atol=0.05 * spread):
        raise FirstTrlError(f"{name} is no causal model: what it says of a token depends on later ones; take another")
    expected_TK = log_probs_TV[: len(ids_TK)].gather(1, ids_TK)
    worst = (found_TK - expected_TK).abs().argmax()
    found, expected = float(found_TK.flatten()[worst]), float(expected_TK.flatten()[worst])
    # Half precision rounds a logit to a share of itself, a few times on its way
    rounding = 4 * torch.finfo(logits_TV.dtype).eps * logits_TV.float().abs().nan_to_num(posinf=0).max()
    if not abs(found - expected) <= 1e-2 + rounding:  # NaN is no agreement either
        raise FirstTrlError(
            f"{name} ({inner.config.model_type}) computes logits as {'TRL' if fused else 'first-trl'} does not: a log-"
            f"probability is {expected:.4f} nats by the model, {found:.4f} by its head; take another architecture"
        )


def add_partition_head(model: PreTrainedModel) -> None:
    """Let `model(..., partition_ids=ids_NK, places=places_N)` return log-probabilities; other calls are unchanged.

    Add it to the innermost model, after TRL's own fused head and before `accelerate` wraps anything.

    `partition_ids` (N, K) and `places` (N,), int64, are of each supervised position its kept tokens, and where its
    hidden state is among the flattened (B, T); `sample` (M,) int64 the positions that pay for the whole vocabulary,
    default all. `want_grad=False` spares the gradient of the log-probabilities, which costs as much as they do.

    Returns a dict, row-major over the supervised positions: with `want_logits`, `logits` (N, K), always with their
    gradient; at the positions of `sample`, unless there are none, `log_probs` (M, K+1) nats, last column the tail,
    `tail_max` (M,) nats, the largest of the tail's log-probabilities, and with `want_labels`, `label_log_probs` (M,).
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, partition_ids=None, labels=None, **kwargs):
        if partition_ids is None:
            return original_forward(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        return _partition_forward(self, *args, partition_ids=partition_ids, labels=labels, **kwargs)

    model.forward = types.MethodType(forward, model)


def _partition_forward(
    model,
    *args,
    partition_ids,
    places,
    labels,
    sample=None,
    want_logits=False,
    want_labels=False,
    want_grad=True,
    **kwargs,
) -> dict[str, torch.Tensor]:
    hidden_BTD = backbone_hidden_states(model, *args, **kwargs)
    weight, *rule = language_model_head(model)
    # Where the model is split over devices, the backbone can end on another one than the head
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places.to(hidden_BTD.device)).to(weight.device)
    labels_N = labels.flatten().index_select(0, places.to(labels.device) + 1).to(weight.device)
    ids_NK = partition_ids.to(weight.device)
    output = {}
    if want_logits:
        output["logits"] = selected_logits(hidden_ND, weight, ids_NK, *rule)
    if sample is not None:
        hidden_ND, ids_NK, labels_N = hidden_ND[sample], ids_NK[sample], labels_N[sample]
        if not len(sample):
            return output
    hidden_ND = hidden_ND if want_grad else hidden_ND.detach()
    rows_NK1, output["tail_max"] = partition_log_probs_and_tail_max(hidden_ND, weight, ids_NK, *rule, check_ids=False)
    output["log_probs"] = rows_NK1
    if want_labels:  # log p(label) = z_label - log Z, and log Z = z_1 - log p_1 for any token 1 of the partition
        ids_N2 = torch.stack([labels_N, ids_NK[:, 0]], dim=1)
        logits_N2 = selected_logits(hidden_ND, weight, ids_N2, *rule)
        output["label_log_probs"] = logits_N2[:, 0] - logits_N2[:, 1] + rows_NK1[:, 0]
    return output

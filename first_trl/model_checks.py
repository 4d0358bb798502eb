"""What is wrong with the models of a recipe: read from configurations, tokenizers and random blocks, never weights."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .constants import HUB_ID
from .errors import FirstTrlError
from .failures import explain
from .recipe import Recipe

SMALL_MODEL = 50_000_000  # parameters; two random blocks of no more are made to try the head
# Larger numbers in a config.json are no model's; transformers would make lists and layers of them for hours.
LARGEST = {"layer": 10_000, "head": 2**16, "size": 2**24, "embd": 2**24}


def models_of(recipe: Recipe, stages: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Place in the recipe -> (folder or Hub id, revision) of every model that these stages read; the teacher first."""
    if recipe.cache.teacher:
        found = {"cache.teacher": (recipe.cache.teacher, recipe.cache.teacher_revision)}
    else:
        found = {"sft.model_name_or_path": (recipe.sft["model_name_or_path"], recipe.sft.get("model_revision"))}
    for arm in recipe.arms if {"distill", "evaluate"} & set(stages) else ():
        section = recipe.arm_section(arm)
        own = section["model_name_or_path"] != recipe.distill.get("model_name_or_path")
        place = f"{f'arms.{arm}' if own else 'distill'}.model_name_or_path"
        found.setdefault(place, (section["model_name_or_path"], section.get("model_revision")))
    return found


def read_models(recipe: Recipe, stages: Sequence[str], problems: list[str], unknown: list[str]) -> tuple[dict, dict]:
    """({folder or id: configuration}, {place: tokenizer}) of the models that can be read; else why they cannot."""
    from .modeling import load_tokenizer

    configs: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}
    for place, (path, revision) in models_of(recipe, stages).items():
        try:
            config = _configuration(path, revision)
            tokenizers[place] = load_tokenizer(path, revision)
            _refuse_head(config)
            configs[path] = config
        except Exception as error:  # a broken file makes transformers raise whatever its values lead to
            brief = " ".join(str(error).split())[:200] or type(error).__name__
            reason = explain(error, "") or f"it cannot be read ({brief}); fetch or save it again"
            (problems if Path(path).exists() else unknown).append(f"{place}: {path}: {reason}")
    return configs, tokenizers


def _configuration(path: str, revision: str | None):
    """The configuration of a model, or of an adapter's base, once it is sure that transformers can take it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
    from transformers.utils import cached_file

    folders, adapter = {Path(path)}, Path(path) / "adapter_config.json"
    if adapter.is_file():
        content = json.loads(adapter.read_text(encoding="utf-8"))
        path, revision = str(content["base_model_name_or_path"]), content.get("revision")
        if not Path(path).is_dir() and not HUB_ID.fullmatch(path):
            raise FirstTrlError(f"its base {path} is not here; move it back, or correct {adapter}")
    file = cached_file(path, "config.json", revision=revision)
    _refuse_size(json.loads(Path(file).read_text(encoding="utf-8")))
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not any(type(config) in known for known in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)):
        raise FirstTrlError(f"{type(config).__name__} is not of a causal language model; take another model")
    for folder in filter(Path.is_dir, folders | {Path(path)}):
        if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            raise FirstTrlError(f"{folder} has no weights (*.safetensors); save it again with save_pretrained")
    return config


def _refuse_size(content: Any) -> None:
    """Refuse numbers that no model has, before transformers makes lists and layers of them."""
    if not isinstance(content, dict):
        raise FirstTrlError(f"config.json holds a {type(content).__name__}, not settings; fetch or save it again")
    for key, value in content.items():
        most = next((most for word, most in LARGEST.items() if word in key), None)
        if most and isinstance(value, int) and abs(value) > most:
            raise FirstTrlError(f"config.json: {key} = {value:,}, more than any model has ({most:,}); fetch it again")
        if key.endswith("_config") and value is not None:
            _refuse_size(value)


def _refuse_head(config) -> None:
    """Run the self-check of the head on two random blocks of this architecture, where they are small enough for it."""
    import torch
    from transformers import AutoModelForCausalLM

    from .modeling import check_head

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 2, min(text.vocab_size, 256), None
    try:
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(small).parameters())
        if size < SMALL_MODEL:
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
            with torch.no_grad():  # as large as trained weights: small logits hide a cap
                model.get_output_embeddings().weight.normal_(std=0.5)
            check_head(model)
    except FirstTrlError:
        raise
    except Exception:  # a configuration that cannot be cut down; the head is checked again when the weights are loaded
        return


def model_problems(
    recipe: Recipe, stages: Sequence[str], configs: dict[str, Any], tokenizer, longest: int
) -> Iterator[str]:
    """Models that do not fit the longest row (in tokens), their tokenizer, or distillation."""
    for place, (path, _) in models_of(recipe, stages).items():
        if path not in configs:
            continue
        text = configs[path].get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            yield f"task.max_length: a row has {longest} tokens, and {path} ({place}) was made for {limit}; lower it"
        if tokenizer is not None and len(tokenizer) > text.vocab_size:
            yield f"{place}: {path} has {text.vocab_size} tokens and its tokenizer {len(tokenizer)}; take its own"
        coefficient = getattr(text, "router_aux_loss_coef", None) if hasattr(text, "output_router_logits") else None
        sections = [recipe.arm_section(arm) for arm in recipe.arms if recipe.arm_trainer(arm) == "first"]
        silent = [s for s in sections if s["model_name_or_path"] == path and s.get("router_aux_loss_coef") is None]
        if coefficient and silent and "distill" in stages:
            yield (
                f"distill.router_aux_loss_coef: {path} has {coefficient} of its own, and the auxiliary loss of a "
                "mixture of experts is no part of distillation; write router_aux_loss_coef: 0.0"
            )

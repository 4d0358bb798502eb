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
    sections = {"sft": recipe.sft} if recipe.cache.teacher is None else {}
    if {"distill", "evaluate"} & set(stages):
        sections |= {f"arms.{arm}": recipe.arm_section(arm) for arm in recipe.arms}
    found = {"cache.teacher": (recipe.cache.teacher, recipe.cache.teacher_revision)} if recipe.cache.teacher else {}
    for place, section in sections.items():
        model = section["model_name_or_path"], section.get("model_revision")
        if place != "sft" and model[0] == recipe.distill.get("model_name_or_path"):
            place = "distill"
        found.setdefault(f"{place}.model_name_or_path", model)
    return found


def read_models(recipe: Recipe, stages: Sequence[str], problems: list[str], unknown: list[str]) -> tuple[dict, dict]:
    """({folder or id: configuration}, {place: tokenizer}) of the models that can be read; else why they cannot."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import cached_file

    from .modeling import load_tokenizer

    configs: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}
    for place, (path, revision) in models_of(recipe, stages).items():
        try:
            base, base_revision = _base_of(path, revision)
            file = Path(cached_file(base, "config.json", revision=base_revision))
            _refuse_size(json.loads(file.read_text(encoding="utf-8")))
            config = AutoConfig.from_pretrained(base, revision=base_revision, trust_remote_code=False)
            known = {*AutoModelForCausalLM._model_mapping, *AutoModelForImageTextToText._model_mapping}
            if type(config) not in known:
                raise FirstTrlError(f"{type(config).__name__} is not of a causal language model; take another model")
            for folder in filter(Path.is_dir, map(Path, {path, base})):
                if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
                    remedy = "save it with save_pretrained, or fetch it again"
                    raise FirstTrlError(f"{folder} has no weights (*.safetensors); {remedy}")
            tokenizers[place] = load_tokenizer(path, revision)
            _refuse_head(config)
            configs[path] = config
        except Exception as error:  # a broken file makes transformers raise whatever its values lead to
            brief = " ".join(str(error).split())[:200] or type(error).__name__
            reason = explain(error, "") or f"it cannot be read ({brief}); fetch or save it again"
            (problems if Path(path).exists() else unknown).append(f"{place}: {path}: {reason}")
    return configs, tokenizers


def _base_of(path: str, revision: str | None) -> tuple[str, str | None]:
    """The model that an adapter is loaded on, with its revision; any other model is its own."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return path, revision
    content = json.loads(file.read_text(encoding="utf-8"))
    base = str(content["base_model_name_or_path"])
    if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
        raise FirstTrlError(f"its base {base} is not here; move it back, or correct {file}")
    return base, content.get("revision")


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
            needed = f"its tokenizer needs {len(tokenizer)}; take a tokenizer that belongs to it"
            yield f"{place}: {path} has {text.vocab_size} tokens, and {needed}"
        arms = [arm for arm in recipe.arms if recipe.arm_section(arm)["model_name_or_path"] == path]
        coefficient = getattr(text, "router_aux_loss_coef", None) if hasattr(text, "output_router_logits") else None
        silent = [arm for arm in arms if recipe.arm_section(arm).get("router_aux_loss_coef") is None]
        if coefficient and any(recipe.arm_trainer(arm) == "first" for arm in silent) and "distill" in stages:
            yield (
                f"distill.router_aux_loss_coef: {path} has {coefficient} of its own, and the auxiliary loss of a "
                "mixture of experts is no part of distillation; write router_aux_loss_coef: 0.0"
            )

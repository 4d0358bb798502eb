"""Which keys each section of a recipe knows, and the remedy for one that it does not.

The sections `task`, `cache`, `calibrate`, `evaluate` and `push` are dataclasses of `first_trl.config`; `sft` and
`distill` take the settings of TRL's dataclasses, whose names come from their source (`first_trl.recipe.field_tables`).
"""

import dataclasses
import difflib

from ..config import CacheConfig, CalibrateConfig, EvaluateConfig, PushConfig, TaskConfig
from .field_tables import FieldSpec, known_fields
from .rules import NOT_YOURS

TOP = {"name": "str", "output_dir": "str", "seed": "int", "seeds": "list[int] | None"}
SETTINGS = {
    "task": TaskConfig,
    "cache": CacheConfig,
    "calibrate": CalibrateConfig,
    "evaluate": EvaluateConfig,
    "push": PushConfig,
}
TRAINING = {"sft": "SFTConfig", "distill": "FIRSTConfig"}
SECTIONS = (*TOP, "task", "datasets", "sft", "cache", "calibrate", "distill", "arms", "evaluate", "push")
# What people call a setting elsewhere, where spelling alone would not find it.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "rank": "lora_r",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "k": "top_k",
}


def known_keys() -> dict[str, set[str]]:
    """Section -> the keys it knows."""
    known = {section: {f.name for f in dataclasses.fields(cls)} for section, cls in SETTINGS.items()}
    for section in TRAINING:
        # max_length is there for packed rows only: what people mean is the task's.
        known[section] = set(training_fields(section)) - set(NOT_YOURS) - {"hub_token", "max_length"}
    return known


def training_fields(section: str) -> dict[str, FieldSpec]:
    """The settings that `sft`, or `distill` and the arms, may hold."""
    return known_fields(TRAINING[section]) | known_fields("ModelConfig")


def first_only_keys() -> set[str]:
    """The settings that FIRSTConfig adds to SFTConfig."""
    return set(known_fields("FIRSTConfig")) - set(known_fields("SFTConfig"))


def where_else(key: str, known: list[str]) -> str:
    """The remedy for an unknown key: another section that knows it, or the nearest name here."""
    alias = ALIASES.get(key, key)
    if alias in known:
        return f"did you mean {alias}?"
    owners = [section for section, keys in known_keys().items() if alias in keys]
    if owners:
        return "it belongs in " + " or ".join(f"{owner}.{alias}" for owner in owners)
    if alias in TOP:
        return f"it belongs at the top of the recipe, as {alias}"
    return nearest(key, known) or nearest(key, sorted(set().union(*known_keys().values()))) or "remove it"


def nearest(key: str, known: list[str]) -> str | None:
    """The remedy for a misspelt key: the known one that looks most like it, if one does."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None

"""What the training sections of a recipe must not say, beyond the type of each setting.

Checks over settings that already have their types; each returns problems and raises nothing. Where a rule exists
because of TRL or the Hub, the remedy says what to write instead.
"""

import re
from pathlib import Path
from typing import Any

from ..config import RECALIBRATION_METHODS
from ..field_types import Problem

_THE_TASK_DECIDES = "remove it: the task section decides what is trained on, in every stage alike"
_THE_STAGE_DECIDES = "remove it: the stage decides this"
_PUSH_SECTION = "remove it and fill the push section; `first-trl push` uploads"
_EVALUATE = "remove it: `first-trl evaluate` measures on the test sets, without an extra forward pass"
_TOKENIZER = "remove it, and save a tokenizer that has it beside the model"

# Settings of TRL that first-trl sets itself, or that TRL is about to remove: key -> (what is wrong, the remedy).
NOT_YOURS = {
    "output_dir": ("the stages choose their own folders", "write output_dir and name at the top of the recipe"),
    "dataset_kwargs": ("the data is ready before TRL sees it", _THE_TASK_DECIDES),
    "dataset_text_field": ("the data is ready before TRL sees it", _THE_TASK_DECIDES),
    "truncation_mode": ("the data is ready before TRL sees it", "remove it: task.max_length cuts the end"),
    "completion_only_loss": ("the loss is on the completion", _THE_TASK_DECIDES),
    "assistant_only_loss": ("the loss is on the completion", _THE_TASK_DECIDES),
    "chat_template_path": ("the tokenizer's own chat template is used", _TOKENIZER),
    "eos_token": ("the tokenizer's own end-of-sequence token is used", _TOKENIZER),
    "pad_token": ("TRL removes it in version 2.0", _TOKENIZER),
    "remove_unused_columns": ("the stages keep the columns that they need", _THE_STAGE_DECIDES),
    "label_names": ("the stages keep the columns that they need", _THE_STAGE_DECIDES),
    "do_train": ("a stage does one thing", _THE_STAGE_DECIDES),
    "do_eval": ("a stage does one thing", _THE_STAGE_DECIDES),
    "do_predict": ("a stage does one thing", _THE_STAGE_DECIDES),
    "local_rank": ("accelerate sets it", "remove it and use `accelerate launch`"),
    "trust_remote_code": (
        "code from a model's repository is never run",
        "remove it, and take a model that transformers has a class for",
    ),
    "resume_from_checkpoint": (
        "stages continue from their last checkpoint by themselves",
        "remove it; to start again, delete the stage's folder",
    ),
    "push_to_hub": ("training does not upload", _PUSH_SECTION),
    "hub_model_id": ("training does not upload", _PUSH_SECTION),
    "hub_revision": ("training does not upload", _PUSH_SECTION),
    "hub_private_repo": ("training does not upload", _PUSH_SECTION),
    "hub_strategy": ("training does not upload", _PUSH_SECTION),
    "hub_always_push": ("training does not upload", _PUSH_SECTION),
    "include_for_metrics": ("training computes no metrics from logits", _EVALUATE),
    "batch_eval_metrics": ("training computes no metrics from logits", _EVALUATE),
    "prediction_loss_only": ("training computes no metrics from logits", _EVALUATE),
    "label_smoothing_factor": (
        "TRL removes it in version 2.0, and it needs an extra forward pass",
        "smooth the teacher: an arm with recalibration_method: label_smoothing",
    ),
    "use_liger_kernel": (
        "TRL removes it in version 2.0, and the loss here builds no logits for it to save",
        "remove it",
    ),
}

# Bounds of the settings that people most often get wrong; the rest is left to TRL.
LIMITS: dict[str, dict[str, Any]] = {
    "learning_rate": {"minimum": 0},
    "num_train_epochs": {"above": 0},
    "per_device_train_batch_size": {"minimum": 1},
    "per_device_eval_batch_size": {"minimum": 1},
    "gradient_accumulation_steps": {"minimum": 1},
    "warmup_steps": {"minimum": 0},
    "weight_decay": {"minimum": 0},
    "max_grad_norm": {"minimum": 0},
    "max_length": {"minimum": 2},
    "seed": {"minimum": 0},
    "lora_r": {"minimum": 1},
    "lora_alpha": {"minimum": 1},
    "lora_dropout": {"minimum": 0, "below": 1},
    "ce_weight": {"minimum": 0, "maximum": 1},
    "mass_fraction": {"above": 0, "maximum": 1},
    "divergence": {"choices": ("forward_kl", "reverse_kl", "jsd")},
    "tail": {"choices": ("bucket", "renormalize")},
    "recalibration_method": {"choices": RECALIBRATION_METHODS},
}

_PEFT_ONLY = re.compile(r"lora_.*|use_rslora|use_dora")


def broken_training_rules(section: dict, trainer: str) -> list[Problem]:
    """What is wrong between the settings of one training run.

    Args:
        section: settings of SFTConfig or FIRSTConfig and of ModelConfig, only those that were written.
        trainer: `first` for knowledge matching, `sft` for training on labels.
    """
    problems = _broken_model_rules(section)
    if section.get("max_length") is not None and not (trainer == "first" and section.get("packing")):
        what = "the data is cut by the task section, in every stage alike"
        remedy = "write it as task.max_length (only distill has one, the length of a packed row, with packing: true)"
        problems.append(Problem("max_length", section["max_length"], what, remedy))
    if section.get("bf16") and section.get("fp16"):
        problems.append(Problem("fp16", True, "bf16 is true as well", "keep one of the two"))
    evaluated, saved = section.get("eval_strategy", "no"), section.get("save_strategy", "epoch")
    if section.get("load_best_model_at_end") and saved != "best" and evaluated != saved:
        what = f"eval_strategy is {evaluated} and save_strategy is {saved}"
        remedy = "give both the same value, so that the best model is among the saved ones"
        problems.append(Problem("load_best_model_at_end", True, what, remedy))
    if trainer == "first":
        problems += _broken_distillation_rules(section)
    return problems


def _broken_model_rules(section: dict) -> list[Problem]:
    problems = []
    if not section.get("use_peft"):
        ignored = list(filter(_PEFT_ONLY.fullmatch, section))
        if ignored:
            also = f", and so would {', '.join(ignored[1:])}" if ignored[1:] else ""
            what = f"without use_peft it would be ignored{also}"
            remedy = "write use_peft: true in this section, or remove it"
            problems.append(Problem(ignored[0], section[ignored[0]], what, remedy))
        for key in ("load_in_4bit", "load_in_8bit"):
            if section.get(key):
                remedy = "write use_peft: true in this section, or remove it"
                problems.append(Problem(key, True, "quantised weights cannot be trained without an adapter", remedy))
    if section.get("load_in_4bit") and section.get("load_in_8bit"):
        problems.append(Problem("load_in_8bit", True, "load_in_4bit is true as well", "keep one of the two"))
    return problems


def _broken_distillation_rules(section: dict) -> list[Problem]:
    problems = []
    loss_type = section.get("loss_type", "nll")
    if loss_type != "nll":
        remedy = "remove it: `divergence` and `tail` choose the loss"
        problems.append(Problem("loss_type", loss_type, "it has no effect on knowledge matching", remedy))
    if section.get("packing") and section.get("packing_strategy") == "wrapped":
        what = "it cuts documents where no teacher row exists"
        problems.append(Problem("packing_strategy", "wrapped", what, "write packing_strategy: bfd"))
    exact = (section.get("tail", "bucket"), section.get("divergence", "forward_kl")) == ("bucket", "forward_kl")
    if section.get("mass_fraction", 1) < 1 and not exact:
        what = "only the bucket tail with forward_kl has a mass term to sample"
        remedy = "write tail: bucket and divergence: forward_kl, or remove it"
        problems.append(Problem("mass_fraction", section["mass_fraction"], what, remedy))
    return problems


def looks_local(path: str) -> bool:
    """Whether a path can only mean this machine, or does name something on it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or exists(path)


def exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that the file system cannot hold is not on it
        return False


HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def broken_model_path(path: str) -> list[tuple[str, str]]:
    """(what is wrong, the remedy) of a model's folder or Hub id."""
    if path.startswith("~"):
        return [("~ is not expanded in recipes", "write ${HOME} instead of ~")]
    if looks_local(path):
        if not exists(path):
            return [
                ("there is no such folder", "give an existing folder; it was looked up from the current directory")
            ]
        if not Path(path).is_dir():
            return [("it is a file", "give the folder that holds the model")]
        return []
    if not HUB_NAME.fullmatch(path):
        return [("it is neither a folder nor the id of a model on the Hub", "write owner/name or a path")]
    return []

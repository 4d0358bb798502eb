"""From a section of a recipe to a trained and saved model; shared by the teacher's and the students' training.

The section's keys are the fields of TRL's own dataclasses, so every TRL option works. Only what a run folder needs is
set here: where to write, how often to save, and what to resume from.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from .checkpoints import last_whole_checkpoint, remove_checkpoints, watch
from .data.rows import describe_lost, load_rows
from .errors import FirstTrlError
from .log import status
from .modeling import check_head, keep_to_text, load_model, load_tokenizer
from .settings import STAGE_DEFAULTS


def training_arguments(section: dict, config_class: type, folder: Path, seed: int):
    """(config_class, ModelConfig) of a section, with our defaults where the recipe is silent.

    Raises:
        FirstTrlError: 4-bit weights are to be shared out over processes, and are not stored so that they can be.
    """
    if launched_sharded() and (problem := missing_quant_storage(section)):
        raise FirstTrlError(f"bnb_4bit_quant_storage: {problem}.")
    model_args = _model_config(section)
    fields = {field.name for field in dataclasses.fields(config_class)} - vars(model_args).keys()
    defaults = {
        "output_dir": str(folder),
        "seed": seed,
        **STAGE_DEFAULTS,
        "bf16": model_args.dtype == "bfloat16",
        "logging_nan_inf_filter": False,  # it would log the mean of the finite losses, and wait for the GPU each step
    }
    return config_class(**defaults | {key: value for key, value in section.items() if key in fields}), model_args


def _model_config(section: dict) -> ModelConfig:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{key: value for key, value in section.items() if key in names})


def load_arguments(section: dict) -> dict:
    """The arguments of `first_trl.modeling.load_model` for a model that a recipe section describes."""
    model_args = _model_config(section)
    return {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    }


def model_arguments(args, model_args: ModelConfig) -> dict:
    """The trainer's arguments that describe the model: loaded as every stage loads it, and its adapter.

    Handed a name, TRL would load another class than `AutoModelForCausalLM` for checkpoints that also see images, and
    spread the model over all devices of the machine where the job is one process.
    """
    options, args.model_init_kwargs = args.model_init_kwargs or {}, None
    device = None if launched_sharded() else args.device
    model = load_model(model_args.model_name_or_path, device=device, **load_arguments(vars(model_args)) | options)
    adapter = get_peft_config(model_args)
    if adapter is not None and model_args.model_revision != "main":
        adapter.revision = model_args.model_revision  # PEFT loads the base of an adapter at the revision that it names
    keep_to_text(adapter, model)
    return {"model": model, "peft_config": adapter}


def label_trainer(recipe, section: dict, folder: Path, seed: int) -> SFTTrainer:
    """TRL's own trainer on the labels of the recipe's rows: of a teacher, or of a student for comparison."""
    packed = section.get("packing") or section.get("eval_packing")  # rows are cut already; packed ones have a length
    section = section | {"max_length": recipe.task.max_length if packed else None}
    args, model_args = training_arguments(section, SFTConfig, folder, seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    with PartialState().main_process_first():  # it tokenises, the others read its files
        used = {role: load_rows(getattr(recipe.datasets, role), role, recipe.task, tokenizer) for role in roles(args)}
    for role, rows in used.items():
        if line := describe_lost(f"datasets.{role}", rows.lost):
            status(line)
    trainer = SFTTrainer(
        args=args,
        train_dataset=used["train"].tokenized,
        eval_dataset=used["validation"].tokenized if "validation" in used else None,
        processing_class=tokenizer,
        callbacks=[RefuseNonFiniteLoss()],
        **model_arguments(args, model_args),
    )
    trained = {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad}
    if torch.bfloat16 not in trained or args.bf16:  # TRL's bfloat16 head beside float32 states runs in its loss alone
        check_head(trainer.model, fused=True)
    adapters_to_float32(trainer)
    return trainer


def roles(args) -> tuple[str, ...]:
    """The splits that a training reads."""
    return ("train", "validation") if args.eval_strategy != "no" else ("train",)


def adapters_to_float32(trainer) -> None:
    """Hold adapters, and no other trained weights, in float32, where a run asks for no mixed precision."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # TRL stores the adapter of a quantised base in bfloat16, whose 8 bits of mantissa lose most of Adam's small steps
    if not (trainer.args.bf16 or trainer.args.fp16):
        for adapter in getattr(trainer.model, "peft_config", {}):
            cast_adapter_dtype(trainer.model, adapter)


def second_round_steps(steps: int) -> int:
    """How many steps a student is trained on, after so many in its first round."""
    return max(1, steps // 10)


def train_and_save(make_trainer: Callable, folder: Path, continues: bool, title: str) -> None:
    """Train, from the last checkpoint if this continues an interrupted attempt, and save the model to `folder`."""
    finished = folder / "trainer_state.json"  # written when all else is
    if not (continues and finished.is_file()):
        trainer = make_trainer()
        watch(trainer, title)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) if continues else None)
        save_whole(trainer, folder)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(finished))
    if PartialState().is_main_process:
        remove_checkpoints(folder)


class RefuseNonFiniteLoss(TrainerCallback):
    """Ends a training that has diverged at its next log: its weights are lost, and nothing would say so."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "train_loss", "eval_loss"):
            if not math.isfinite((logs or {}).get(name, 0)):
                raise FirstTrlError(
                    f"The {name.replace('_', ' ')} is {logs[name]} at step {state.global_step}: training has "
                    "diverged. Lower learning_rate, add warmup_steps, or take bf16 instead of fp16; then start again."
                )


def save_whole(trainer, folder: Path) -> None:
    """Save the model in one piece, however it is sharded.

    Raises:
        FirstTrlError: no weights were written.
    """
    if trainer.is_fsdp_enabled:  # checkpoints may be in pieces; a model that is set to be so, Trainer does not save
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero() and not any(folder.glob("*model*.safetensors")):
        raise FirstTrlError(f"training has ended and {folder} has no weights; its checkpoints are kept")


def launched_sharded() -> bool:
    """Whether `accelerate launch` was told to share the weights out over the processes of this job."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return fsdp or (deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def missing_quant_storage(section: dict) -> str | None:
    """Why a training section cannot be sharded (FSDP2, ZeRO-3), with the remedy; None where it can."""
    # 4-bit weights are stored in bytes unless declared otherwise, and a sharding that packs parameters of one type
    # together cannot put them beside bfloat16 ones
    dtype, storage = section.get("dtype") or "float32", section.get("bnb_4bit_quant_storage")
    if not section.get("load_in_4bit") or storage == dtype:
        return None
    said = "it is missing" if storage is None else f"it is {storage}"
    return f"{said}, and sharded 4-bit weights are stored as the others are; write bnb_4bit_quant_storage: {dtype}"

"""From a section of a recipe to a trained and saved model; shared by the teacher's and the students' training.

The section's keys are the fields of TRL's own dataclasses, so every TRL option works. Only what a run folder needs is
set here: where to write, how often to save, and what to resume from.
"""

import dataclasses
import math
import os
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from .checkpoints import last_whole_checkpoint, remove_checkpoints, watch
from .data.rows import describe_lost, load_rows
from .errors import FirstTrlError
from .log import status
from .modeling import keep_to_text, load_model
from .settings import STAGE_DEFAULTS


def split_section(section: dict, config_class: type) -> tuple[dict, ModelConfig]:
    """Split a recipe section into the fields of `config_class` and a `trl.ModelConfig`."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    own = {field.name for field in dataclasses.fields(config_class)}
    model_args = ModelConfig(**{key: value for key, value in section.items() if key in names})
    return {key: value for key, value in section.items() if key in own and key not in names}, model_args


def training_arguments(section: dict, config_class: type, folder: Path, seed: int):
    """(config_class, ModelConfig) of a section, with our defaults where the recipe is silent.

    Raises:
        ValueError: 4-bit weights are to be shared out over processes, and are not stored so that they can be.
    """
    if launched_sharded() and (problem := missing_quant_storage(section)):
        raise FirstTrlError(f"bnb_4bit_quant_storage: {problem}.")
    settings, model_args = split_section(section, config_class)
    defaults = {
        "output_dir": str(folder),
        "seed": seed,
        **STAGE_DEFAULTS,
        "bf16": model_args.dtype == "bfloat16",
        "logging_nan_inf_filter": False,  # it would log the mean of the finite losses, and wait for the GPU each step
    }
    return config_class(**{**defaults, **settings}), model_args


def label_arguments(recipe, section: dict, folder: Path, seed: int):
    """`training_arguments` of a training on labels. Its rows are cut already; `max_length` is that of packed rows."""
    length = recipe.task.max_length if section.get("packing") or section.get("eval_packing") else None
    return training_arguments({**section, "max_length": length}, SFTConfig, folder, seed)


def model_arguments(args, model_args: ModelConfig) -> dict:
    """The trainer's arguments that describe the model: loaded as every stage loads it, and its adapter.

    Handed a name, TRL would load another class than `AutoModelForCausalLM` for checkpoints that also see images, and
    spread the model over all devices of the machine where the job is one process.
    """
    options, args.model_init_kwargs = args.model_init_kwargs or {}, None
    device = None if launched_sharded() else args.device
    model = load_model(model_args.model_name_or_path, device=device, **{**_load_arguments(model_args), **options})
    adapter = get_peft_config(model_args)
    if adapter is not None and model_args.model_revision != "main":
        adapter.revision = model_args.model_revision  # PEFT loads the base of an adapter at the revision that it names
    keep_to_text(adapter, model)
    return {"model": model, "peft_config": adapter}


def tokenized_splits(recipe, roles: tuple[str, ...], tokenizer) -> dict:
    """{role: tokenised rows} of the recipe's splits; the main process makes them, the others read its files."""
    with PartialState().main_process_first():
        used = {role: load_rows(getattr(recipe.datasets, role), role, recipe.task, tokenizer) for role in roles}
    for role, rows in used.items():
        if line := describe_lost(f"datasets.{role}", rows.lost):
            status(line)
    return {role: rows.tokenized for role, rows in used.items()}


def train_and_save(trainer, folder: Path, continues: bool, title: str) -> None:
    """Train, from the last checkpoint if this continues an interrupted attempt, and save the model to `folder`."""
    finished = folder / "trainer_state.json"  # written when all else is
    if not (continues and finished.is_file()):
        watch(trainer, title)
        trainer.add_callback(RefuseNonFiniteLoss)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) if continues else None)
        save_whole(trainer, folder)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(finished))
    if trainer.is_world_process_zero():
        remove_checkpoints(folder)


class RefuseNonFiniteLoss(TrainerCallback):
    """Ends a training that has diverged, at its next log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        check_loss(logs or {}, state.global_step)


def check_loss(logs: dict, step: int) -> None:
    """Raise where a logged loss is not finite: every weight trained on it is lost, and nothing would say so."""
    for name in ("loss", "train_loss", "eval_loss"):
        if name in logs and not math.isfinite(logs[name]):
            raise FirstTrlError(
                f"The {name.replace('_', ' ')} is {logs[name]} at step {step}: training has diverged. Lower "
                "learning_rate, add warmup_steps, or take bf16 instead of fp16; then start again."
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


def load_arguments(section: dict) -> dict:
    """The arguments of `first_trl.modeling.load_model` for a model that a recipe section describes."""
    return _load_arguments(split_section(section, ModelConfig)[1])


def _load_arguments(model_args: ModelConfig) -> dict:
    return {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    }


def launched_sharded() -> bool:
    """Whether `accelerate launch` was told to share the weights out over the processes of this job."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return fsdp or (deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def missing_quant_storage(section: dict) -> str | None:
    """Why a training section cannot be sharded (FSDP2, ZeRO-3), with the remedy; None where it can.

    4-bit weights are stored in bytes unless told otherwise, and a sharding that packs parameters of one type together
    cannot put them beside bfloat16 ones: the storage has to be declared of the type of the others.

    Args:
        section: settings of `sft`, `distill` or an arm, as the recipe has them.
    """
    if not section.get("load_in_4bit"):
        return None
    dtype, storage = section.get("dtype") or "float32", section.get("bnb_4bit_quant_storage")
    if storage == dtype:
        return None
    said = "it is missing" if storage is None else f"it is {storage}"
    return (
        f"{said}, and sharded 4-bit weights must be stored in the type of the others ({dtype}); write "
        f"bnb_4bit_quant_storage: {dtype} beside dtype: {dtype}"
    )

"""The devices that a plan is for: how many an accelerate configuration starts, what it shares out, and how fast.

Reads the configuration with accelerate's own parser and starts nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import missing_quant_storage
from .accelerators import ACCELERATORS, UTILISATION, Accelerator

_LESS_MEMORY = (
    "lower per_device_train_batch_size or tokens_per_batch, write gradient_checkpointing: true or load_in_4bit: true, "
    "or share the weights out (configs/fsdp2.yaml)"
)


@dataclass(frozen=True)
class Machine:
    """`processes` devices of one kind, each with one process; see `read_machine`."""

    processes: int = 1
    machines: int = 1
    kind: str = "NO"  # accelerate's distributed_type
    zero_stage: int = 0
    accelerator: Accelerator = ACCELERATORS["h100"]
    utilisation: float = UTILISATION

    @property
    def shards_weights(self) -> bool:
        return self.kind == "FSDP" or self.zero_stage == 3

    @property
    def shards_gradients(self) -> bool:
        return self.kind == "FSDP" or self.zero_stage >= 2

    @property
    def shards(self) -> int:
        """Over how many devices the weights are shared out."""
        return self.processes if self.shards_weights else 1

    @property
    def gradient_shards(self) -> int:
        """Over how many devices gradients and optimizer are shared out."""
        return self.processes if self.shards_gradients else 1

    def hours(self, flops: float, dtype: str | None) -> float | None:
        """Hours of the clock on all devices together; None where the accelerator has no such type."""
        half = dtype in ("bfloat16", "float16", "auto")
        tflops = self.accelerator.bfloat16_tflops if half else self.accelerator.float32_tflops
        if tflops is None:
            return None
        return flops / (tflops * 1e12 * self.utilisation * self.processes) / 3600

    def problems(self, recipe, works: list) -> list[str]:
        """What the recipe asks of these devices that they do not have."""
        found = []
        sections = {"sft": recipe.sft, **{f"arms.{arm}": recipe.arm_section(arm) for arm in recipe.arms}}
        for name, section in sections.items():
            if self.shards_weights and (problem := missing_quant_storage(section)):
                found.append(f"{name}.bnb_4bit_quant_storage: {problem}")
            if self.accelerator.bfloat16_tflops is None and (
                section.get("bf16") or section.get("dtype") == "bfloat16"
            ):
                found.append(f"{name}: {self.accelerator.title} has no bfloat16; write float16 or choose another")
        limit = self.accelerator.memory_gb * 1e9
        for work in works:
            if work.memory is not None and work.memory.total > limit:
                needed = f"{work.memory.total / 1e9:.0f} GB on each device, more than {self.accelerator.title} has"
                found.append(f"{work.name}: needs {needed}; {_LESS_MEMORY}")
        return found


def read_machine(config_file: str | None, accelerator: str, utilisation: float) -> Machine:
    """The devices of an accelerate configuration; one process without a file.

    Raises:
        ValueError: there is no such file, or it is no accelerate configuration; or an option is out of range.
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(f"--accelerator {accelerator!r} is not known; choose one of {', '.join(ACCELERATORS)}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is {utilisation}; it is a share of the peak, above 0 and at most 1.")
    chosen: dict[str, Any] = {"accelerator": ACCELERATORS[accelerator], "utilisation": utilisation}
    if config_file is None:
        return Machine(**chosen)
    from accelerate.commands.config.config_args import load_config_from_file

    if not Path(config_file).is_file():
        raise ValueError(f"--config_file {config_file}: there is no such file; configs/ has one for every case.")
    try:
        config = load_config_from_file(config_file)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--config_file {config_file} is no accelerate configuration: {error}") from error
    return Machine(
        processes=config.num_processes or 1,
        machines=config.num_machines or 1,
        kind=str(getattr(config.distributed_type, "value", config.distributed_type)),
        zero_stage=int((getattr(config, "deepspeed_config", None) or {}).get("zero_stage", 0)),
        **chosen,
    )

"""What a sharded run (FSDP2, ZeRO-3) asks of a quantised student, said before the weights are loaded.

4-bit weights are stored in bytes unless told otherwise, and a sharding that packs parameters of one type together
cannot put them beside bfloat16 ones: the storage has to be declared of the type of the others.
"""

import os


def launched_sharded() -> bool:
    """Whether `accelerate launch` was told to share the weights out over the processes of this job."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return fsdp or (deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def missing_quant_storage(section: dict) -> str | None:
    """Why a training section cannot be sharded, with the remedy; None where it can.

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

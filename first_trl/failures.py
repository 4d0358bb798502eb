"""Say in plain words why a command stopped, where the cause is known, and what to do about it.

A `FirstTrlError` says so itself; a full disk, too little memory and a model that cannot be loaded get their remedy
here. Anything else is unexpected: its traceback is in the log.
"""

import errno
import re

from .errors import FirstTrlError

AGAIN = "then run the same command again: finished work is kept"
_DISK = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the system allows this account (ulimit -f)",
}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# As safetensors and torch say it, which keep no errno; torch only knows that fewer bytes arrived than it sent.
_DISK_TEXT = re.compile(r"os error (\d+)|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos", re.DOTALL)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED")
# Of loading models: transformers raises plain OSErrors, whose text says what is wrong.
_LOADING = {"HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "SafetensorError"}
_NO_MODEL = re.compile(r"Unrecognized model|Couldn't instantiate the backend tokenizer")


def explain(error: BaseException, stage: str) -> str | None:
    """What went wrong in `stage` and the remedy, on one line; None for an error that nobody foresaw."""
    if isinstance(error, FirstTrlError):
        return str(error)
    chain, text = causes(error), " ".join(str(error).split())[:300]
    if disk := next(filter(None, map(_disk_problem, chain)), None):
        return f"{disk} ({text}); free some, or set output_dir to another disk, {AGAIN}"
    if place := next((each for each in chain if isinstance(each, OSError) and each.errno in _REFUSED), None):
        return f"{place.filename} cannot be read or written ({place.strerror}); correct its permissions, or output_dir"
    if any(map(_is_no_memory, chain)):
        return f"out of memory ({text}); {memory_advice(stage)}; {AGAIN}"
    if any(map(_is_of_loading, chain)):
        return (
            f"a model cannot be loaded: {text}; check its name, or fetch the folder again; for one of the Hub unset "
            "HF_HUB_OFFLINE, and where it is private or gated accept its terms and run `hf auth login`"
        )
    return None


def causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, what caused that, ..."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def memory_advice(stage: str) -> str:
    """What to change in the recipe where a stage takes more memory than there is."""
    if stage in ("sft", "distill"):
        return (
            f"halve {stage}.per_device_train_batch_size and double {stage}.gradient_accumulation_steps for the same "
            f"gradient; or set {stage}.gradient_checkpointing: true, or {stage}.load_in_4bit: true with use_peft: true"
        )
    if stage in ("cache", "evaluate"):
        return f"halve {stage}.tokens_per_batch, or use a device with more memory or cache.load_in_4bit: true"
    return "close other programs, or use a machine with more"


def _disk_problem(error: BaseException) -> str | None:
    found = _DISK_TEXT.search(str(error))
    if found and not found[1]:
        return "the disk is full, or its quota is used up"
    return _DISK.get(int(found[1]) if found else getattr(error, "errno", None) or 0)


def _is_no_memory(error: BaseException) -> bool:
    by_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
    return by_name or (isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error))))


def _is_of_loading(error: BaseException) -> bool:
    by_name = any(kind.__name__ in _LOADING for kind in type(error).__mro__)
    return by_name or (type(error) is OSError and error.errno is None) or bool(_NO_MODEL.search(str(error)))

"""Say in plain words why a command stopped, where the cause is known, and what to do about it.

A `FirstTrlError` says so itself. What other libraries raise for a gated model, a full disk or too little memory is
translated, by type and errno where they have them. Anything else is unexpected: its traceback is in the log.
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
_DISK_TEXT = re.compile(r"os error (\d+)|(PytorchStreamWriter failed|inline_container\.cc.*unexpected pos)")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED")
_TRAIN_SMALLER = (
    "halve {0}.per_device_train_batch_size and double {0}.gradient_accumulation_steps, which gives the same gradient; "
    "or set {0}.gradient_checkpointing: true, or {0}.load_in_4bit: true with {0}.use_peft: true; or lower "
    "task.max_length"
)
_BATCH_SMALLER = "halve {0}.tokens_per_batch; or use a GPU with more memory, or a configuration such as {1}"
MEMORY_ADVICE = {
    "sft": _TRAIN_SMALLER.format("sft"),
    "distill": _TRAIN_SMALLER.format("distill"),
    "cache": _BATCH_SMALLER.format("cache", "cache.load_in_4bit: true"),
    "evaluate": _BATCH_SMALLER.format("evaluate", "configs/single_gpu.yaml"),
}
_OTHER_ADVICE = "close other programs, or use a machine with more"


def explain(error: BaseException, stage: str) -> str | None:
    """What went wrong in `stage` and the remedy, on one line; None for an error that nobody foresaw."""
    if isinstance(error, FirstTrlError):
        return str(error)
    chain = causes(error)
    text = " ".join(str(error).split())
    if disk := _disk_problem(chain):
        return f"{disk} ({text[:200]}); free some, or set output_dir to another disk, {AGAIN}"
    if place := next((each for each in chain if isinstance(each, OSError) and each.errno in _REFUSED), None):
        return f"{place.filename} cannot be read or written ({place.strerror}); correct its permissions, or output_dir"
    if any(_is_no_memory(link) for link in chain):
        return f"out of memory ({text[:200]}); {memory_advice(stage)}; {AGAIN}"
    if match := re.match(r"\w+Callback requires (\w+) to be installed", text):
        return f"the tracker {match[1]} is not installed; run `pip install {match[1]}`, or set report_to: none"
    if "support bf16/gpu" in text:
        return (
            "the recipe trains in bf16, and this machine has no GPU for it; on a CPU write dtype: float32 and bf16: "
            "false in sft and distill, as recipes/reviews.yaml does"
        )
    return _explain_model(chain, text)


def causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, what caused that, ..."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def memory_advice(stage: str) -> str:
    """What to change in the recipe where a stage takes more memory than there is."""
    return MEMORY_ADVICE.get(stage, _OTHER_ADVICE)


def _disk_problem(chain: list[BaseException]) -> str | None:
    """What is wrong with the disk, where that is what ended the job."""
    for link in chain:
        found = _DISK_TEXT.search(" ".join(str(link).split()))
        number = link.errno if isinstance(link, OSError) else int(found[1]) if found and found[1] else None
        if number in _DISK or (found and found[2]):
            return _DISK.get(number or 0, "the disk did not take all of a file: it is full, or its quota is used up")
    return None


def _is_no_memory(error: BaseException) -> bool:
    by_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
    return by_name or (isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error))))


def _explain_model(chain: list[BaseException], text: str) -> str | None:
    """Errors of transformers over a model's folder or id, which it tells apart by their text alone."""
    names = {type(link).__name__ for link in chain}
    if "GatedRepoError" in names or "access a gated repo" in text:
        page = re.search(r"https?://\S+?/[\w.-]+/[\w.-]+(?=\.? )", text)
        where = f" at {page[0].rstrip('.')}" if page else ""
        return f"the model is gated; accept its terms{where}, run `hf auth login`, {AGAIN}"
    if "not a valid model identifier" in text:
        name = text.split()[0]
        return (
            f"there is no folder {name} here and no model {name} on the Hub; check the spelling and where you run "
            "this from, and run `hf auth login` if the model is private"
        )
    if "couldn't connect to" in text or names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return (
            "a model is not on this machine and the Hub cannot be reached; unset HF_HUB_OFFLINE if it is set, check "
            "the network, or give the path of a folder"
        )
    if "SafetensorError" in names:
        return f"a model's weights are damaged ({text}); fetch or save that model again"
    if "Unrecognized model" in text or "no file named" in text:
        return f"this is not a model's folder ({text[:160]}); give the folder that holds config.json and the weights"
    if "is not a valid JSON file" in text:
        return f"a model's folder is damaged ({text}); fetch or save that model again"
    if "Couldn't instantiate the backend tokenizer" in text:
        return "a model's folder holds no tokenizer; save its tokenizer beside it, with tokenizer.save_pretrained"
    return None

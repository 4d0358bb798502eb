"""What a teacher cache was made from, as SHA-256 digests: the names by which writer and reader recognise each other.

Two things with the same digest are the same for distillation: same token ids, same prompts, same weights, same rows.
Nothing here reads or writes a cache.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

WEIGHT_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model*.bin",
    "config.json",
    "adapter_config.json",
    "*.index.json",
)


def canonical_json(content) -> str:
    """One text for one content: keys sorted, no blanks, ASCII only, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(content) -> str:
    """SHA-256 of anything that JSON can hold, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of the whole token -> id mapping, added and special tokens included.

    Which of them ends or pads a sequence is left out: a cache stores ids, and a base model and its chat version, which
    share every id, may end their turns differently.

    Args:
        tokenizer: a `transformers` tokenizer.
    """
    return fingerprint(tokenizer.get_vocab())


def chat_template_fingerprint(tokenizer) -> str | None:
    """SHA-256 of the chat template (of all of them where there are several), None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else fingerprint(template)


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 of a local model or adapter: names and bytes of its weight files and of its configuration.

    Raises:
        ValueError: the folder holds no weights.
    """
    folder = Path(folder)
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise ValueError(
            f"{folder} holds no model weights (*.safetensors, pytorch_model*.bin, adapter_model*.bin). "
            "Name the folder that save_pretrained wrote."
        )
    return fingerprint([[file.name, file_sha256(file)] for file in files])


def row_key(input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """SHA-256 of one example: the length and the int32 little-endian bytes of `input_ids`, then of `labels`."""
    digest = hashlib.sha256()
    for values in (input_ids, labels):
        tokens = np.asarray(values, dtype="<i4")
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
    return digest.hexdigest()


def dataset_fingerprint(row_keys: Iterable[str]) -> str:
    """SHA-256 of a dataset: its row keys in order. Takes any iterable, and keeps none of it."""
    digest = hashlib.sha256()
    for key in row_keys:
        digest.update(bytes.fromhex(key))
    return digest.hexdigest()

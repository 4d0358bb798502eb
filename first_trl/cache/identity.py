"""What a recipe's cache is made from, in the words of its manifest: for the stage that writes it and those that read.

The teacher is known by its weights or its commit, the rows by their files, templates and lengths by their values; no
path of this machine is among them. Nothing here runs a teacher or reads a shard.
"""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.loading import hub_commit, source_identity
from ..errors import FirstTrlError
from ..files import file_digest
from ..settings import DatasetConfig
from .format import fingerprint, tokenizer_fingerprint
from .reader import TeacherCache, check_cache, open_cache

if TYPE_CHECKING:
    from ..recipe import Recipe

LIBRARIES = ("first-trl", "torch", "transformers", "peft", "bitsandbytes", "datasets", "pyarrow")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
CONFIGURATION = ("config.json", "adapter_config.json", "*.index.json")


def cached_split(recipe: "Recipe", role: str) -> DatasetConfig:
    """The rows behind `cache/train` and `cache/validation`: with `datasets.transfer`, train is those rows instead."""
    return (recipe.datasets.transfer if role == "train" else None) or getattr(recipe.datasets, role)


def kept_tokens(recipe: "Recipe") -> int:
    """K: how many tokens the recipe's cache keeps at each supervised position."""
    choices = recipe.task.choices if recipe.cache.support == "choices" else None
    return len(choices) if choices else recipe.cache.top_k


def teacher_identity(path: str, section: dict) -> dict:
    """The teacher of a manifest.

    Args:
        path: its folder, or its id on the Hub.
        section: how it is run, from `first_trl.recipe.teacher_section`.

    Returns:
        `id` (a folder's name alone), `revision` (as asked for) and `commit` (as found, on the Hub), `weights_sha256`
        of a folder, `base` with `base_sha256` of an adapter, `dtype`, `quantization`.
    """
    folder = Path(path) if Path(path).is_dir() else None
    base, base_sha256 = None, None
    if folder and (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        if Path(base).is_dir():
            base, base_sha256 = Path(base).name, weights_fingerprint(base)
    return {
        "id": folder.resolve().name if folder else path,
        "revision": section["model_revision"],
        "commit": None if folder else hub_commit(path, section["model_revision"], "model"),
        "weights_sha256": weights_fingerprint(folder) if folder else None,
        "base": base,
        "base_sha256": base_sha256,
        **_how_it_runs(section),
    }


def _how_it_runs(section: dict) -> dict:
    if section["backend"] == "server":  # it does not say
        return {"dtype": None, "quantization": None}
    quantization = section.get("bnb_4bit_quant_type", "nf4") if section["load_in_4bit"] else None
    return {"dtype": section["dtype"], "quantization": "int8" if section.get("load_in_8bit") else quantization}


def cache_identity(recipe: "Recipe", role: str, tokenizer, teacher: dict, backend: dict) -> dict:
    """The entries of `first_trl.cache.format.Job` for one split of a recipe, and what else tells its rows apart.

    Args:
        tokenizer: the teacher's.
        teacher: from `teacher_identity`.
        backend: `name`, `model` and `version` of what runs it; only `hf` sums the tail (`tail: exact`), a server's is
            what the K tokens leave of 1 (`from_top_k`).
    """
    return {
        "teacher": teacher,
        "support": recipe.cache.support,
        "backend": backend,
        "tail": "exact" if backend["name"] == "hf" else "from_top_k",
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "chat_template_sha256": chat_template_fingerprint(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "dataset": source_identity(cached_split(recipe, role), role),
        "task": vars(recipe.task),
        "library_versions": library_versions(),
    }


def open_recipe_cache(
    recipe: "Recipe", role: str, teacher_path: str, section: dict, verify: bool = True
) -> TeacherCache:
    """Open `cache/train` or `cache/validation` of a recipe's run, and refuse it if it is not what the recipe says.

    K, which tokens those are, the type, the templates, the rows' files, the teacher's weights, tokenizer and chat
    template are compared. A teacher of the Hub is known by its id and revision, without a network; a folder that is no
    longer here is not compared, for nothing can be made from it.

    Args:
        teacher_path, section: as for `teacher_identity`.
        verify: hash shards and weights and check every row: once for a stage is enough, on its main process.

    Raises:
        CacheError: the cache is damaged, or one of these differs; both values are named.
    """
    from ..modeling import load_tokenizer

    cache = open_cache(recipe.run_folder / "cache" / role, verify)
    expected: dict = {
        "top_k": kept_tokens(recipe),
        "support": recipe.cache.support,
        "dtype": recipe.cache.dtype,
        "task": vars(recipe.task),
        "dataset": source_identity(cached_split(recipe, role), role),
        "backend": {"name": recipe.cache.backend},
    }
    if cached_split(recipe, role) is recipe.datasets.transfer and recipe.cache.write_answers:
        expected["write_answers"] = dict(recipe.cache.write_answers)
    tokenizer, found = None, cache.manifest["teacher"]
    if Path(teacher_path).is_dir():
        expected["teacher"] = teacher_identity(teacher_path, section) if verify else _how_it_runs(section)
        tokenizer = load_tokenizer(teacher_path)
        expected["chat_template_sha256"] = chat_template_fingerprint(tokenizer)
    elif found["weights_sha256"] is not None and Path(teacher_path).name == found["id"]:
        expected["teacher"] = _how_it_runs(section)
    else:
        expected["teacher"] = {"id": teacher_path, "revision": section["model_revision"], **_how_it_runs(section)}
    check_cache(cache, tokenizer=tokenizer, **expected)
    return cache


def chat_template_fingerprint(tokenizer) -> str | None:
    """SHA-256 of the chat template (of all of them where there are several), None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else fingerprint(template)


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 of a local model or adapter: names and bytes of its weight files and of its configuration.

    Raises:
        ValueError: the folder holds no weights.
    """
    weights = [file for pattern in WEIGHTS for file in Path(folder).glob(pattern)]
    if not weights:
        raise FirstTrlError(
            f"{folder} holds no model weights ({', '.join(WEIGHTS)}). Name what save_pretrained wrote."
        )
    configuration = [file for pattern in CONFIGURATION for file in Path(folder).glob(pattern)]
    return fingerprint([[file.name, file_digest(file)] for file in sorted({*weights, *configuration})])


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the content of a cache, for its manifest."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions

"""What is wrong with a recipe, every problem at once, before anything is trained; `run` and `plan` ask here first.

    first-trl plan RECIPE [--config_file configs/fsdp2.yaml] [--accelerator h100] [--utilisation 0.3] [--key value ...]

One pass over the rows, the tokenizers and configurations of the models, and a look at this machine. No weights are
read. What only the rows, the models and the recipe decide is kept in the run folder, so that a second look is instant.
What a recipe file itself may say is checked before, by `first_trl.recipe`; what the jobs cost is `first_trl.plan`.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from .cache.format import tokenizer_fingerprint
from .constants import HUB_ID, IGNORED, STAGES
from .data.choices import choice_token_ids, encode_answer_row, has_answer, single_token_ids, unlabelled_encoder
from .data.encoding import encode_prompt, encode_row
from .data.loading import load_split, source_identity
from .data.rows import tokenizer_state
from .errors import FirstTrlError
from .evaluation import test_task
from .failures import explain
from .files import file_digest, write_atomically
from .log import RunLog, libraries_into, recording, show, status
from .plan import (
    ACCELERATORS,
    UTILISATION,
    Cost,
    Machine,
    Memory,
    Split,
    costs,
    describe,
    machine_limits,
    read_machine,
)
from .recipe import Recipe, RecipeError, load_recipe

SMALLEST_VALIDATION = 100  # rows; a calibration on fewer has an interval too wide to be of use
MOST_LOST = 0.05  # of a split's rows, dropped or cut, that need no warning
# Larger numbers in a config.json are no model's, and building it would take hours or all memory.
_MOST = {"layer": 10_000, "size": 2**24, "head": 2**16, "embd": 2**24}
# Trackers of `report_to` -> the modules that serve them, where that is not one of their own name.
_TRACKERS = {"azure_ml": ("azureml",), "flyte": ("flytekit",), "tensorboard": ("tensorboard", "tensorboardX")}
CHECKED = ".records/checks.json"  # in the run folder: the last report, and what it was made from


@dataclass
class Report:
    """What was found: problems stop a run, warnings do not, and what is unknown could not be looked up."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    splits: dict[str, Split] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Everything that was found, each kind under its title."""
        kinds = (("Could not be looked up", self.unknown), ("Warnings", self.warnings), ("Problems", self.problems))
        return [
            line
            for title, entries in kinds
            if entries
            for line in (f"{title}:", *(f"  - {entry}" for entry in dict.fromkeys(entries)))
        ]


def check_recipe(
    recipe: Recipe, stages: Sequence[str] = STAGES, machine: Machine | None = None, *, here: bool = True
) -> Report:
    """Look for everything that would stop these stages later.

    Args:
        stages: the stages that are about to run; each looks at the splits and models that it reads.
        machine: the devices that they run on; one process by default.
        here: whether they run on this machine, whose packages, folders and accelerator are then looked at too.
    """
    machine = machine or Machine()
    key = _made_from(recipe, stages, machine)
    report = _remembered(recipe, key)
    if report is None:
        report = _look(recipe, stages, machine)
        if key is not None and not report.unknown:
            _remember(recipe, key, report)
    if here:
        report.problems, report.unknown = [*report.unknown, *report.problems], []  # what is out of reach cannot run
        report.problems += _machine_problems(recipe, stages, machine, report)
    return report


def _look(recipe: Recipe, stages: Sequence[str], machine: Machine) -> Report:
    """What the rows, the models and the recipe decide."""
    import datasets

    datasets.disable_progress_bars()  # of loading; the pass over the rows has one, under a terminal
    report = Report()
    configs, tokenizers = _read_models(recipe, stages, report)
    tokenizer = next(iter(tokenizers.values()), None)  # the teacher's, where it could be read
    encoded = {}
    for name, config, task in _sources(recipe, stages):
        report.splits[name] = Split()
        if (rows := _load(report, name, config)) is not None:
            report.splits[name].rows = len(rows)
            if tokenizer is not None:
                report.problems += _other_tokens(recipe, name, task, rows[0], tokenizers)
                encoded[name] = _encode(report, recipe, name, task, rows, tokenizer)
    report.problems += _overlaps(recipe, encoded)
    report.warnings += _thin_validation(recipe, stages, report.splits)
    report.problems += _model_problems(recipe, stages, configs, tokenizer, report.splits)
    report.costs = costs(recipe, machine, report.splits, configs, len(tokenizer) if tokenizer is not None else 0)
    report.problems += [f"{cost.name}: {cost.problem}" for cost in report.costs if cost.problem]
    return report


# Models and tokenizers


def _models(recipe: Recipe, stages: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Place in the recipe -> (folder or Hub id, revision) of every model that these stages read; the teacher first."""
    found = {}
    if recipe.cache.teacher is not None:
        found["cache.teacher"] = recipe.cache.teacher, recipe.cache.teacher_revision
    elif recipe.sft.get("model_name_or_path"):
        found["sft.model_name_or_path"] = recipe.sft["model_name_or_path"], recipe.sft.get("model_revision")
    if not {"distill", "evaluate"} & set(stages):
        return found
    for arm in recipe.arms:
        section = recipe.arm_section(arm)
        model = section["model_name_or_path"], section.get("model_revision")
        if model not in found.values() or list(found.values()).index(model) == 0:
            place = (
                "distill"
                if section["model_name_or_path"] == recipe.distill.get("model_name_or_path")
                else f"arms.{arm}"
            )
            found.setdefault(f"{place}.model_name_or_path", model)
    return found


def _read_models(recipe: Recipe, stages: Sequence[str], report: Report) -> tuple[dict, dict]:
    """({folder or id: configuration}, {place: tokenizer}) of the models that could be read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    configs: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}
    for place, (path, revision) in _models(recipe, stages).items():
        try:
            base, base_revision = _base_of(path, revision)
            _refuse_size(json.loads(_config_file(base, base_revision).read_text(encoding="utf-8")))
            config = AutoConfig.from_pretrained(base, revision=base_revision, trust_remote_code=False)
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise FirstTrlError(
                    f"{type(config).__name__} is no causal language model; take one that predicts text"
                )
            for folder in {path, base}:
                _refuse_no_weights(Path(folder))
            tokenizers[place] = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
            configs[path] = config
        except Exception as error:  # a broken file makes transformers raise whatever its values lead to
            known = (
                explain(error, "")
                or f"its configuration or tokenizer cannot be read ({_brief(error)}); fetch it again"
            )
            (report.problems if Path(path).exists() else report.unknown).append(f"{place}: {path}: {known}")
    return configs, tokenizers


def _base_of(path: str, revision: str | None) -> tuple[str, str | None]:
    """The model that an adapter is loaded on, with its revision; any other model is its own."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return path, revision
    content = json.loads(file.read_text(encoding="utf-8"))
    base = content["base_model_name_or_path"]
    if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
        raise FirstTrlError(f"its base {base} is not here; move it back, or correct {file}")
    return base, content.get("revision")


def _refuse_no_weights(folder: Path) -> None:
    if folder.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise FirstTrlError(
            f"{folder} has no weights (*.safetensors); save them with save_pretrained, or fetch it again"
        )


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _config_file(path: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    return Path(cached_file(path, "config.json", revision=revision))


def _refuse_size(content: Any) -> None:
    """Refuse numbers that no model has, before transformers makes lists and layers of them."""
    if not isinstance(content, dict):
        raise FirstTrlError(
            f"config.json holds a {type(content).__name__}, not the settings of a model; fetch it again"
        )
    for key, value in content.items():
        most = next((most for word, most in _MOST.items() if word in key), None)
        if most and isinstance(value, int) and abs(value) > most:
            raise FirstTrlError(f"config.json: {key} = {value:,}, more than any model has ({most:,}); fetch it again")
        if key.endswith("_config") and value is not None:
            _refuse_size(value)


# Rows


def _sources(recipe: Recipe, stages: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """(name, where it comes from, task) of every split that these stages read."""
    data = recipe.datasets
    on_labels = any(recipe.arm_trainer(arm) == "sft" for arm in recipe.arms)
    readers = {
        "train": ["sft", "evaluate", *(["distill"] if on_labels else []), *(["cache"] if not data.transfer else [])],
        "transfer": ["cache", "evaluate"],
        "validation": ["sft", "cache", "evaluate"],
    }
    for role, read_by in readers.items():
        if getattr(data, role) is not None and set(read_by) & set(stages):
            yield role, getattr(data, role), recipe.task
    for name, config in data.test.items() if "evaluate" in stages else ():
        yield f"test.{name}", config, test_task(recipe.task, config.task)


def _load(report: Report, name: str, config) -> Any | None:
    """The rows of a split; why they cannot be loaded goes to the report."""
    try:
        return load_split(config, name if name in ("train", "validation") else "test")
    except FirstTrlError as error:
        is_here = config.data_files is not None or Path(config.path).exists()
        text = f"datasets.{name}: {str(error).partition(': ')[2] or error}"
        (report.problems if is_here else report.unknown).append(text)
        return None


def _other_tokens(recipe: Recipe, name: str, task, row: dict, tokenizers: dict[str, Any]) -> Iterator[str]:
    """What makes a student see other tokens than its teacher: another vocabulary, template, BOS or normaliser."""
    (place, teacher), *others = tokenizers.items()
    for other, tokenizer in others:
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(teacher):
            yield (
                f"{other}: {tokenizer.name_or_path}: its tokenizer maps texts to other ids than {place}'s "
                f"({teacher.name_or_path}); take models that share one"
            )
            continue
        both = []
        for each in (teacher, tokenizer):
            try:
                both.append(encode_prompt(task, each, row))
            except FirstTrlError:
                break  # told with the row, where all rows are encoded
        if len(both) == 2 and both[0] != both[1]:
            pairs = enumerate(zip(*both, strict=False))
            at = max(next((i for i, (own, its) in pairs if own != its), min(map(len, both))) - 3, 0)
            shown = [
                repr(each.decode(ids[at : at + 11])) for each, ids in zip((teacher, tokenizer), both, strict=True)
            ]
            yield (
                f"{other}: {tokenizer.name_or_path}: the first row of datasets.{name} becomes other tokens than with "
                f"{place} ({shown[1]} and {shown[0]}): another chat template, first token or normaliser. Save the "
                "teacher's tokenizer beside the student, or take another student"
            )


def _encode(report: Report, recipe: Recipe, name: str, task, rows, tokenizer) -> Any:
    """Encode every row of a split as its stages will; returns (N,) digests of the prompts, and fills in the report."""
    import datasets
    import numpy as np

    place, split = f"datasets.{name}", report.splits[name]
    if sys.stderr.isatty():
        datasets.enable_progress_bars()
    try:
        encode = _encoder(recipe, name, task, tokenizer, rows[0])
    except FirstTrlError as error:
        report.problems.append(f"{place}: {error}")
        return np.zeros(0, np.int64)
    kinds = {"tokens": "int32", "supervised": "int32", "first": "int32", "prompt": "int64", "problem": "string"}
    parts = [rows._fingerprint, dict(task), tokenizer_state(tokenizer), recipe.cache.support, version("first-trl")]
    checked = rows.map(
        partial(_encode_batch, encode=encode),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=datasets.Features({column: datasets.Value(kind) for column, kind in kinds.items()}),
        num_proc=min(os.cpu_count() or 1, 8) if len(rows) >= 20_000 else None,
        new_fingerprint=datasets.fingerprint.Hasher.hash(parts),
        desc=f"Checking {place}",
    )
    datasets.disable_progress_bars()
    columns = {column: checked.data.column(column).to_numpy() for column in kinds}
    good = columns["tokens"] > 0
    split.tokens, split.supervised = int(columns["tokens"].sum()), int(columns["supervised"].sum())
    if good.any():
        split.lengths = np.percentile(columns["tokens"][good], range(101)).round().astype(int).tolist()
        report.problems += _forced_answer(recipe, name, task, columns["first"][good], tokenizer)
    wrong = {int(index): columns["problem"][index] for index in np.flatnonzero(~good)}
    report.problems += _grouped(place, len(rows), wrong)
    return columns["prompt"]


def _encode_batch(batch: dict[str, list], indices: list[int], encode: Callable) -> dict[str, list]:
    """Of each row its counts, the token that its answer begins with and a digest of its prompt; or why it is none."""
    found: dict[str, list] = {name: [] for name in ("tokens", "supervised", "first", "prompt", "problem")}
    for slot, index in enumerate(indices):
        row = {name: values[slot] for name, values in batch.items()}
        try:
            example = encode(row, index)
        except FirstTrlError as error:
            for name, value in zip(found, (0, 0, -1, -1 - index, str(error)), strict=True):
                found[name].append(value)
            continue
        start = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        digest = hashlib.blake2b(array("q", example["input_ids"][:start]).tobytes(), digest_size=8).digest()
        prompt = int.from_bytes(digest, "little", signed=True)
        supervised = sum(label != IGNORED for label in example["labels"][1:])
        values = len(example["input_ids"]), supervised, example["labels"][start], prompt, None
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return found


def _encoder(recipe: Recipe, name: str, task, tokenizer, first_row: dict) -> Callable:
    """A function from a row and its number to an example, as the cache stage or the evaluation encodes this split."""
    wanted = {"task": task, "tokenizer": tokenizer, "place": ""}
    encode: Callable = partial(encode_row, **wanted)
    if task.choices:
        choice_token_ids(task, tokenizer, first_row)  # refuses choices that cannot be told apart
    if recipe.cache.support == "choices" and task.choices:
        encode = partial(encode_answer_row, choice_ids=single_token_ids(task, tokenizer, first_row), **wanted)
    if name == "transfer" and not has_answer(task, first_row):
        if recipe.cache.backend != "hf":
            raise FirstTrlError(f"rows without labels need cache.backend: hf, not {recipe.cache.backend}")
        encode, _ = unlabelled_encoder(task, tokenizer, first_row, "")
    return encode


def _grouped(place: str, rows: int, wrong: dict[int, str]) -> Iterator[str]:
    """Rows with the same problem together: how many, the first three, and what is wrong with the first."""
    groups: dict[str, list[int]] = {}
    for index, text in wrong.items():
        groups.setdefault(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", text), []).append(index)
    for members in groups.values():
        first = re.sub(r"^(, )?row \d+: ", "", wrong[members[0]])
        named = ", ".join(map(str, members[:3])) + ", ..." * (len(members) > 3)
        count = f"row {named}" if len(members) == 1 else f"{len(members):,} of {rows:,} rows ({named}), the first"
        yield f"{place}: {count}: {first}"


def _forced_answer(recipe: Recipe, name: str, task, first_N, tokenizer) -> Iterator[str]:
    """A position that holds the same token in every row measures nothing, and no calibration can be fitted there."""
    if name != "validation" or task.choices or recipe.calibrate.positions != "answer" or len(first_N) < 20:
        return
    import numpy as np

    values, counts = np.unique(first_N, return_counts=True)
    if counts.max() >= 0.99 * len(first_N):
        token = tokenizer.decode([int(values[counts.argmax()])])
        yield (
            f"calibrate.positions: answer: {counts.max():,} of {len(first_N):,} answers of datasets.{name} begin with "
            f"{token!r}, so that nothing is measured there; with a chat template that thinks write "
            "task.chat_template_kwargs: {enable_thinking: false}, or else calibrate.positions: all"
        )


def _overlaps(recipe: Recipe, prompts: dict[str, Any]) -> Iterator[str]:
    """Test rows that something was fitted on: their figures would flatter."""
    import numpy as np

    for name in prompts if not recipe.evaluate.allow_overlap else ():
        for role in ("train", "transfer", "validation"):
            if not name.startswith("test.") or role not in prompts:
                continue
            shared = np.flatnonzero(np.isin(prompts[name], prompts[role]) & (prompts[name] != -1))
            if len(shared):
                rows = ", ".join(map(str, shared[:3])) + ", ..." * (len(shared) > 3)
                yield (
                    f"datasets.{name}: {len(shared):,} of its {len(prompts[name]):,} prompts are in datasets.{role} "
                    f"(rows {rows}); remove them, or set evaluate.allow_overlap: true if that is meant"
                )


def _thin_validation(recipe: Recipe, stages: Sequence[str], splits: dict[str, Split]) -> Iterator[str]:
    rows = splits["validation"].rows if "validation" in splits else 0
    if 0 < rows < SMALLEST_VALIDATION and "calibrate" in stages:
        yield (
            f"datasets.validation: {rows} rows; a calibration on fewer than {SMALLEST_VALIDATION} is a guess within "
            "a wide interval: give it more rows"
        )


# Models against rows and machine


def _model_problems(recipe: Recipe, stages, configs: dict, tokenizer, splits: dict[str, Split]) -> Iterator[str]:
    longest = max((split.longest for split in splits.values()), default=0)
    for place, (path, _) in _models(recipe, stages).items():
        if path not in configs:
            continue
        text = configs[path].get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            yield f"task.max_length: a row has {longest} tokens, and {place} {path} was made for {limit}; lower it"
        if tokenizer is not None and len(tokenizer) > text.vocab_size:
            yield (
                f"{place}: {path} has {text.vocab_size} tokens and its tokenizer {len(tokenizer)}; take a tokenizer "
                "that belongs to it"
            )
    for student in recipe.arms if "distill" in stages else ():
        section, arm = recipe.arm_section(student), recipe.arm_trainer(student)
        config = configs.get(section["model_name_or_path"])
        given = section.get("router_aux_loss_coef")
        if arm == "first" and config is not None and given is None:
            text = config.get_text_config()
            own = getattr(text, "router_aux_loss_coef", 0.0) if hasattr(text, "output_router_logits") else 0.0
            if own:
                yield (
                    f"distill.router_aux_loss_coef: {section['model_name_or_path']} has {own} of its own, and the "
                    "auxiliary loss of a mixture of experts is not part of distillation; write "
                    "distill.router_aux_loss_coef: 0.0"
                )


def _machine_problems(recipe: Recipe, stages: Sequence[str], machine: Machine, report: Report) -> Iterator[str]:
    """What these stages need of this machine: a folder to write to, room in it, packages, and an accelerator."""
    from .training import missing_quant_storage

    sections = {"sft": recipe.sft} if "sft" in stages and recipe.cache.teacher is None else {}
    sections |= {f"arms.{arm}": recipe.arm_section(arm) for arm in recipe.arms if "distill" in stages}
    yield from _folder_problems(recipe.run_folder, report.costs)
    for name, section in sections.items():
        yield from _missing_packages(name, section)
        if machine.shards > 1 and (problem := missing_quant_storage(section)):
            yield f"{name}.bnb_4bit_quant_storage: {problem}"
        if (section.get("bf16") or section.get("fp16")) and not section.get("use_cpu"):
            import torch

            if not torch.accelerator.is_available():
                key = "bf16" if section.get("bf16") else "fp16"
                yield f"{name}.{key}: true, and this machine has no accelerator; write {key}: false, or use_cpu: true"


def _folder_problems(folder: Path, found: Sequence[Cost] = ()) -> Iterator[str]:
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        yield f"output_dir: {there} is {what}, where the run needs a folder; choose another output_dir"
        return
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield f"output_dir: {there} cannot be written to ({error.strerror}); choose another output_dir"
        return
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    needed, free = sum(cost.disk or 0 for cost in found), shutil.disk_usage(there).free + held
    if needed > free:
        yield (
            f"output_dir: {there} has room for {free / 1e9:.1f} GB, and cache, checkpoints and students take about "
            f"{needed / 1e9:.1f} GB; free some, or choose an output_dir on another disk"
        )


def _missing_packages(place: str, section: dict) -> Iterator[str]:
    """Settings that a package must be installed for."""
    trackers = section.get("report_to") or []
    wanted = {
        f"report_to: {name}": _TRACKERS.get(name, (name,))
        for name in ([trackers] if isinstance(trackers, str) else trackers)
        if name not in ("none", "all")
    }
    if str(section.get("attn_implementation")).startswith("flash_attention_2"):
        wanted["attn_implementation: flash_attention_2"] = ("flash_attn", "kernels")
    for setting, modules in wanted.items():
        if not any(find_spec(module) for module in modules):
            yield f"{place}.{setting}: {modules[0]} is not installed; run `pip install {modules[0]}`, or remove it"


# What was found before


def _made_from(recipe: Recipe, stages: Sequence[str], machine: Machine) -> str | None:
    """A digest of everything that a report follows from; None where a part of it has no fingerprint."""
    models = [_model_identity(*model) for model in _models(recipe, stages).values()]
    sources = [source_identity(config, name) for name, config, _ in _sources(recipe, stages)]
    if None in models or any(source["files_sha256"] is None and source["commit"] is None for source in sources):
        return None
    parts = [recipe.to_dict(), list(stages), asdict(machine), models, sources]
    parts += [version(name) for name in ("first-trl", "transformers", "datasets", "trl", "peft")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _model_identity(path: str, revision: str | None) -> list | None:
    """The small files of a local model by content, the weights by size; of the Hub, the commit that is here."""
    folder = Path(path)
    if not folder.is_dir():
        reference = Path(HF_HUB_CACHE) / f"models--{path.replace('/', '--')}" / "refs" / (revision or "main")
        return [path, reference.read_text().strip()] if reference.is_file() else None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = (".safetensors", ".bin", ".pt")
    return [[file.name, file.stat().st_size if file.suffix in weights else file_digest(file)] for file in files]


def _remembered(recipe: Recipe, key: str | None) -> Report | None:
    file = recipe.run_folder / CHECKED
    if key is None or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["made_from"] != key:
            return None
        report = Report(**content["report"])
        report.splits = {name: Split(**split) for name, split in content["report"]["splits"].items()}
        report.costs = [
            Cost(**{**cost, "memory": cost["memory"] and Memory(*cost["memory"])})
            for cost in content["report"]["costs"]
        ]
    except (ValueError, TypeError, KeyError):  # damaged, or of another version: look again
        return None
    return report


def _remember(recipe: Recipe, key: str, report: Report) -> None:
    try:
        write_atomically(
            recipe.run_folder / CHECKED, json.dumps({"made_from": key, "report": asdict(report)}, indent=1)
        )
    except OSError:  # `_folder_problems` says so
        pass


def passed(recipe: Recipe, stages: Sequence[str], config_file: str | None = None, quiet: bool = False) -> bool:
    """Whether these stages may start here; whatever was found is printed, every problem at once, and logged."""
    started = time.monotonic()
    try:
        machine = read_machine(config_file)
        if problems := list(_folder_problems(recipe.run_folder)):  # there is no place for a log
            raise FirstTrlError("\n".join(["Problems:", *(f"  - {problem}" for problem in problems)]))
    except FirstTrlError as error:
        print(error, file=sys.stderr)
        return False
    with recording(recipe.run_folder / "log.txt", quiet=quiet) as log, libraries_into(log):
        report = check_recipe(recipe, stages, machine)
        for line in report.lines():
            show(line)
        rows = sum(split.rows for split in report.splits.values())
        found = f"{len(report.problems)} problems; nothing was started" if report.problems else "no problems"
        status(f"checked {rows:,} rows, the models and this machine in {time.monotonic() - started:.0f} s: {found}")
    return not report.problems


def main(argv: list[str]) -> int:
    """`first-trl plan`: print costs and problems; the exit status is 0 without problems and 2 with."""
    parser = argparse.ArgumentParser(prog="first-trl plan", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the experiment's YAML file")
    parser.add_argument("--config_file", help="an accelerate configuration; without one, a single process")
    parser.add_argument("--accelerator", default="h100", help=f"one of {', '.join(ACCELERATORS)} (default h100)")
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, help=f"share of its peak that is reached ({UTILISATION})"
    )
    options, overrides = parser.parse_known_args(argv)
    try:
        recipe = load_recipe(options.recipe, overrides)
        machine = read_machine(options.config_file, options.accelerator, options.utilisation)
    except (RecipeError, FirstTrlError) as error:
        print(error, file=sys.stderr)
        return 2
    with libraries_into(RunLog(os.devnull)):
        report = check_recipe(recipe, machine=machine, here=False)
    report.problems += machine_limits(recipe, machine, report.costs)
    print("\n".join([*describe(report.costs, machine), "", *report.lines()]))
    if not report.problems:
        print(f"\nNo problems found{' in what could be looked at' * bool(report.unknown)}.")
    return 2 if report.problems else 0

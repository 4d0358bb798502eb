"""What the sections of a recipe ask of each other, and of this machine's folders.

Rules inside a section stand with it in `first_trl.settings`; what rows and models ask is `first_trl.checks`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .constants import HUB_ID, POST_HOC, REPORT_ARMS
from .data.loading import local_files, looks_local, source_problem
from .loss_rules import loss_conflicts
from .recipe_file import is_secret
from .settings import Conflict, Recipe, first_only_keys


def recipe_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict between sections: where it is, and what is wrong; what to do."""
    task, data, cache, arms = recipe.task, recipe.datasets, recipe.cache, recipe.arms
    trained = {("sft",): recipe.sft, ("distill",): recipe.distill} | {("arms", arm): own for arm, own in arms.items()}
    for path, section in trained.items():
        if path != ("sft",) and recipe.seeds is not None and "seed" in section:
            yield (*path, "seed"), "the recipe has seeds for every student; remove one of them"
        if (model := section.get("model_name_or_path")) is not None:
            yield from _model_conflicts((*path, "model_name_or_path"), model)
    if cache.teacher is not None:
        yield from _model_conflicts(("cache", "teacher"), cache.teacher)
    elif "model_name_or_path" not in recipe.sft:
        yield ("sft", "model_name_or_path"), "there is no teacher; write the teacher's Hub id or folder"
    if arms and "model_name_or_path" not in recipe.distill:
        yield ("distill", "model_name_or_path"), "there is no student; write the student's Hub id or folder"
    if data.train is None and (arms or cache.teacher is None):
        yield ("datasets", "train"), "it is missing; write the split to train on"
    for arm in arms:
        if arm in (*REPORT_ARMS, "best") or arm.endswith(POST_HOC):
            yield ("arms", arm), "report and push mean something else by it; choose another name"
    if recipe.push.model_fields_set and arms and recipe.push.arm not in (*arms, "best"):
        yield ("push", "arm"), f"there is no such arm; choose one of {', '.join(arms)}"
    if cache.support == "choices":
        if not task.choices:
            why = "cache.support: choices needs them; list the closed answers, or write support: top_k"
            yield ("task", "choices"), why
        elif task.append_eos and task.completion is not None:
            why = "cache.support: choices keeps no end of sequence; write append_eos: false, or cache.support: top_k"
            yield ("task", "append_eos"), why
        for name, test in data.test.items():
            if test.task and "choices" in test.task and not test.task["choices"]:
                why = "cache.support: choices needs some; give this set choices, or write cache.support: top_k"
                yield ("datasets", "test", name, "task", "choices"), why
    if recipe.distill.get("rounds", 1) == 2:
        for section in (recipe.arm_section(arm) for arm in arms if recipe.has_second_round(arm)):
            default = "temperature" if "recalibration_value" in section else recipe.calibrate.method
            if (method := section.get("recalibration_method") or default) not in ("temperature", "none"):
                yield ("distill", "rounds"), f"a second round changes a temperature, not {method}; write rounds: 1"
        if not recipe.distill.get("closing", True):
            yield ("distill", "rounds"), "a second round needs the closing temperature; write closing: true"
    if cache.write_answers is not None:
        yield from _written_conflicts(recipe, cache.write_answers.max_new_tokens)
    yield from _source_conflicts(recipe)
    yield from _training_conflicts(recipe)


def _model_conflicts(path: tuple, model: str) -> Iterator[Conflict]:
    if looks_local(model) and (model.startswith("~") or not Path(model).is_dir()):
        yield path, "there is no such folder; give the model's, from the current directory; ~ is written ${HOME}"
    elif not looks_local(model) and not HUB_ID.fullmatch(model):
        yield path, "it is neither a folder nor the id of a model on the Hub; write owner/name or a path"


def _source_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Every split can be found, and no two read the same rows."""
    data = recipe.datasets
    splits: dict[tuple, Any] = {(role,): getattr(data, role) for role in ("train", "transfer", "validation")}
    splits |= {("test", name): test for name, test in data.test.items()}
    readers: dict[tuple, str] = {}
    for path, split in splits.items():
        where = ("datasets", *path)
        if split is None:
            continue
        if problem := source_problem(split):
            yield (*where, problem[0]), f"{problem[1]}; {problem[2]}"
            continue
        files = tuple(str(file.resolve()) for file in local_files(split))
        source = files or (split.path, split.name, split.revision or "main", str(split.data_files))
        other = readers.setdefault((source, split.split or ("" if files else path[0])), ".".join(where))
        if other != ".".join(where):
            yield where, f"it reads the same rows as {other}, which a model has learned; give it rows of its own"


def _training_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """The rules between the settings of one training run, for the teacher and for every student."""
    for key, why in _run_conflicts(recipe.sft, packed=False):
        yield ("sft", key), why
    for arm, own in recipe.arms.items():
        section, on_labels = recipe.arm_section(arm), recipe.arm_trainer(arm) == "sft"
        found = list(_run_conflicts(section, packed=not on_labels))
        if on_labels:
            why = "an arm with trainer: sft does not know it; remove it, or write trainer: first"
            found += [(key, why) for key in own if key in first_only_keys()]
        else:
            default = None if "recalibration_value" in section else recipe.calibrate.method
            found += loss_conflicts({"recalibration_method": default} | section)
        for key, why in found:
            yield ("arms", arm, key) if key in own else ("distill", key), why


def _written_conflicts(recipe: Recipe, max_new_tokens: int) -> Iterator[Conflict]:
    """Answers that the teacher writes: to prompts of their own, with an end, and never taken for labels."""
    task, where = recipe.task, ("cache", "write_answers")
    if recipe.datasets.transfer is None:
        yield where, "there are no prompts to answer; write datasets.transfer, or remove it"
    if task.choices:
        yield where, "the task is closed, and the teacher's most probable choice stands in for each answer; remove it"
    if task.supervise == "all":
        yield ("task", "supervise"), "the teacher writes the last turn alone; write last"
    if task.prompt is not None and not task.append_eos:
        yield ("task", "append_eos"), "cache.write_answers needs what ends an answer; write true"
    if max_new_tokens >= task.max_length:
        why = f"task.max_length = {task.max_length} leaves no room for a prompt; lower it, or raise task.max_length"
        yield (*where, "max_new_tokens"), why
    for arm, own in recipe.arms.items():
        if recipe.arm_section(arm).get("ce_weight"):
            why = "with cache.write_answers its rows have no labels but the teacher's own answers; remove it"
            yield ("arms", arm, "ce_weight") if "ce_weight" in own else ("distill", "ce_weight"), why


def _run_conflicts(section: dict, packed: bool) -> Iterator[tuple[str, str]]:
    """(key, "what is wrong; what to do"); packed: max_length has a meaning with packing."""
    if not section.get("use_peft"):
        remedy = "write use_peft: true in this section, or remove it"
        if ignored := [key for key in section if re.fullmatch(r"lora_.*|use_rslora|use_dora", key)]:
            yield ignored[0], f"without use_peft {', '.join(ignored)} would be ignored; {remedy}"
        for key in ("load_in_4bit", "load_in_8bit"):
            if section.get(key):
                yield key, f"quantised weights cannot be trained without an adapter; {remedy}"
    for first, second in (("load_in_4bit", "load_in_8bit"), ("bf16", "fp16")):
        if section.get(first) and section.get(second):
            yield second, f"{first} is true as well; keep one of the two"
    if section.get("max_length") is not None and not (packed and section.get("packing")):
        yield "max_length", "it is for packed rows (distill, packing: true); write it as task.max_length"
    evaluated, saved = section.get("eval_strategy", "no"), section.get("save_strategy", "epoch")
    if section.get("load_best_model_at_end") and saved != "best" and evaluated != saved:
        why = f"eval_strategy is {evaluated} and save_strategy is {saved}; give both the same value"
        yield "load_best_model_at_end", why


def unsafe_settings(value: Any, path: tuple = ()) -> Iterator[Conflict]:
    """Credentials, since recipes are published, and whatever runs code that comes with a model; at any depth."""
    key = path[-1] if path else None
    if is_secret(path, value):
        yield path, "it looks like a credential, and recipes are published; run `hf auth login` instead"
    elif key in ("trust_remote_code", "use_kernels", "kernel_config"):
        yield path, "code that comes with a model is never run; remove it, and take a model that transformers knows"
    elif key == "attn_implementation" and isinstance(value, str) and "/" in value:
        yield path, "it names a kernel on the Hub, whose code would run; write sdpa, eager or flash_attention_2"
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from unsafe_settings(item, (*path, name))

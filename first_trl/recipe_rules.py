"""What settings of a recipe ask of each other, and of this machine's folders: rules that yield problems.

What rows and models ask of a recipe is `first_trl.checks`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .constants import FOLDER_NAME, HUB_ID, POST_HOC, REPORT_ARMS
from .data.loading import local_files, looks_local, source_problem
from .loss_rules import loss_conflicts
from .settings import MISSING, NAME_REMEDY, Problem, Section, first_only_keys

if TYPE_CHECKING:
    from .recipe import Recipe


def touched(broken: set[tuple], path: tuple) -> bool:
    return any(wrong[: len(path)] == path for wrong in broken)


def conflicts_of(value: Any, path: tuple, broken: set[tuple]) -> Iterator[Problem]:
    """The conflicts of a section and of those in it, but of a section with a wrong setting."""
    if isinstance(value, Section) and not any(wrong[:-1] == path for wrong in broken):
        for problem in value.conflicts():
            yield problem._replace(path=path + problem.path)
    for key, item in value if isinstance(value, Section) else value.items() if isinstance(value, dict) else ():
        yield from conflicts_of(item, (*path, key), broken)


def recipe_conflicts(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    """Every conflict of a recipe, with its path.

    Args:
        broken: the settings that are wrong by themselves, and have their default in `recipe`.
    """
    yield from conflicts_of(recipe, (), broken)
    for rules in (_name_rules, _training_rules, _model_rules, _data_rules, _support_rules, _written_rules):
        yield from rules(recipe, broken)


def _training_rules(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    """The rules between the settings of one training run, for the teacher and for every student."""
    for key, what, remedy in _training_conflicts(recipe.sft, packed=False):
        yield Problem(("sft", key), recipe.sft[key], what, remedy)
    for arm, own in recipe.arms.items() if not any("/" in arm for arm in recipe.arms) else ():
        section, on_labels = recipe.arm_section(arm), recipe.arm_trainer(arm) == "sft"
        found = list(_training_conflicts(section, packed=not on_labels))
        if on_labels:
            remedy = "remove it, or write trainer: first"
            found += [(k, "an arm with trainer: sft does not know it", remedy) for k in own if k in first_only_keys()]
        else:
            default = None if "recalibration_value" in section else recipe.calibrate.method
            found += loss_conflicts({"recalibration_method": default} | section)
        for key, what, remedy in found:
            path = ("arms", arm, key) if key in own else ("distill", key)
            yield Problem(path, {**section, **own}.get(key, MISSING), what, remedy)


def _training_conflicts(section: dict, packed: bool) -> Iterator[tuple[str, str, str]]:
    """(key, what is wrong, the remedy); packed: max_length has a meaning with packing."""
    if not section.get("use_peft"):
        remedy = "write use_peft: true in this section, or remove it"
        ignored = [key for key in section if re.fullmatch(r"lora_.*|use_rslora|use_dora", key)]
        if ignored:
            yield ignored[0], f"without use_peft {', '.join(ignored)} would be ignored", remedy
        for key in ("load_in_4bit", "load_in_8bit"):
            if section.get(key):
                yield key, "quantised weights cannot be trained without an adapter", remedy
    for first, second in (("load_in_4bit", "load_in_8bit"), ("bf16", "fp16")):
        if section.get(first) and section.get(second):
            yield second, f"{first} is true as well", "keep one of the two"
    if section.get("max_length") is not None and not (packed and section.get("packing")):
        remedy = "write it as task.max_length (only distill has one, the length of a packed row, with packing: true)"
        yield "max_length", "task.max_length decides where a row ends, in every stage alike", remedy
    evaluated, saved = section.get("eval_strategy", "no"), section.get("save_strategy", "epoch")
    if section.get("load_best_model_at_end") and saved != "best" and evaluated != saved:
        what = f"eval_strategy is {evaluated} and save_strategy is {saved}"
        yield "load_best_model_at_end", what, "give both the same value, so that the best model is saved"


def _model_rules(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    """Every model is a folder that exists or can be the id of one on the Hub, and none is missing."""
    sections: dict[tuple, dict] = {("sft",): recipe.sft, ("distill",): recipe.distill}
    sections |= {("arms", arm): own for arm, own in recipe.arms.items()}
    models = {(*path, "model_name_or_path"): own.get("model_name_or_path") for path, own in sections.items()}
    for path, model in {**models, ("cache", "teacher"): recipe.cache.teacher}.items():
        if model is None:
            continue
        if looks_local(model) and not Path(model).expanduser().is_dir() or model.startswith("~"):
            remedy = "give the folder that holds the model, from the current directory; ~ is written ${HOME}"
            yield Problem(path, model, "there is no such folder", remedy)
        elif not looks_local(model) and not HUB_ID.fullmatch(model):
            what = "it is neither a folder nor the id of a model on the Hub"
            yield Problem(path, model, what, "write owner/name or a path")
    needs = ("sft", recipe.cache.teacher is None, "teacher"), ("distill", bool(recipe.arms), "student")
    for role, needed, whose in needs:
        where = (role, "model_name_or_path")
        if needed and models[where] is None and not touched(broken, where):
            yield Problem(where, MISSING, f"there is no {whose}", f"write the {whose}'s Hub id or folder")


def _data_rules(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    data = recipe.datasets
    if data.train is None and (recipe.arms or recipe.cache.teacher is None) and not touched(broken, ("datasets",)):
        yield Problem(("datasets", "train"), MISSING, "it is missing", "write the split to train on")
    splits: dict[tuple, Any] = {(role,): getattr(data, role) for role in ("train", "transfer", "validation")}
    splits |= {("test", name): test for name, test in data.test.items()}
    readers: dict[tuple, str] = {}
    for path, split in splits.items():
        where = ("datasets", *path)
        if split is None or touched(broken, where):
            continue
        if problem := source_problem(split):
            yield Problem((*where, problem[0]), getattr(split, problem[0]), *problem[1:])
            continue
        files = tuple(str(file.resolve()) for file in local_files(split))
        source = files or (split.path, split.name, split.revision or "main", str(split.data_files))
        other = readers.setdefault((source, split.split or ("" if files else path[0])), ".".join(where))
        if other != ".".join(where):
            what = f"it reads the same rows as {other}, and a model is over-confident on what it learned"
            yield Problem(where, MISSING, what, "give it rows of its own")


def _name_rules(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    """The names of arms, and what refers to them; the seeds of students."""
    for arm in recipe.arms:
        if not FOLDER_NAME.fullmatch(arm):
            yield Problem(("arms", arm), MISSING, "an arm's name is the name of a folder", NAME_REMEDY)
        if arm in (*REPORT_ARMS, "best") or arm.endswith(POST_HOC):
            yield Problem(("arms", arm), MISSING, "report and push mean something else by it", "choose another name")
    trained = {("distill",): recipe.distill} | {("arms", arm): own for arm, own in recipe.arms.items()}
    for path, section in trained.items():
        if recipe.seeds is not None and "seed" in section:
            where = (*path, "seed")
            yield Problem(where, section["seed"], "the recipe has seeds for every student", "remove one of them")
    if recipe.push.model_fields_set and recipe.arms and recipe.push.arm not in (*recipe.arms, "best"):
        remedy = f"choose one of {', '.join(recipe.arms)}"
        yield Problem(("push", "arm"), recipe.push.arm, "there is no such arm", remedy)


def _support_rules(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    """Keeping the probabilities of the choices needs choices, and an answer that is all of the completion."""
    task, cache = recipe.task, recipe.cache
    if cache.support == "top_k" or touched(broken, ("task",)):
        return
    if not task.choices:
        remedy = "list the closed answers as task.choices, or write support: top_k"
        yield Problem(("cache", "support"), cache.support, "the task has no choices", remedy)
    elif task.append_eos and task.completion is not None:
        what = "cache.support: choices keeps the choices' tokens, and the end of sequence is none of them"
        yield Problem(("task", "append_eos"), True, what, "write append_eos: false, or cache.support: top_k")
    for name, test in recipe.datasets.test.items():
        if test.task and "choices" in test.task and not test.task["choices"]:
            where = ("datasets", "test", name, "task", "choices")
            what = "cache.support: choices recalibrates among choices, and this set has none"
            yield Problem(where, test.task["choices"], what, "give it choices, or write cache.support: top_k")


def _written_rules(recipe: "Recipe", broken: set[tuple]) -> Iterator[Problem]:
    """Answers that the teacher writes: to prompts of their own, with an end, and never taken for labels."""
    task, write = recipe.task, recipe.cache.write_answers
    if write is None or touched(broken, ("task",)) or touched(broken, ("cache",)):
        return
    where, length = ("cache", "write_answers"), ("cache", "write_answers", "max_new_tokens")
    if recipe.datasets.transfer is None and not touched(broken, ("datasets",)):
        yield Problem(where, MISSING, "there are no prompts to answer", "write datasets.transfer, or remove it")
    if task.choices:
        what = "the task is closed, and the teacher's most probable choice stands in for each answer"
        yield Problem(where, MISSING, what, "remove it")
    if task.supervise == "all":
        yield Problem(("task", "supervise"), "all", "the teacher writes the last turn alone", "write last")
    if task.prompt is not None and not task.append_eos:
        what = "cache.write_answers needs what ends an answer"
        yield Problem(("task", "append_eos"), False, what, "write true")
    if write.max_new_tokens >= task.max_length:
        what = f"task.max_length = {task.max_length} leaves no room for a prompt"
        yield Problem(length, write.max_new_tokens, what, "lower it, or raise task.max_length")
    for arm, own in recipe.arms.items() if not any("/" in arm for arm in recipe.arms) else ():
        if weight := recipe.arm_section(arm).get("ce_weight"):
            path = ("arms", arm, "ce_weight") if "ce_weight" in own else ("distill", "ce_weight")
            what = "with cache.write_answers its rows have no labels but the teacher's own answers"
            yield Problem(path, weight, what, "remove it")

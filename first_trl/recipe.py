"""One YAML file is one experiment: here it becomes a checked [`Recipe`], or all that is wrong with it is reported.

Everything is checked before anything heavy is imported: keys, types and rules inside a section by the models of
`first_trl.settings`, rules between sections by `first_trl.recipe_rules`. `sft`, `distill` and the arms are plain dicts
of checked settings, only those that were written: stages choose the defaults.
"""

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import Field, ValidationError, create_model

from .constants import DEFAULT_ARMS, SECRET_VALUE, STAGES
from .errors import shorten
from .recipe_file import RecipeError, RecipeFile, is_secret, read_value
from .recipe_rules import recipe_conflicts, unsafe_settings
from .settings import (
    RESERVED,
    Conflict,
    FolderName,
    Recipe,
    Section,
    TaskConfig,
    arm_of,
    teacher_section,
    training_model,
)

__all__ = ["STAGES", "Recipe", "RecipeError", "arm_of", "load_recipe", "teacher_section"]

# What people call a setting elsewhere, where spelling alone would not find it.
_ALIASES = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
            "rank": "lora_r", "model": "model_name_or_path", "torch_dtype": "dtype", "k": "top_k",
            "max_seq_length": "max_length"}  # fmt: skip
RUN_SETTINGS = ("output_dir", "seed", "seeds")  # beside the name, settings that belong to no section
_COMMAND_LINE = (0, 0, "command line")


@cache
def file_model() -> type[Recipe]:
    """A recipe as its file has it: `sft`, `distill` and the arms with TRL's settings."""
    sections: Any = {}
    for name, model in ((name, training_model(name)) for name in ("sft", "distill", "arms")):
        kind, default = (dict[FolderName, model], dict) if name == "arms" else (model, model)  # type: ignore[valid-type]
        sections[name] = (kind, Field(default_factory=default, description=Recipe.model_fields[name].description))
    return create_model("RecipeFile", __base__=Recipe, **sections)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Read a recipe file, apply command-line overrides, and check everything.

    Args:
        path: the YAML file. `${NAME}` and `${NAME:-default}` in its texts are read from the environment; `$${` is a
            literal `${`. `extends: other.yaml`, relative to the file, takes what this one does not say from another.
            Other relative paths start at the current directory.
        overrides: `--key value`, `--key=value`, `--section.key value`. A key without a section belongs to the top of
            the recipe (name, output_dir, seed), else to the section of `stage`, else to the only one that knows it.
        stage: the stage being run, one of [`STAGES`]; None for all of them.

    Raises:
        RecipeError: with every problem of the recipe: file, line, section, key, value, remedy.
    """
    file = RecipeFile(Path(path))
    tree = {key: value for key, value in file.values.items() if value is not None}
    tree.setdefault("arms", copy.deepcopy(DEFAULT_ARMS))
    _apply_overrides(file, tree, overrides, stage)
    for name, drop in (("arms", False), ("datasets", True)):  # `first:` alone is an arm, `train:` alone is no split
        if isinstance(tree.get(name), dict):
            tree[name] = {k: {} if own is None else own for k, own in tree[name].items() if not (drop and own is None)}
    if isinstance(tests := _value_at(tree, ("datasets", "test")), dict):  # a set of the recipe that is extended
        tree["datasets"]["test"] = {name: test for name, test in tests.items() if test is not None}
    problems = dict(unsafe_settings(tree)) | file.problems  # one for each setting, the first that is found
    recipe = None
    try:
        recipe = _as_recipe(tree)
    except ValidationError as error:
        problems = dict(_explained(error, tree, file_model())) | problems
        with suppress(ValidationError):
            recipe = _as_recipe(_without(tree, problems))
    if recipe is not None:
        between = {**dict(_task_problems(recipe, tree)), **dict(recipe_conflicts(recipe))}
        wrong = {where[0] for where in problems}  # what follows from a mistake is not another one
        problems |= {where: why for where, why in between.items() if where[0] not in wrong}
    if problems or recipe is None:
        raise RecipeError(str(path), _in_words(problems, tree, file.places))
    return recipe


def _as_recipe(tree: dict) -> Recipe:
    """The settings checked; those of TRL as dicts of what was written, in the order in which it was."""
    checked = dict(file_model().model_validate(tree))
    for name in ("sft", "distill"):
        checked[name] = {key: getattr(checked[name], key) for key in tree.get(name, {})}
    for arm, own in checked["arms"].items():
        checked["arms"][arm] = {key: getattr(own, key) for key in tree["arms"][arm]}
    return Recipe.model_construct(**checked)


def _without(tree: dict, problems: dict[tuple, str]) -> dict:
    """The settings but those that are wrong, to look for what else is."""
    good = copy.deepcopy(tree)
    for where in problems:
        if isinstance(above := _value_at(good, where[:-1]), dict):
            above.pop(where[-1], None)
    return good


def _task_problems(recipe: Recipe, tree: dict) -> Iterator[Conflict]:
    for name, test in recipe.datasets.test.items():
        try:
            TaskConfig.model_validate(dict(recipe.task) | (test.task or {}))
        except ValidationError as error:
            yield from _explained(error, tree, TaskConfig, ("datasets", "test", name, "task"))


def _in_words(problems: dict[tuple, str], tree: dict, places: dict[tuple, tuple[int, int, str]]) -> list[str]:
    """Place, setting, value, what is wrong and what to do, in the order of the file; no secret."""
    lines = []
    for path, why in problems.items():
        known = (places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places)
        rank, line, place = next(known, (0, 0, "recipe"))
        value, shown = _value_at(tree, path), ""
        if value is not _MISSING and not isinstance(value, dict):
            secret = is_secret(path, value) or SECRET_VALUE.search(repr(value))
            shown = " = (not shown)" if secret else f" = {shorten(repr(value), 100)}"
        text = f"{place}: {'.'.join(map(str, path))}{shown}: {why}{'' if why.endswith('?') else '.'}"
        lines.append((rank, line, SECRET_VALUE.sub("(not shown)", text)))
    return [text for _, _, text in sorted(lines, key=lambda item: item[:2])]


_MISSING = object()


def _value_at(tree: Any, path: tuple) -> Any:
    try:
        return reduce(getitem, path, tree)
    except (KeyError, IndexError, TypeError):
        return _MISSING


# --- overrides


def _apply_overrides(file: RecipeFile, tree: dict, words: Sequence[str], stage: str | None) -> None:
    """`--a 1 --b=2 --c x y --d` sets a to 1, b to 2, c to [x, y] and d to true."""
    pairs: list[tuple[str, list[str]]] = []
    wrong: dict[str, str] = {}
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            pairs.append((key, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            wrong[word] = "it belongs to no setting; write --key value"
    for key, values in pairs:
        owners = [section for section, keys in _known_keys().items() if key in keys]
        if "." in key or key in ("name", *RUN_SETTINGS):
            _set(file, tree, tuple(key.split(".")), values or ["true"])
        elif stage in owners or len(owners) == 1:
            _set(file, tree, (stage if stage in owners else owners[0], key), values or ["true"])
        elif owners:
            several = " or ".join(f"--{section}.{key}" for section in owners)
            wrong[f"--{key}"] = f"it is a setting of several sections; write {several}"
        else:
            wrong[f"--{key}"] = f"it is unknown; {_suggestion(key, ())}"
    file.problems |= {(word,): why for word, why in wrong.items()}
    file.places |= {(word,): _COMMAND_LINE for word in wrong}


def _set(file: RecipeFile, tree: dict, path: tuple, words: list[str]) -> None:
    place = tree
    for n, part in enumerate(path[:-1], 1):
        if place.get(part) is None:
            place[part] = {}
            file.places[path[:n]] = _COMMAND_LINE
        place = place[part]
        if not isinstance(place, dict):
            file.problems[path[:n]] = f"--{'.'.join(path)} needs a mapping here; correct the recipe or the override"
            return
    model = _model_at(path[:-1])
    hint = model.model_fields[path[-1]].annotation if model and path[-1] in model.model_fields else None
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # The shell has eaten any quotes: where text is wanted, 123 and yes are meant as text.
    text = all(member in (str, NoneType) or get_origin(member) is Literal for member in members)
    text = text and not (words == ["null"] and NoneType in members)
    values = words if text else [read_value(word) for word in words]
    place[path[-1]] = values[0] if len(values) == 1 else values
    # What the file said there no longer counts.
    file.places = {where: it for where, it in file.places.items() if where[: len(path)] != path} | {
        path: _COMMAND_LINE
    }
    file.problems = {where: why for where, why in file.problems.items() if where[: len(path)] != path}


# --- what is wrong with a setting, in words


def _section_of(hint: Any) -> type[Section] | None:
    """The section that a type stands for, or None."""
    members = () if get_origin(hint) is dict else (hint, *get_args(hint))
    return next((member for member in members if isinstance(member, type) and issubclass(member, Section)), None)


def _model_at(path: tuple) -> type[Section] | None:
    """The section whose settings stand below a path."""
    hint: Any = file_model()
    for part in path:
        if section := _section_of(hint):
            hint = section.model_fields[part].annotation if part in section.model_fields else None
        else:
            hint = get_args(hint)[1] if get_origin(hint) is dict else None
    return _section_of(hint)


@cache
def _known_keys() -> dict[str, set[str]]:
    """Section -> the keys it knows."""
    sections = {name: _section_of(field.annotation) for name, field in file_model().model_fields.items()}
    known = {name: set(model.model_fields) for name, model in sections.items() if model and name != "datasets"}
    for section in ("sft", "distill"):  # what people mean by max_length is the task's
        known[section].discard("max_length")
    return known


def _suggestion(key: str, known: Sequence[str]) -> str:
    """The remedy for an unknown key: another section that knows it, or the nearest name here."""
    alias = _ALIASES.get(key, key)
    if alias in known:
        return f"did you mean {alias}?"
    if owners := [f"{section}.{alias}" for section, keys in _known_keys().items() if alias in keys]:
        return "it belongs in " + " or ".join(owners)
    if alias in Recipe.model_fields:
        return f"it belongs at the top of the recipe, as {alias}"
    everywhere = sorted(set().union(*_known_keys().values()))
    close = [near for names in (known, everywhere) for near in difflib.get_close_matches(key, names, 1, cutoff=0.5)]
    return f"did you mean {close[0]}?" if close else "remove it"


def _explained(error: ValidationError, tree: dict, model: type[Section], path: tuple = ()) -> Iterator[Conflict]:
    """What pydantic refuses, as (path of the setting, what is wrong; what to do), the last of a setting's first."""
    for found in reversed(error.errors(include_url=False)):
        where, kind = path, found["type"]
        for part in found["loc"]:
            absent = _value_at(tree, (*where, part)) is _MISSING
            if isinstance(part, int) or (absent and kind not in ("missing", "conflict")):
                break  # an item of a list, or a member of a union
            where = (*where, part)
        if kind == "extra_forbidden":
            above = (model if where[:-1] == path else _model_at(where[:-1])) or model
            yield where, RESERVED.get(where[-1]) or f"unknown key; {_suggestion(where[-1], list(above.model_fields))}"
        elif kind == "missing":
            yield where, "it is missing; write it"
        else:
            yield where, found["msg"] if kind == "conflict" else _misfit(found, _value_at(tree, where))


def _misfit(found: Any, value: Any) -> str:
    """What is wrong with a value that has another type or lies out of range, and what to do."""
    kind, items = found["type"], value if isinstance(value, list) else [value]
    wanted = found["msg"].removeprefix("Input should be ")
    if kind in ("model_type", "dict_type"):
        return "it needs a mapping; write its settings on the lines below, indented"
    if kind == "string_pattern_mismatch":
        letters = "it is no name; use letters, digits, '-' and '_', starting with a letter or digit"
        return "it is not the id of a repository; write owner/name" if "/" in wanted else letters
    if kind == "too_short":
        return "it is empty; name at least one"
    unquoted = int | float if "string" in kind else bool if "literal" in kind else ()
    if any(isinstance(item, unquoted) for item in items):
        return "YAML reads it as a number, or a bare yes, no, on, off as a boolean; put it in quotes"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", wanted)
        close = difflib.get_close_matches(str(value), choices, n=1)
        guess = f"did you mean {close[0]}? Choose " if close else "choose "
        return RESERVED.get(str(value)) or f"it does not fit; {guess}one of {', '.join(choices)}"
    if isinstance(value, list) and len(value) == 1 and not isinstance(found["loc"][-1], int):
        return f"it does not fit; write {value[0]!r} without the brackets"
    return f"it does not fit; write {wanted if wanted.startswith('a ') else f'a value {wanted}'}"

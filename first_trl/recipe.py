"""One YAML file is one experiment: here it becomes a checked [`Recipe`], or all that is wrong with it is reported.

Everything is checked before anything heavy is imported: keys and types by the models of `first_trl.settings`, what
settings ask of each other by `first_trl.recipe_rules`. `sft`, `distill` and the arms are plain dicts of checked
settings, only those that were written: stages choose the defaults.
"""

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from .constants import DEFAULT_ARMS, FOLDER_NAME, STAGES
from .errors import FirstTrlError
from .files import write_atomically
from .recipe_file import COMMAND_LINE, ErrorCollector, RecipeError, is_secret, read_recipe_file, read_value
from .recipe_rules import conflicts_of, recipe_conflicts, touched
from .settings import (
    CONFLICTS_LATER,
    DISTILL_ONLY,
    MISSING,
    NAME_REMEDY,
    REMOVED_VALUES,
    RESERVED_KEYS,
    TRAINING,
    CacheConfig,
    CalibrateConfig,
    Datasets,
    EvaluateConfig,
    Problem,
    PushConfig,
    Section,
    Seed,
    TaskConfig,
    first_only_keys,
    training_model,
)

__all__ = ["STAGES", "Recipe", "RecipeError", "arm_of", "load_recipe"]

# What people call a setting elsewhere, where spelling alone would not find it.
_ALIASES = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
_ALIASES |= {"rank": "lora_r", "model": "model_name_or_path", "torch_dtype": "dtype", "k": "top_k"}
_ALIASES |= {"max_seq_length": "max_length"}


def arm_of(student: str) -> str:
    """`first/seed-1` -> `first`; an arm's own name stays as it is."""
    return student.partition("/")[0]


class Recipe(Section):
    """A checked recipe. `sft`, `distill` and `arms` hold the settings as written; stages fill in the rest."""

    name: str = Field(description="The run's folder in output_dir.")
    output_dir: str = Field("runs", description="Folder of all runs.")
    seed: Seed = Field(0, description="Seed of the teacher and, without seeds, of every student.")
    seeds: list[Seed] | None = Field(None, description="Train every student once with each of these seeds.")
    task: TaskConfig = Field(default_factory=TaskConfig)
    datasets: Datasets
    sft: dict[str, Any] = Field(default_factory=dict, description="The teacher's training on labels.")
    cache: CacheConfig = Field(default_factory=CacheConfig)
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    distill: dict[str, Any] = Field(default_factory=dict, description="The students' training.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: copy.deepcopy(DEFAULT_ARMS),
        description="The students to compare: for each, the settings that differ from distill.",
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    push: PushConfig = Field(default_factory=PushConfig)

    def conflicts(self) -> Iterator[Problem]:
        if not FOLDER_NAME.fullmatch(self.name.replace(".", "-")) or ".." in self.name:
            yield self.wrong("name", "it is not the name of a folder in output_dir", NAME_REMEDY)
        if not self.output_dir.strip():
            yield self.wrong("output_dir", "it is empty", "write a folder, or remove the line for `runs`")
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            yield self.wrong("seeds", "these are not seeds", "list different whole numbers, e.g. [0, 1, 2]")

    @property
    def run_folder(self) -> Path:
        """Where every stage reads and writes; relative to the current directory unless output_dir is absolute."""
        return Path(self.output_dir) / self.name

    @property
    def students(self) -> list[str]:
        """The students' folders below `students/`: one per arm, or `<arm>/seed-<n>` where there are several seeds.

        A student's name can be given wherever an arm's can.
        """
        several = self.seeds is not None and len(self.seeds) > 1
        return [f"{arm}/seed-{seed}" for arm in self.arms for seed in self.seeds or []] if several else list(self.arms)

    def students_of(self, arm: str) -> list[str]:
        """The students of an arm, one per seed, in the order of `seeds`."""
        return [student for student in self.students if arm_of(student) == arm]

    def seed_of(self, student: str) -> int:
        """The seed that a student is trained with."""
        _, several, seed = student.partition("/seed-")
        return int(seed) if several else self.seeds[0] if self.seeds else self.seed

    def arm_trainer(self, arm: str) -> str:
        """`first` (knowledge matching) or `sft` (the control, trained on labels)."""
        return self._arm(arm).get("trainer", "first")

    def arm_section(self, arm: str) -> dict:
        """The settings of one student: `distill` with the arm's own on top, for FIRSTConfig and ModelConfig.

        For an arm with `trainer: sft` the settings that only FIRSTConfig knows are left out.
        """
        left_out = {"trainer", *DISTILL_ONLY} | (first_only_keys() if self.arm_trainer(arm) == "sft" else set())
        return {key: value for key, value in (self.distill | self._arm(arm)).items() if key not in left_out}

    def _arm(self, arm: str) -> dict:
        if arm_of(arm) not in self.arms:
            known = ", ".join(self.arms) or "none"
            raise FirstTrlError(f"There is no arm {arm_of(arm)!r} in this recipe; its arms are {known}.")
        return self.arms[arm_of(arm)]

    def to_dict(self) -> dict:
        """Plain values that [`load_recipe`] reads back to an equal recipe; variables and overrides are resolved."""
        return _plain(self)

    def to_yaml(self) -> str:
        """The recipe as it runs, defaults included."""
        return yaml.safe_dump(_plain(self, escape=True), sort_keys=False, allow_unicode=True, width=100)

    def write_resolved(self, path: str | Path) -> None:
        """Write the recipe as it runs, as YAML."""
        write_atomically(path, self.to_yaml())


QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


def teacher_section(recipe) -> dict:
    """How the teacher is loaded for inference: as `sft` trained it, unless `cache` says otherwise."""
    settings = recipe.cache
    quantization = {name: recipe.sft[name] for name in QUANTIZATION if name in recipe.sft}
    if settings.load_in_4bit is not None:
        quantization |= {"load_in_4bit": settings.load_in_4bit, "load_in_8bit": False}
    return {
        "model_revision": settings.teacher_revision or "main",
        "dtype": settings.teacher_dtype or recipe.sft.get("dtype", "float32"),
        "attn_implementation": settings.attn_implementation or recipe.sft.get("attn_implementation"),
        "load_in_4bit": False,
        **quantization,
        "backend": settings.backend,
    }


def _plain(value: Any, escape: bool = False) -> Any:
    """Models as mappings, without the settings that are None; what the user wrote in a mapping stays as it is.

    With `escape` every `${` is written so that reading gives it back.
    """
    if isinstance(value, BaseModel):
        value = {key: item for key, item in value if item is not None}
    if isinstance(value, dict):
        return {key: _plain(item, escape) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, escape) for item in value]
    return value.replace("${", "$${") if escape and isinstance(value, str) else value


@cache
def file_model() -> type[Recipe]:
    """A recipe as its file has it: `sft`, `distill` and the arms with TRL's settings."""
    trainer = Field("first", description="`first`: knowledge matching; `sft`: trained on labels.")
    own: Any = {"trainer": (Literal["first", "sft"], trainer)}
    arm = create_model("Arm", __base__=training_model("distill"), **own)
    help = {name: field.description for name, field in Recipe.model_fields.items()}
    distill = create_model("DistillSettings", __base__=training_model("distill"), **DISTILL_ONLY)
    sections: Any = {
        section: (model, Field(default_factory=model, description=help[section]))
        for section, model in (("sft", training_model("sft")), ("distill", distill))
    }
    sections["arms"] = (dict[str, arm], Field(default_factory=dict, description=help["arms"]))
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
    assert stage is None or stage in STAGES, stage
    errors = ErrorCollector(str(path))
    tree = {key: value for key, value in _read_with_base(Path(path), errors).items() if value is not None}
    tree.setdefault("arms", copy.deepcopy(DEFAULT_ARMS))
    for key, value in _split_overrides(overrides, errors):
        _apply_override(tree, key, value, stage, errors)
    if isinstance(tree["arms"], dict):
        tree["arms"] = {arm: {} if own is None else own for arm, own in tree["arms"].items()}
    if isinstance(tree.get("datasets"), dict):
        tree["datasets"] = {role: split for role, split in tree["datasets"].items() if split is not None}
    for problem in _unsafe(tree, ()):
        errors.add(*problem, settle=True)
    checked, broken = _validated(file_model(), tree, (), errors)
    if checked is None:
        errors.raise_if_any()
    recipe = _as_recipe(checked, tree)
    broken |= errors.settled
    problems = list(recipe_conflicts(recipe, broken))
    for name, test in recipe.datasets.test.items():
        where = ("datasets", "test", name, "task")
        if test.task is not None and not touched(broken, ("task",)):
            task, wrong = _validated(TaskConfig, dict(recipe.task) | test.task, where, errors)
            problems += conflicts_of(task, where, wrong)
    for problem in problems:
        errors.add(*problem)
    errors.raise_if_any()
    return recipe


def _read_with_base(path: Path, errors: ErrorCollector) -> dict:
    """The recipe's values over those of the recipe that it extends."""
    tree = read_recipe_file(path, errors)
    if "extends" not in tree:
        return tree
    name, own_places = tree.pop("extends"), errors.places
    base = path.parent / name if isinstance(name, str) and name else None
    if base is None or not base.is_file():
        errors.add(("extends",), name, "there is no such recipe", "give the path of one, relative to this file", True)
        return tree
    errors.places = {}
    below = read_recipe_file(base, errors, rank=2)
    errors.places |= own_places
    if "extends" in below:
        what = "that recipe extends another one, and only one level is read"
        errors.add(("extends",), name, what, "extend the last one directly")
    # Two recipes under one name would share a folder.
    return _merged({key: value for key, value in below.items() if key not in ("extends", "name")}, tree)


def _merged(below: Any, above: Any) -> Any:
    """Mappings key by key; anything else from above."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    rest = {key: value for key, value in below.items() if key not in above}
    return {key: _merged(below.get(key), value) for key, value in above.items()} | rest


# --- overrides


def _split_overrides(words: Sequence[str], errors: ErrorCollector) -> list[tuple[str, str | list[str]]]:
    """`--a 1 --b=2 --c x y --d` -> [("a", "1"), ("b", "2"), ("c", ["x", "y"]), ("d", "true")]."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            pairs.append((key, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            errors.add_at(COMMAND_LINE, f"the argument {word!r} belongs to no setting", "write --key value")
    return [(key, "true" if not values else values[0] if len(values) == 1 else values) for key, values in pairs]


def _apply_override(tree: dict, key: str, value: str | list[str], stage: str | None, errors: ErrorCollector) -> None:
    path = tuple(key.split(".")) if "." in key else _override_path(key, stage, errors)
    if path is None:
        return
    errors.overridden.add(path)
    errors.settled -= {known for known in errors.settled if known[: len(path)] == path}
    place = tree
    for i, part in enumerate(path[:-1]):
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            errors.add(path[: i + 1], place, f"--{key} needs a mapping here", "correct the recipe or the override")
            return
    _, hint, _ = _setting_at(file_model(), path)
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    is_text = all(member in (str, NoneType) or get_origin(member) is Literal for member in members)
    if isinstance(value, list):
        place[path[-1]] = [read_value(item) for item in value]
    else:  # the shell has eaten any quotes: where text is wanted, 123 and yes are meant as text
        place[path[-1]] = value if is_text and not (value == "null" and NoneType in members) else read_value(value)


def _override_path(key: str, stage: str | None, errors: ErrorCollector) -> tuple | None:
    if key in ("name", "output_dir", "seed", "seeds"):
        return (key,)
    owners = [section for section, keys in _known_keys().items() if key in keys]
    if stage in owners or len(owners) == 1:
        return (stage if stage in owners else owners[0], key)
    if owners:
        candidates = " or ".join(f"--{owner}.{key}" for owner in owners)
        errors.add_at(COMMAND_LINE, f"--{key} is a setting of several sections", f"write {candidates}")
    else:
        errors.add_at(COMMAND_LINE, f"--{key} is unknown", _suggest(key, []))
    return None


# --- keys and types


def section_of(hint: Any) -> type[Section] | None:
    """The section that a type stands for, or None."""
    members = [member for member in get_args(hint) if member is not NoneType] if get_origin(hint) is not dict else []
    hint = members[0] if len(members) == 1 else hint
    return hint if isinstance(hint, type) and issubclass(hint, Section) else None


def _setting_at(model: type[Section], path: tuple) -> tuple[tuple, Any, str]:
    """(the setting that a path leads to or into, its type, its help); the type is None for an unknown key."""
    hint: Any = model
    help = ""
    for i, part in enumerate(path):
        if section := section_of(hint):
            if part not in section.model_fields:
                return path[: i + 1], None, ""
            field = section.model_fields[part]
            hint, help = field.annotation, field.description or ""
        elif get_origin(hint) is dict and section_of(get_args(hint)[1]):
            hint = get_args(hint)[1]
        else:
            return path[:i], hint, help
    return path, hint, help


def _known_keys() -> dict[str, set[str]]:
    """Section -> the keys it knows."""
    sections = {name: section_of(field.annotation) for name, field in file_model().model_fields.items()}
    known = {name: set(model.model_fields) for name, model in sections.items() if model and name != "datasets"}
    # max_length is there for packed rows only: what people mean is the task's.
    return {section: keys - {"max_length"} if section in TRAINING else keys for section, keys in known.items()}


def _suggest(key: str, known: Sequence[str]) -> str:
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


def _validated(model: type[Section], tree: dict, path: tuple, errors: ErrorCollector) -> tuple[Any, set[tuple]]:
    """(the settings as a model, without those that are wrong; the wrong ones), or None where a required one is."""
    good = copy.deepcopy(tree)
    broken: set[tuple] = set()
    try:
        return model.model_validate(good, context=CONFLICTS_LATER), broken
    except ValidationError as error:
        found = error.errors(include_url=False)
    for problem in found:
        where, hint, help = _setting_at(model, problem["loc"])
        pruned, value = good, tree
        for part in where:
            value = value.get(part, MISSING)
        for part in where[:-1]:
            pruned = pruned.get(part, {})
        if problem["type"] == "missing":
            words = "it is missing", f"write it: {help.rstrip('.')}"
        elif problem["type"] == "extra_forbidden":
            above = section_of(_setting_at(model, where[:-1])[1])
            known = list(above.model_fields) if above else []
            words = RESERVED_KEYS.get(where[-1]) or ("unknown key", _suggest(where[-1], known))
        else:
            words = _misfit(problem, value)
        errors.add((*path, *where), value, *words, settle=True)
        if problem["type"] != "extra_forbidden":
            broken.add((*path, *where))
        pruned.pop(where[-1], None)
        if hint is bool:
            pruned[where[-1]] = True  # `use_peft: "true"` is one mistake, not a missing use_peft as well
    try:
        return model.model_validate({"name": "unnamed", **good} if not path else good, context=CONFLICTS_LATER), broken
    except ValidationError:
        return None, broken


def _misfit(found: Any, value: Any) -> tuple[str, str]:
    """(what is wrong, the remedy) of a value that pydantic refuses."""
    items, wanted = value if isinstance(value, list) else [value], found["msg"].removeprefix("Input should be ")
    what, remedy = "it does not fit", f"write {wanted if wanted.startswith('a ') else f'a value {wanted}'}"
    if "model_type" in found["type"]:
        return "it needs a mapping", "write its settings on the lines below, indented"
    if re.search("string|literal", found["type"]) and any(isinstance(item, bool) for item in items):
        remedy = "YAML reads an unquoted yes, no, on, off, true or false as a boolean: put it in quotes"
    elif "string" in found["type"] and any(isinstance(item, int | float) for item in items):
        remedy = "put it in quotes"
    elif found["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", wanted)
        close = difflib.get_close_matches(str(value), choices, n=1)
        guess = f"did you mean {close[0]}? Choose " if close else "choose "
        return REMOVED_VALUES.get(str(value)) or (what, f"{guess}one of {', '.join(choices)}")
    elif isinstance(value, list) and len(value) == 1 and not isinstance(found["loc"][-1], int):
        remedy = f"write {value[0]!r} without the brackets"
    return what, remedy


def _unsafe(value: Any, path: tuple) -> Iterator[Problem]:
    """Credentials, since recipes are published, and whatever runs code that comes with a model; at any depth."""
    key = path[-1] if path else None
    if is_secret(path, value):
        what = "it looks like a credential, and recipes are published"
        yield Problem(path, value, what, "run `hf auth login` instead")
    elif key in ("trust_remote_code", "use_kernels", "kernel_config"):
        remedy = "remove it, and take a model that transformers has a class for"
        yield Problem(path, value, "code that comes with a model is never run", remedy)
    elif key == "attn_implementation" and isinstance(value, str) and "/" in value:
        what, remedy = "it names a kernel on the Hub, whose code would run", "write sdpa, eager or flash_attention_2"
        yield Problem(path, value, what, remedy)
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unsafe(item, (*path, name))


def _as_recipe(checked: Any, tree: dict) -> Recipe:
    """The sections of TRL's settings as dicts of what was written, in the order in which it was."""

    def written(section: Section, own: dict) -> dict:
        return {key: getattr(section, key) for key in own or () if key in section.model_fields_set}

    parts = dict(checked)
    parts |= {name: written(parts[name], tree.get(name, {})) for name in TRAINING}
    parts["arms"] = {arm: written(own, tree["arms"][arm]) for arm, own in checked.arms.items()}
    return Recipe.model_construct(**parts)

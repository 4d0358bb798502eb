"""One YAML file is one experiment: here it becomes a checked [`Recipe`], or all that is wrong with it is reported.

Everything is checked before anything heavy is imported: keys and types by the models of `first_trl.settings`, then
files and what settings ask of each other by the rules below, each of which yields problems and raises nothing. `sft`,
`distill` and the arms stay plain dicts of checked settings, only those that were written: stages choose the defaults.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from .constants import BUILDERS, DEFAULT_ARMS, HUB_ID, POST_HOC, REPORT_ARMS, STAGES
from .errors import FirstTrlError
from .loss_rules import loss_conflicts
from .recipe_file import COMMAND_LINE, MISSING, ErrorCollector, RecipeError, is_secret, read_recipe_file, read_value
from .settings import (
    REMOVED_VALUES,
    RESERVED_KEYS,
    TRAINING,
    CacheConfig,
    CalibrateConfig,
    DatasetConfig,
    Datasets,
    EvaluateConfig,
    Problem,
    PushConfig,
    Section,
    Seed,
    TaskConfig,
    first_only_keys,
    training_fields,
    training_model,
)

__all__ = ["STAGES", "Recipe", "RecipeError", "arm_of", "load_recipe"]

_RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)
_SETTINGS: dict[str, type[Section]] = {
    "task": TaskConfig,
    "cache": CacheConfig,
    "calibrate": CalibrateConfig,
    "evaluate": EvaluateConfig,
    "push": PushConfig,
}
_SPLITS = {"train": "train", "transfer": "train", "validation": "validation"}  # the split read where none is named
# What people call a setting elsewhere, where spelling alone would not find it.
_ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "rank": "lora_r",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "k": "top_k",
}
_MAX_LISTED = 100_000  # files and folders that a pattern of data_files may look through


def arm_of(student: str) -> str:
    """`first/seed-1` -> `first`; an arm's own name stays as it is."""
    return student.partition("/")[0]


class Top(Section):
    """The settings of a recipe outside its sections."""

    name: str = Field(description="The run's folder in output_dir.")
    output_dir: str = Field("runs", description="Folder of all runs.")
    seed: Seed = Field(0, description="Seed of the teacher and, without seeds, of every student.")
    seeds: list[Seed] | None = Field(None, description="Train every student once with each of these seeds.")

    def conflicts(self) -> Iterator[Problem]:
        if not _RUN_NAME.fullmatch(self.name) or ".." in self.name:
            remedy = "use letters, digits, '-', '_' and '.', starting with a letter or digit"
            yield Problem(("name",), self.name, "it is not the name of a folder in output_dir", remedy)
        if not self.output_dir.strip():
            remedy = "write a folder, or remove the line for `runs`"
            yield Problem(("output_dir",), self.output_dir, "it is empty", remedy)
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            remedy = "list different whole numbers from 0 on, e.g. [0, 1, 2]"
            yield Problem(("seeds",), self.seeds, "these are not seeds", remedy)


class Recipe(Top):
    """A checked recipe. `sft`, `distill` and `arms` hold the settings as written; stages fill in the rest."""

    task: TaskConfig
    datasets: Datasets
    sft: dict[str, Any] = Field(default_factory=dict, description="The teacher's training on labels.")
    cache: CacheConfig = Field(default_factory=CacheConfig)
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    distill: dict[str, Any] = Field(default_factory=dict, description="The students' training.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {arm: dict(own) for arm, own in DEFAULT_ARMS.items()},
        description="The students to compare: for each, the settings that differ from distill.",
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    push: PushConfig = Field(default_factory=PushConfig)

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
        return _arm_section(self.distill, self._arm(arm))

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
        return yaml.safe_dump(_escaped(self.to_dict()), sort_keys=False, allow_unicode=True, width=100)

    def write_resolved(self, path: str | Path) -> None:
        """Write the recipe as it runs, as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


def _arm_section(distill: dict, own: dict) -> dict:
    section = distill | {key: value for key, value in own.items() if key != "trainer"}
    only_first = first_only_keys() if own.get("trainer") == "sft" else set()
    return {key: value for key, value in section.items() if key not in only_first}


def _plain(value: Any) -> Any:
    """Models as mappings, without the settings that are None; what the user wrote in a mapping stays as it is."""
    if isinstance(value, BaseModel):
        return {key: _plain(item) for key, item in value if item is not None}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _escaped(value: Any) -> Any:
    """The value with every `${` written so that reading gives it back."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


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
    tree = _read_with_base(Path(path), errors)
    tree.setdefault("arms", {arm: dict(own) for arm, own in DEFAULT_ARMS.items()})
    for key, value in _split_overrides(overrides, errors):
        _apply_override(tree, key, value, stage, errors)
    for problem in _unsafe(tree, ()):
        errors.add(*problem, settle=True)
    parts = _check_sections(tree, errors)
    errors.raise_if_any()
    return Recipe(**parts)


def _read_with_base(path: Path, errors: ErrorCollector) -> dict:
    """The recipe's values over those of the recipe that it extends."""
    tree = read_recipe_file(path, errors)
    if "extends" not in tree:
        return tree
    name, own_places = tree.pop("extends"), errors.places
    base = path.parent / name if isinstance(name, str) and name else None
    if base is None or not base.is_file():
        remedy = "give the path of a recipe, relative to this one"
        errors.add(("extends",), name, "there is no such recipe", remedy, settle=True)
        return tree
    errors.places = {}
    below = read_recipe_file(base, errors, rank=2)
    errors.places |= own_places
    if "extends" in below:
        what = "that recipe extends another one, and only one level is read"
        errors.add(("extends",), name, what, "extend the last one directly")
    below.pop("name", None)  # two recipes under one name would share a folder
    return _merged({key: value for key, value in below.items() if key != "extends"}, tree)


def _merged(below: Any, above: Any) -> Any:
    """Mappings key by key; anything else from above."""
    if isinstance(below, dict) and isinstance(above, dict):
        rest = {key: value for key, value in below.items() if key not in above}
        return {key: _merged(below.get(key), value) for key, value in above.items()} | rest
    return above


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
    hint = _type_at(path)
    if isinstance(value, list):
        place[path[-1]] = [read_value(item) for item in value]
    elif _is_text(hint) and not (value == "null" and NoneType in get_args(hint)):
        place[path[-1]] = value  # the shell has eaten any quotes: 123 and yes are meant as text here
    else:
        place[path[-1]] = read_value(value)


def _override_path(key: str, stage: str | None, errors: ErrorCollector) -> tuple | None:
    if key in Top.model_fields:
        return (key,)
    owners = [section for section, keys in _known_keys().items() if key in keys]
    if stage in owners:
        return (stage, key)
    if len(owners) == 1:
        return (owners[0], key)
    if owners:
        candidates = " or ".join(f"--{owner}.{key}" for owner in owners)
        errors.add_at(COMMAND_LINE, f"--{key} is a setting of several sections", f"write {candidates}")
    else:
        errors.add_at(COMMAND_LINE, f"--{key} is unknown", _suggest(key, [*Top.model_fields]))
    return None


def _type_at(path: tuple) -> Any:
    """The type of the setting at a path, where the path leads to one."""
    models: dict[str, type[Section]] = _SETTINGS | {"datasets": TaskConfig if "task" in path[2:-1] else DatasetConfig}
    section = "distill" if path[0] == "arms" else path[0]
    model = Top if len(path) == 1 else training_model(section) if section in TRAINING else models.get(section)
    field = model.model_fields.get(path[-1]) if model else None
    return field.annotation if field else None


def _is_text(hint: Any) -> bool:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return bool(members) and all(m in (str, NoneType) or get_origin(m) is Literal for m in members)


# --- keys


def _known_keys() -> dict[str, set[str]]:
    """Section -> the keys it knows."""
    known = {section: set(model.model_fields) for section, model in _SETTINGS.items()}
    for section in TRAINING:
        # max_length is there for packed rows only: what people mean is the task's.
        known[section] = set(training_fields(section)) - set(RESERVED_KEYS) - {"hub_token", "max_length"}
    return known


def _suggest(key: str, known: Sequence[str]) -> str:
    """The remedy for an unknown key: another section that knows it, or the nearest name here."""
    alias = _ALIASES.get(key, key)
    if alias in known:
        return f"did you mean {alias}?"
    owners = [section for section, keys in _known_keys().items() if alias in keys]
    if owners:
        return "it belongs in " + " or ".join(f"{owner}.{alias}" for owner in owners)
    if alias in Top.model_fields:
        return f"it belongs at the top of the recipe, as {alias}"
    everywhere = sorted(set().union(*_known_keys().values()))
    close = [near for names in (known, everywhere) for near in difflib.get_close_matches(key, names, 1, cutoff=0.5)]
    return f"did you mean {close[0]}?" if close else "remove it"


# --- what may be nowhere in a recipe


def _unsafe(value: Any, path: tuple) -> Iterator[Problem]:
    """Credentials, since recipes are published, and whatever runs code that comes with a model."""
    key = path[-1] if path else None
    if is_secret(path, value):
        yield Problem(
            path, value, "it looks like a credential, and recipes are published", "run `hf auth login` instead"
        )
    elif key in ("trust_remote_code", "use_kernels", "kernel_config"):
        remedy = "remove it, and take a model that transformers has a class for"
        yield Problem(path, value, "code that comes with a model is never run", remedy)
    elif key == "attn_implementation" and isinstance(value, str) and "/" in value:
        remedy = "write sdpa, eager or flash_attention_2"
        yield Problem(path, value, "it names a kernel on the Hub, whose code would run", remedy)
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unsafe(item, (*path, name))


# --- sections


def _check_sections(tree: dict, errors: ErrorCollector) -> dict[str, Any]:
    """The arguments of [`Recipe`]; complete only where `errors` stays empty."""
    for key in tree:
        if key not in Recipe.model_fields:
            errors.add((key,), MISSING, "unknown section", _suggest(key, list(Recipe.model_fields)))
    top = _checked(Top, {key: value for key, value in tree.items() if key in Top.model_fields}, (), errors)
    parts: dict[str, Any] = {
        section: _checked(model, _mapping(tree, (section,), errors), (section,), errors)
        for section, model in _SETTINGS.items()
    }
    for section in TRAINING:
        parts[section] = _training(_mapping(tree, (section,), errors), (section,), errors)
    parts["arms"] = _arms(tree, errors)
    splits = _datasets(_mapping(tree, ("datasets",), errors), parts["task"], errors)
    parts["datasets"] = Datasets.model_construct(**{"train": None, "transfer": None, "validation": None, **splits})
    for rule in (_model_rules, _seed_rules, _support_rules, _data_rules, _push_rules):
        for problem in rule(parts, tree):
            errors.add(*problem)
    return {**(dict(top) if top else {}), **parts}


def _mapping(tree: dict, path: tuple, errors: ErrorCollector) -> dict:
    """The mapping at the end of a path; an absent or empty one is {}."""
    value = tree.get(path[-1])
    if isinstance(value, dict):
        return value
    if value is not None:
        errors.add(path, value, "it needs a mapping", "write its settings on the lines below, indented", settle=True)
    return {}


def _checked(model: type[Section], section: dict, path: tuple, errors: ErrorCollector) -> Any:
    """The section as a model, or None with the reasons in `errors`."""
    try:
        return model.model_validate(section)
    except ValidationError as error:
        wrong = _report(error, model, section, path, errors)
    unknown = wrong - set(model.model_fields)
    if unknown and unknown == wrong:  # what else is wrong is known only without these
        return _checked(model, {key: value for key, value in section.items() if key not in unknown}, path, errors)
    return None


def _training(section: dict, path: tuple, errors: ErrorCollector) -> dict:
    """The checked settings of `sft`, `distill` or an arm, with each value as its field wants it."""
    model = training_model("sft" if path[0] == "sft" else "distill")
    for key in RESERVED_KEYS.keys() & section.keys():
        errors.add((*path, key), section[key], *RESERVED_KEYS[key])
    section = {key: value for key, value in section.items() if key not in RESERVED_KEYS}
    try:
        good = model.model_validate(section)
        wrong: set[str] = set()
    except ValidationError as error:
        wrong = _report(error, model, section, path, errors)
        good = model.model_validate({key: value for key, value in section.items() if key not in wrong})
    # `use_peft: "true"` is one mistake, not a missing use_peft as well.
    booleans = {key: True for key in wrong & set(model.model_fields) if model.model_fields[key].annotation is bool}
    return {key: getattr(good, key) for key in section if key not in wrong} | booleans


def _report(error: ValidationError, model: type[Section], section: dict, path: tuple, errors: ErrorCollector) -> set:
    """Record what pydantic found, in our words, once for each setting; returns the settings."""
    wrong = set()
    for found in error.errors(include_url=False):
        if found["type"] == "conflicts":
            for problem in found["ctx"]["problems"]:
                errors.add((*path, *problem.path), *problem[1:])
            continue
        key = str(found["loc"][0])
        if key in wrong:
            continue
        wrong.add(key)
        field = model.model_fields.get(key)
        value = section.get(key, MISSING)
        if key in RESERVED_KEYS and field is None:
            what, remedy = RESERVED_KEYS[key]
        elif field is None:
            what, remedy = "unknown key", _suggest(key, list(model.model_fields))
        elif value is MISSING:
            what, remedy = "it is missing", f"write it: {(field.description or '').rstrip('.')}"
        else:
            what, remedy = _misfit(found, field.annotation, value)
        errors.add((*path, key), value, what, remedy)
    return wrong


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
_BOUNDS = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}


def _misfit(found: Any, hint: Any, value: Any) -> tuple[str, str]:
    """(what is wrong, the remedy) of a value that its field refuses."""
    limits = found.get("ctx", {})
    bounds = [words.format(f"{limits[name]:.10g}") for name, words in _BOUNDS.items() if name in limits]
    if bounds:
        return "it is out of range", f"write {bounds[0]}"
    wanted = described(hint)
    if found["type"] == "literal_error" and isinstance(value, str):
        if value in REMOVED_VALUES:
            return REMOVED_VALUES[value]
        close = difflib.get_close_matches(value, wanted.removeprefix("one of ").split(", "), n=1)
        guess = f"did you mean {close[0]}? Choose " if close else "choose "
        return "it is not a value of this setting", guess + wanted
    return f"it needs {wanted}, not {_kind_of(value)}", _hint(value, wanted)


def described(hint: Any) -> str:
    """What a field accepts, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return described(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(described(member) for member in args if member is not NoneType))
    if origin is list:
        return "a list of texts" if args[0] is str else "a list of values"
    return _PLAIN.get(origin or hint, "another value")


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float):
        finite = value - value == 0
        return "a number with decimals" if finite else "an infinite or undefined number"
    if isinstance(value, list):
        kinds = sorted({_kind_of(item) for item in value if not isinstance(item, list)})
        return f"a list that holds {' and '.join(kinds)}" if kinds else "a list"
    return "nothing" if value is None else _PLAIN.get(type(value), type(value).__name__)


def _hint(value: Any, wanted: str) -> str:
    """The remedy for the mistakes that YAML invites."""
    text = "text" in wanted or "one of" in wanted
    items = value if isinstance(value, list) else [value]
    if text and any(isinstance(item, bool) for item in items):
        return "YAML reads an unquoted yes, no, on, off, true or false as a boolean: put it in quotes"
    if text and any(isinstance(item, int | float) for item in items):
        return "put it in quotes"
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list | dict):
        return f"write {value[0]!r} without the brackets"
    if isinstance(value, str):
        return f"write {wanted}, without quotes"
    return f"write {wanted}, or remove the line to keep the default" if value is None else f"write {wanted}"


def _arms(tree: dict, errors: ErrorCollector) -> dict[str, dict]:
    arms = {}
    for arm in _mapping(tree, ("arms",), errors):
        path = ("arms", arm)
        if not _FOLDER_NAME.fullmatch(arm):
            remedy = "use letters, digits, '-' and '_', starting with a letter or digit"
            errors.add(path, MISSING, "an arm's name is the name of a folder", remedy)
        if arm in REPORT_ARMS or arm.endswith(POST_HOC):
            errors.add(path, MISSING, "the report has a column of its own with this name", "choose another name")
        own = dict(_mapping(tree["arms"], path, errors))
        given = {"trainer": own.pop("trainer")} if "trainer" in own else {}
        if given and given["trainer"] not in ("first", "sft"):
            remedy = "choose first (knowledge matching) or sft (labels)"
            errors.add((*path, "trainer"), given["trainer"], "it is not one of first, sft", remedy)
            given = {}
        if given.get("trainer") == "sft":
            for key in first_only_keys() & own.keys():
                remedy = "remove it, or write trainer: first"
                errors.add((*path, key), own.pop(key), "an arm with trainer: sft does not know it", remedy)
        arms[arm] = given | _training(own, path, errors)
    return arms


def _datasets(section: dict, task: TaskConfig | None, errors: ErrorCollector) -> dict[str, Any]:
    for key in section:
        if key not in Datasets.model_fields:
            remedy = "write train, transfer, validation, or test with a name for each set"
            errors.add(("datasets", key), MISSING, "unknown split", remedy)
    splits: dict[str, Any] = {"test": _tests(section, task, errors)}
    for role in _SPLITS:
        if section.get(role) is None:
            continue
        splits[role] = _dataset(section, ("datasets", role), errors)
        for key in ("task", "out_of_domain") if splits[role] else ():
            if getattr(splits[role], key):
                value = getattr(splits[role], key)
                errors.add(("datasets", role, key), value, "it is for test sets only", "remove it")
    return splits


def _dataset(section: dict, path: tuple, errors: ErrorCollector) -> DatasetConfig | None:
    dataset = _checked(DatasetConfig, _mapping(section, path, errors), path, errors)
    if dataset is not None and not any(known[: len(path)] == path for known in errors.settled):
        for problem in source_problems(dataset):
            errors.add((*path, *problem.path), *problem[1:])
    return dataset


def _tests(section: dict, task: TaskConfig | None, errors: ErrorCollector) -> dict[str, DatasetConfig]:
    path = ("datasets", "test")
    sets = _mapping(section, path, errors)
    if not sets:
        remedy = "name at least one, e.g. `test: {in_domain: {path: json, data_files: test.jsonl}}`"
        errors.add(path, MISSING, "there is no test set", remedy)
    elif "path" in sets and not isinstance(sets["path"], dict):
        errors.add(path, MISSING, "test sets have names", "put these settings under a name, e.g. test: in_domain:")
        return {}
    tests = {}
    for name in sets:
        if not _FOLDER_NAME.fullmatch(name):
            remedy = "use letters, digits, '-' and '_', starting with a letter or digit"
            errors.add((*path, name), MISSING, "a test set's name is the name of a file", remedy)
        if name == "validation":
            what = "the report keeps the answers to the validation split under this name"
            errors.add((*path, name), MISSING, what, "choose another name")
        dataset = _dataset(sets, (*path, name), errors)
        if dataset is not None:
            tests[name] = dataset
            merged = dict(task) | dataset.task if task and dataset.task else {}
            _checked(TaskConfig, merged, (*path, name, "task"), errors)
    return tests


# --- rules between sections: each takes the checked parts, of which a broken one is None, and the values as written


def _model_rules(parts: dict, tree: dict) -> Iterator[Problem]:
    """The rules between settings of one training run, for the teacher and for every student; and their weights."""
    sft, distill, arms, cache = parts["sft"], parts["distill"], parts["arms"], parts["cache"]
    for key, what, remedy in _training_conflicts(sft):
        yield Problem(("sft", key), sft[key], what, remedy)
    for arm, own in arms.items():
        section = _arm_section(distill, own)
        found = list(_training_conflicts(section, packed=own.get("trainer") != "sft"))
        if own.get("trainer") != "sft":
            method = None if "recalibration_value" in section else parts["calibrate"] and parts["calibrate"].method
            found += loss_conflicts({"recalibration_method": method} | section)
        for key, what, remedy in found:
            path = ("arms", arm, key) if key in own else ("distill", key)
            yield Problem(path, section.get(key), what, remedy)
    teacher = cache.teacher if cache else None
    models: dict[tuple, dict] = {("sft",): sft, ("distill",): distill}
    models |= {("arms", arm): own for arm, own in arms.items()}
    named = {(*path, "model_name_or_path"): section.get("model_name_or_path") for path, section in models.items()}
    for path, model in {**named, ("cache", "teacher"): teacher}.items():
        if model is not None and (problem := _model_problem(model)):
            yield Problem(path, model, *problem)
    for role, needed, whose in (("sft", teacher is None, "teacher"), ("distill", bool(arms), "student")):
        if needed and models[(role,)].get("model_name_or_path") is None:
            path, remedy = (role, "model_name_or_path"), f"write the {whose}'s Hub id or folder"
            yield Problem(path, MISSING, f"there is no {whose}", remedy)


def _training_conflicts(section: dict, packed: bool = False) -> Iterator[tuple[str, str, str]]:
    """(key, what is wrong, the remedy) between the settings of one training run; packed: max_length has a meaning."""
    needs_peft = "write use_peft: true in this section, or remove it"
    if not section.get("use_peft"):
        ignored = [key for key in section if re.fullmatch(r"lora_.*|use_rslora|use_dora", key)]
        if ignored:
            also = f", and so would {', '.join(ignored[1:])}" if ignored[1:] else ""
            yield ignored[0], f"without use_peft it would be ignored{also}", needs_peft
        for key in ("load_in_4bit", "load_in_8bit"):
            if section.get(key):
                yield key, "quantised weights cannot be trained without an adapter", needs_peft
    for first, second in (("load_in_4bit", "load_in_8bit"), ("bf16", "fp16")):
        if section.get(first) and section.get(second):
            yield second, f"{first} is true as well", "keep one of the two"
    if section.get("max_length") is not None and not (packed and section.get("packing")):
        remedy = "write it as task.max_length (only distill has one, the length of a packed row, with packing: true)"
        yield "max_length", "task.max_length decides where a row ends, in every stage alike", remedy
    evaluated, saved = section.get("eval_strategy", "no"), section.get("save_strategy", "epoch")
    if section.get("load_best_model_at_end") and saved != "best" and evaluated != saved:
        what = f"eval_strategy is {evaluated} and save_strategy is {saved}"
        remedy = "give both the same value, so that the best model is among the saved ones"
        yield "load_best_model_at_end", what, remedy


def _seed_rules(parts: dict, tree: dict) -> Iterator[Problem]:
    trained = {("distill",): parts["distill"]} | {("arms", arm): own for arm, own in parts["arms"].items()}
    for path, section in trained.items() if tree.get("seeds") is not None else ():
        if "seed" in section:
            what = "the recipe has seeds for every student"
            yield Problem((*path, "seed"), section["seed"], what, "remove one of them")


def _support_rules(parts: dict, tree: dict) -> Iterator[Problem]:
    """Keeping the probabilities of the choices needs choices, and an answer that is all of the completion."""
    task, cache = parts["task"], parts["cache"]
    if task is None or cache is None or cache.support == "top_k":
        return
    if not task.choices:
        remedy = "list the closed answers as task.choices, or write support: top_k"
        yield Problem(("cache", "support"), cache.support, "the task has no choices", remedy)
    elif task.append_eos and task.completion is not None:
        what = "cache.support: choices keeps the choices' tokens, and the end of sequence is none of them"
        yield Problem(("task", "append_eos"), True, what, "write append_eos: false, or cache.support: top_k")
    for name, test in parts["datasets"].test.items():
        if test.task and "choices" in test.task and not test.task["choices"]:
            what = "cache.support: choices recalibrates among choices, and this set has none"
            remedy = "give it choices, or write cache.support: top_k"
            yield Problem(("datasets", "test", name, "task", "choices"), test.task["choices"], what, remedy)


def _push_rules(parts: dict, tree: dict) -> Iterator[Problem]:
    push, arms = parts["push"], parts["arms"]
    if "push" in tree and push and arms and push.arm not in arms:
        yield Problem(("push", "arm"), push.arm, "there is no such arm", f"choose one of {', '.join(arms)}")


def _data_rules(parts: dict, tree: dict) -> Iterator[Problem]:
    """Test rows must not overlap training or calibration rows, nor calibration rows what a model has learned."""
    data, written = parts["datasets"], tree.get("datasets")
    written = written if isinstance(written, dict) else {}
    if written.get("train") is None and (parts["arms"] or not (parts["cache"] and parts["cache"].teacher)):
        yield Problem(("datasets", "train"), MISSING, "it is missing", "write the split to train on")
    if written.get("validation") is None:
        remedy = "write the split that calibration is fitted on"
        yield Problem(("datasets", "validation"), MISSING, "it is missing", remedy)
    given = {role: getattr(data, role) for role in _SPLITS if getattr(data, role)}
    for role, other in (("validation", "train"), ("validation", "transfer"), ("transfer", "train")):
        if {role, other} <= set(given) and share_rows(given[role], _SPLITS[role], given[other], _SPLITS[other]):
            what = f"it reads the same rows as datasets.{other}, and a model is over-confident on what it learned"
            yield Problem(("datasets", role), MISSING, what, f"give rows of their own to {role}")
    for test_name, test in data.test.items():
        for name, dataset in given.items():
            if share_rows(test, "test", dataset, _SPLITS[name]):
                use = "calibration" if name == "validation" else "training"
                what = f"it reads the same rows as datasets.{name}: a test split used for {use}"
                remedy = "give rows of their own to the test set"
                yield Problem(("datasets", "test", test_name), MISSING, what, remedy)


# --- where models and rows come from, as far as that is known without loading them


def looks_local(path: str) -> bool:
    """Whether a path can only mean this machine, or does name something on it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or _exists(path)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that the file system cannot hold is not on it
        return False


_HOME = ("~ is not expanded in recipes", "write ${HOME} instead of ~")


def _model_problem(path: str) -> tuple[str, str] | None:
    """(what is wrong, the remedy) of a model's folder or Hub id."""
    if path.startswith("~"):
        return _HOME
    if not looks_local(path):
        known = "it is neither a folder nor the id of a model on the Hub", "write owner/name or a path"
        return None if HUB_ID.fullmatch(path) else known
    if not _exists(path):
        return "there is no such folder", "give an existing folder; it was looked up from the current directory"
    return None if Path(path).is_dir() else ("it is a file", "give the folder that holds the model")


def source_problems(dataset: DatasetConfig) -> Iterator[Problem]:
    """What is wrong with where a split comes from."""
    path, files = dataset.path, _listed_files(dataset)
    if path.startswith("~"):
        yield Problem(("path",), path, *_HOME)
    elif path in BUILDERS.values() and not files:
        yield Problem(("path",), path, "it reads files, and none is given", "write data_files: path/to/the/file")
    elif path in BUILDERS.values():
        yield from _file_problems(files, None)
    elif Path(path).suffix in BUILDERS and not Path(path).is_dir():
        if not _exists(path) and "://" not in path:
            remedy = "give an existing file, from the current directory"
            yield Problem(("path",), path, "there is no such file", remedy)
    elif looks_local(path) and not Path(path).is_dir():
        yield Problem(("path",), path, "there is no such folder", "give an existing folder, or a Hub id")
    elif looks_local(path):
        yield from _file_problems(files, Path(path))
    elif not HUB_ID.fullmatch(path):
        remedy = "write owner/name, a folder, a file, or json with data_files"
        yield Problem(("path",), path, "it is neither a folder nor the id of a dataset on the Hub", remedy)


def _listed_files(dataset: DatasetConfig) -> list[str]:
    files = dataset.data_files
    return [] if files is None else [files] if isinstance(files, str) else list(files)


def _file_problems(files: list[str], folder: Path | None) -> Iterator[Problem]:
    where = f"from the folder {folder}" if folder else "from the current directory"
    for file in (file for file in files if "://" not in file):
        if file.startswith("~"):
            yield Problem(("data_files",), file, *_HOME)
        elif _looks_through_too_much(str(folder / file) if folder else file):
            what = f"the pattern looks through more than {_MAX_LISTED:,} files and folders"
            yield Problem(("data_files",), file, what, "name the folder that holds the data")
        elif not _local_files(file, folder):
            yield Problem(("data_files",), file, "there is no such file", f"give an existing file, {where}")


def _looks_through_too_much(pattern: str) -> bool:
    """Whether a `**` starts so high that listing its files takes minutes."""
    if "**" not in pattern:
        return False
    listed, (start, slash, _) = 0, re.split(r"[*?\[]", pattern)[0].rpartition("/")
    for _, folders, files in os.walk(start or slash or "."):
        listed += len(folders) + len(files)
        if listed > _MAX_LISTED:
            return True
    return False


def _local_files(file: str, folder: Path | None = None) -> set[str]:
    """Real paths of the files that a name or a pattern stands for."""
    pattern = str(folder / file) if folder else file
    if glob.has_magic(pattern):
        found = [] if _looks_through_too_much(pattern) else glob.glob(pattern, recursive=True)
    else:
        found = [pattern] * _exists(pattern)
    return {str(Path(name).resolve()) for name in found if Path(name).is_file()}


def share_rows(first: DatasetConfig, first_role: str, second: DatasetConfig, second_role: str) -> bool:
    """Whether two splits read the same rows, as far as their settings tell; `max_rows` is not looked at.

    Args:
        first_role, second_role: `train`, `validation` or `test`, the split that is read where none is named.
    """
    files = [_file_identities(dataset) for dataset in (first, second)]
    roles = ["train", "train"] if all(files) else [first_role, second_role]
    if not _splits_overlap(first.split or roles[0], second.split or roles[1]):
        return False
    if all(files):
        return bool(files[0] & files[1])
    return not any(files) and _identity(first) == _identity(second)


def _identity(dataset: DatasetConfig) -> tuple:
    path = str(Path(dataset.path).resolve()) if looks_local(dataset.path) else dataset.path
    return path, dataset.name, dataset.revision or "main"


def _file_identities(dataset: DatasetConfig) -> set:
    """What tells a split's files apart from another's; empty where it is not made of listed files."""
    path, files = dataset.path, _listed_files(dataset)
    if not files and Path(path).suffix in BUILDERS and not Path(path).is_dir():
        path, files = "json", [path]
    folder = Path(path) if path not in BUILDERS.values() and looks_local(path) else None
    if path not in BUILDERS.values() and folder is None:
        return {(*_identity(dataset), file) for file in files}
    return {name for file in files for name in (_local_files(file, folder) or {file})}


# name, or name[start:stop] in rows or in percent
_SLICE = re.compile(r"([^\[\]]+)(?:\[(\d*)(%?):(\d*)(%?)\])?")


def _splits_overlap(first: str, second: str) -> bool:
    """Whether `train[:90%]` and `train[80%:]` share rows. Slices in different units cannot be told and pass."""
    for part, other in ((a.strip(), b.strip()) for a in first.split("+") for b in second.split("+")):
        matches = _SLICE.fullmatch(part), _SLICE.fullmatch(other)
        if matches[0] is None or matches[1] is None:
            if part == other:
                return True
            continue
        spans = [_span(match) for match in matches if match]
        (start, stop, unit), (start_2, stop_2, unit_2) = spans
        same_unit = not unit or not unit_2 or unit == unit_2
        if matches[0][1] == matches[1][1] and same_unit and start < stop_2 and start_2 < stop:
            return True
    return False


def _span(match: re.Match) -> tuple[float, float, str]:
    """(start, stop, unit) of a slice; the unit is empty for one that covers everything."""
    _, start, start_unit, stop, stop_unit = match.groups()
    unit = "%" if start_unit or stop_unit else "rows" if start or stop else ""
    return int(start or 0), int(stop) if stop else float("inf"), unit

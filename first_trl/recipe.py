"""One YAML file is one experiment: this module turns it into a checked [`Recipe`], or says all that is wrong with it.

Everything is checked before anything heavy is imported: keys, types, files, and what one section asks of another. The
sections `sft` and `distill` (and the arms, which override `distill`) stay plain dicts of checked settings of TRL's
SFTConfig and ModelConfig and of FIRSTConfig; only what was written is in them, so that the stages choose the defaults.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config import CacheConfig, CalibrateConfig, DatasetConfig, EvaluateConfig, PushConfig, TaskConfig
from .field_tables import FieldSpec, known_fields
from .field_types import MisfitError, Settings, SettingsError, fit_value, union_members
from .recipe_file import MISSING, Findings, RecipeError, is_secret, read_override, read_recipe_file
from .recipe_rules import (
    LIMITS,
    NOT_YOURS,
    broken_dataset_rules,
    broken_model_path,
    broken_training_rules,
    share_rows,
)

__all__ = ["STAGES", "Datasets", "Recipe", "RecipeError", "load_recipe"]

STAGES = ("sft", "cache", "calibrate", "distill", "evaluate", "push")
TRAINERS = ("first", "sft")
DEFAULT_ARMS = {"fine_tuned": {"trainer": "sft"}, "distilled": {"recalibration_method": "none"}, "first": {}}
# Columns of the report that are no trained student.
REPORT_ARMS = ("teacher", "teacher_recalibrated", "base", "fine_tuned_post_hoc")

_TOP = {"name": "str", "output_dir": "str", "seed": "int"}
_SETTINGS = {
    "task": TaskConfig,
    "cache": CacheConfig,
    "calibrate": CalibrateConfig,
    "evaluate": EvaluateConfig,
    "push": PushConfig,
}
_TRAINING = {"sft": "SFTConfig", "distill": "FIRSTConfig"}
_SECTIONS = (*_TOP, "task", "datasets", "sft", "cache", "calibrate", "distill", "arms", "evaluate", "push")
_RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)
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


@dataclass
class Datasets:
    """The splits of a recipe: one to learn from, one to choose on, and named ones that are only reported."""

    train: DatasetConfig | None
    validation: DatasetConfig
    test: dict[str, DatasetConfig]


@dataclass
class Recipe:
    """A checked recipe. `sft`, `distill` and `arms` hold the settings as written; stages fill in the rest."""

    name: str
    task: TaskConfig
    datasets: Datasets
    output_dir: str = "runs"
    seed: int = 0
    sft: dict = field(default_factory=dict)
    cache: CacheConfig = field(default_factory=CacheConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    distill: dict = field(default_factory=dict)
    arms: dict[str, dict] = field(default_factory=lambda: {arm: dict(keys) for arm, keys in DEFAULT_ARMS.items()})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    push: PushConfig = field(default_factory=PushConfig)

    @property
    def run_folder(self) -> Path:
        """Where every stage reads and writes; relative to the current directory unless output_dir is absolute."""
        return Path(self.output_dir) / self.name

    def arm_trainer(self, arm: str) -> str:
        """`first` (knowledge matching) or `sft` (the control, trained on labels)."""
        return self._arm(arm).get("trainer", "first")

    def arm_section(self, arm: str) -> dict:
        """The settings of one student: `distill` with the arm's own on top, for FIRSTConfig and ModelConfig.

        For an arm with `trainer: sft` the settings that only FIRSTConfig knows are left out.
        """
        section = self.distill | {key: value for key, value in self._arm(arm).items() if key != "trainer"}
        if self.arm_trainer(arm) == "sft":
            section = {key: value for key, value in section.items() if key not in _first_only()}
        return section

    def _arm(self, arm: str) -> dict:
        if arm not in self.arms:
            raise ValueError(f"There is no arm {arm!r} in this recipe; its arms are {', '.join(self.arms) or 'none'}.")
        return self.arms[arm]

    def task_for(self, test: str) -> TaskConfig:
        """The task of one test set: the recipe's, with the set's own overrides."""
        return dataclasses.replace(self.task, **(self.datasets.test[test].task or {}))

    def to_dict(self) -> dict:
        """Plain values that [`load_recipe`] reads back to an equal recipe; variables and overrides are resolved."""
        plain = dataclasses.asdict(self)
        plain["datasets"] = {key: value for key, value in plain["datasets"].items() if value is not None}
        return {
            key: _without_none(plain[key]) if key not in ("sft", "distill", "arms") else plain[key] for key in plain
        }

    def write_resolved(self, path: str | Path) -> None:
        """Write the recipe as it runs, defaults included, as YAML."""
        text = yaml.safe_dump(_escaped(self.to_dict()), sort_keys=False, allow_unicode=True, width=100)
        Path(path).write_text(text, encoding="utf-8")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _escaped(value: Any) -> Any:
    """The value with every `${` written so that reading gives it back."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _first_only() -> set[str]:
    return set(known_fields("FIRSTConfig")) - set(known_fields("SFTConfig"))


def load_recipe(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Read a recipe file, apply command-line overrides, and check everything.

    Args:
        path: the YAML file. `${NAME}` and `${NAME:-default}` in its texts are read from the environment; `$${` is a
            literal `${`. Relative paths in it start at the current directory.
        overrides: `--key value`, `--key=value`, `--section.key value`. A key without a section belongs to the top of
            the recipe (name, output_dir, seed), else to the section of `stage`, else to the only section that knows it.
        stage: the stage being run, one of [`STAGES`]; None for all of them.

    Raises:
        RecipeError: with every problem of the recipe: file, line, section, key, value, remedy.
    """
    assert stage is None or stage in STAGES, stage
    findings = Findings(str(path))
    tree = read_recipe_file(path, findings)
    tree.setdefault("arms", {arm: dict(keys) for arm, keys in DEFAULT_ARMS.items()})
    for key, value in _split_overrides(overrides, findings):
        _apply_override(tree, key, value, stage, findings)
    _refuse_secrets(tree, (), findings)
    recipe = _build(tree, findings)
    findings.raise_if_any()
    return recipe


# --- overrides ---------------------------------------------------------------------------------------------------


def _split_overrides(words: Sequence[str], findings: Findings) -> list[tuple[str, str | list[str]]]:
    """`--a 1 --b=2 --c x y --d` -> [("a", "1"), ("b", "2"), ("c", ["x", "y"]), ("d", "true")]."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            pairs.append((key, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            findings.add((), MISSING, f"the argument {word!r} belongs to no setting", "write --key value")
    return [(key, "true" if not values else values[0] if len(values) == 1 else values) for key, values in pairs]


def _apply_override(tree: dict, key: str, value: str | list[str], stage: str | None, findings: Findings) -> None:
    path = _override_path(key, stage, findings)
    if path is None:
        return
    findings.overridden.add(path)
    place = tree
    for i, part in enumerate(path[:-1]):
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            findings.add(path[: i + 1], place, f"--{key} needs a mapping here", "correct the recipe or the override")
            return
    annotation = _annotation_at(path)
    as_text = annotation is not None and not set(union_members(annotation)) - {"str", "None"}
    if isinstance(value, list):
        place[path[-1]] = [read_override(item) for item in value]
    elif as_text and not (value == "null" and "None" in annotation):
        place[path[-1]] = value  # the shell has eaten any quotes: 123 and yes are meant as text here
    else:
        place[path[-1]] = read_override(value)


def _override_path(key: str, stage: str | None, findings: Findings) -> tuple | None:
    if "." in key:
        return tuple(key.split("."))
    if key in _TOP:
        return (key,)
    owners = [section for section in _known_keys() if key in _known_keys()[section]]
    if stage in owners:
        return (stage, key)
    if len(owners) == 1:
        return (owners[0], key)
    if owners:
        candidates = " or ".join(f"--{owner}.{key}" for owner in owners)
        findings.add((), MISSING, f"--{key} is a setting of several sections", f"write {candidates}")
    else:
        everything = sorted(set(_TOP).union(*_known_keys().values()))
        findings.add((), MISSING, f"--{key} is unknown", _nearest(key, everything, "write --section.key value"))
    return None


def _known_keys() -> dict[str, set[str]]:
    """Section -> the keys it knows."""
    known = {section: {f.name for f in dataclasses.fields(cls)} for section, cls in _SETTINGS.items()}
    for section in _TRAINING:
        known[section] = set(_training_fields(section)) - set(NOT_YOURS) - {"hub_token"}
    return known


def _training_fields(section: str) -> dict[str, FieldSpec]:
    return known_fields(_TRAINING[section]) | known_fields("ModelConfig")


def _annotation_at(path: tuple) -> str | None:
    """The type of the setting at a path, where the path leads to one."""
    section, key = path[0], path[-1]
    if len(path) == 1:
        return _TOP.get(section)
    if section in _SETTINGS and len(path) == 2:
        return {f.name: f.type for f in dataclasses.fields(_SETTINGS[section])}.get(key)
    if section == "datasets":
        cls = TaskConfig if path[-2] == "task" else DatasetConfig
        return {f.name: f.type for f in dataclasses.fields(cls)}.get(key)
    if section in _TRAINING or (section == "arms" and len(path) == 3):
        spec = _training_fields("sft" if section == "sft" else "distill").get(key)
        return "str" if spec and spec.choices else spec and spec.annotation
    return None


# --- sections ----------------------------------------------------------------------------------------------------


def _build(tree: dict, findings: Findings) -> Recipe | None:
    """The recipe, or None with the reasons in `findings`."""
    for key in tree:
        if key not in _SECTIONS:
            findings.add((key,), MISSING, "unknown section", _where_else(key, list(_SECTIONS)))
    top = {key: _top_value(tree, key, findings) for key in _TOP if key in tree}
    if "name" not in tree:
        findings.add(("name",), MISSING, "it is missing", "write e.g. `name: my-run`; the run's folder is called so")
    settings = {
        section: _settings(cls, _mapping(tree, (section,), findings), (section,), findings)
        for section, cls in _SETTINGS.items()
    }
    arms = _arms(tree, findings)
    sft = _training(_mapping(tree, ("sft",), findings), ("sft",), findings)
    distill = _training(_mapping(tree, ("distill",), findings), ("distill",), findings)
    datasets = _datasets(_mapping(tree, ("datasets",), findings), settings["task"], findings)
    _check_models(sft, distill, arms, settings["cache"], findings)
    if "push" in tree and settings["push"] and arms and settings["push"].arm not in arms:
        remedy = f"choose one of {', '.join(arms)}"
        findings.add(("push", "arm"), settings["push"].arm, "there is no such arm", remedy)
    needs_train = arms or (settings["cache"] and settings["cache"].teacher is None)
    if datasets and datasets.train is None and needs_train:
        findings.add(("datasets", "train"), MISSING, "it is missing", "write the split to train on")
    if None in settings.values() or datasets is None or "name" not in top:
        return None
    return Recipe(**top, **settings, datasets=datasets, sft=sft, distill=distill, arms=arms)


def _top_value(tree: dict, key: str, findings: Findings) -> Any:
    value = tree[key]
    try:
        value = fit_value(value, _TOP[key], **({"minimum": 0} if key == "seed" else {}))
    except MisfitError as misfit:
        findings.add((key,), value, misfit.problem, misfit.remedy)
        return value
    if key == "name" and (not _RUN_NAME.fullmatch(value) or ".." in value):
        remedy = "use letters, digits, '-', '_' and '.', starting with a letter or digit"
        findings.add((key,), value, "it is not the name of a folder in output_dir", remedy)
    if key == "output_dir" and not value.strip():
        findings.add((key,), value, "it is empty", "write a folder, or remove the line for `runs`")
    return value


def _mapping(tree: dict, path: tuple, findings: Findings) -> dict:
    """The mapping at the end of a path; an absent or empty one is {}."""
    value = tree.get(path[-1])
    if isinstance(value, dict):
        return value
    if value is not None:
        findings.add(path, value, "it needs a mapping", "write its settings on the lines below, indented")
    return {}


def _settings(cls: type[Settings], section: dict, path: tuple, findings: Findings) -> Any:
    """An object of one of our dataclasses, or None with the reasons in `findings`."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in known:
            findings.add((*path, key), section[key], "unknown key", _where_else(key, list(known)))
    missing = [key for key, f in known.items() if f.default is dataclasses.MISSING and key not in section]
    for key in missing:
        findings.add((*path, key), MISSING, "it is missing", known[key].metadata["help"].rstrip("."))
    given = {key: value for key, value in section.items() if key in known}
    try:
        return cls(**given) if not missing else None
    except SettingsError as error:
        for problem in error.problems:
            findings.add((*path, *problem.key.split(".")), problem.value, problem.problem, problem.remedy)
        return None


def _training(section: dict, path: tuple, findings: Findings, trainer: str = "first") -> dict:
    """The checked settings of `sft`, `distill` or an arm, with each value as its field wants it."""
    specs = _training_fields("sft" if path[0] == "sft" else "distill")
    checked = {}
    for key, value in section.items():
        if key in NOT_YOURS:
            findings.add((*path, key), value, *NOT_YOURS[key])
        elif is_secret((key,), value):
            continue  # reported for the whole recipe at once
        elif key not in specs:
            findings.add((*path, key), value, "unknown key", _where_else(key, list(specs)))
        elif trainer == "sft" and key in _first_only():
            remedy = "remove it, or write trainer: first"
            findings.add((*path, key), value, "an arm with trainer: sft does not know it", remedy)
        else:
            try:
                limits = {"choices": specs[key].choices} | LIMITS.get(key, {})
                checked[key] = fit_value(value, specs[key].annotation, **limits)
            except MisfitError as misfit:
                findings.add((*path, key), value, misfit.problem, misfit.remedy)
    return checked


def _arms(tree: dict, findings: Findings) -> dict[str, dict]:
    arms = {}
    for arm, overrides in _mapping(tree, ("arms",), findings).items():
        path = ("arms", arm)
        if not _FOLDER_NAME.fullmatch(arm):
            remedy = "use letters, digits, '-' and '_', starting with a letter or digit"
            findings.add(path, MISSING, "an arm's name is the name of a folder", remedy)
        if arm in REPORT_ARMS:
            findings.add(path, MISSING, "the report has a column of its own with this name", "choose another name")
        section = _mapping(tree["arms"], path, findings)
        trainer = section.get("trainer", "first")
        if trainer not in TRAINERS:
            what, remedy = (
                f"it is not one of {', '.join(TRAINERS)}",
                "choose first (knowledge matching) or sft (labels)",
            )
            findings.add((*path, "trainer"), trainer, what, remedy)
            trainer = "first"
        settings = {key: value for key, value in section.items() if key != "trainer"}
        arms[arm] = ({"trainer": trainer} if "trainer" in section else {}) | _training(
            settings, path, findings, trainer
        )
    return arms


def _check_models(sft: dict, distill: dict, arms: dict, cache: CacheConfig | None, findings: Findings) -> None:
    """The rules between settings of one training run, for the teacher and for every student."""
    for problem in broken_training_rules(sft, trainer="sft"):
        findings.add(("sft", problem.key), problem.value, problem.problem, problem.remedy)
    for arm, overrides in arms.items():
        merged = distill | overrides
        for problem in broken_training_rules(merged, overrides.get("trainer", "first")):
            path = ("arms", arm, problem.key) if problem.key in overrides else ("distill", problem.key)
            findings.add(path, problem.value, problem.problem, problem.remedy)
    teacher = cache.teacher if cache else None
    models = [(("sft", "model_name_or_path"), sft.get("model_name_or_path"), teacher is None)]
    students = [(("distill", "model_name_or_path"), distill.get("model_name_or_path"), bool(arms))]
    own = [(("arms", arm, "model_name_or_path"), keys["model_name_or_path"], False) for arm, keys in arms.items()
           if keys.get("model_name_or_path") is not None]  # fmt: skip
    if len(own) == len(arms):
        students = []
    for path, model, needed in [*models, (("cache", "teacher"), teacher, False), *students, *own]:
        if model is None and needed and path not in findings.unreadable:
            whose = "teacher" if path[0] == "sft" else "student"
            findings.add(path, MISSING, f"there is no {whose}", f"write the {whose}'s Hub id or folder")
        for what, remedy in broken_model_path(model) if model is not None else []:
            findings.add(path, model, what, remedy)


# --- datasets ----------------------------------------------------------------------------------------------------


def _datasets(section: dict, task: TaskConfig | None, findings: Findings) -> Datasets | None:
    for key in section:
        if key not in ("train", "validation", "test"):
            remedy = "write train, validation, or test with a name for each set"
            findings.add(("datasets", key), MISSING, "unknown split", remedy)
    train = _dataset(section, ("datasets", "train"), findings) if section.get("train") is not None else None
    validation = None
    if section.get("validation") is None:
        findings.add(
            ("datasets", "validation"), MISSING, "it is missing", "write the split that calibration is fitted on"
        )
    else:
        validation = _dataset(section, ("datasets", "validation"), findings)
    tests = _tests(section, task, findings)
    _refuse_shared_rows(train, validation, tests, findings)
    return Datasets(train, validation, tests) if validation else None


def _dataset(section: dict, path: tuple, findings: Findings) -> DatasetConfig | None:
    dataset = _settings(DatasetConfig, _mapping(section, path, findings), path, findings)
    if dataset is None:
        return None
    for problem in broken_dataset_rules(dataset):
        value = MISSING if problem.value is None else problem.value
        findings.add((*path, problem.key), value, problem.problem, problem.remedy)
    if len(path) == 2:
        for key in ("task", "out_of_domain"):
            if getattr(dataset, key):
                findings.add((*path, key), getattr(dataset, key), "it is for test sets only", "remove it")
    return dataset


def _tests(section: dict, task: TaskConfig | None, findings: Findings) -> dict[str, DatasetConfig]:
    path = ("datasets", "test")
    sets = _mapping(section, path, findings)
    if not sets:
        remedy = "name at least one, e.g. `test: {in_domain: {path: json, data_files: test.jsonl}}`"
        findings.add(path, MISSING, "there is no test set", remedy)
    elif "path" in sets and not isinstance(sets["path"], dict):
        findings.add(path, MISSING, "test sets have names", "put these settings under a name, e.g. test: in_domain:")
        return {}
    tests = {}
    for name in sets:
        if not _FOLDER_NAME.fullmatch(name):
            remedy = "use letters, digits, '-' and '_', starting with a letter or digit"
            findings.add((*path, name), MISSING, "a test set's name is the name of a file", remedy)
        dataset = _dataset(sets, (*path, name), findings)
        if dataset is not None:
            tests[name] = dataset
            merged = dataclasses.asdict(task) | dataset.task if task and dataset.task else {}
            _settings(TaskConfig, merged, (*path, name, "task"), findings)
    return tests


def _refuse_shared_rows(train, validation, tests: dict[str, DatasetConfig], findings: Findings) -> None:
    """A number is only honest on rows that nothing was fitted on."""
    if train and validation and share_rows(train, validation):
        what = "it reads the same rows as datasets.train, and a teacher is over-confident on what it was trained on"
        findings.add(("datasets", "validation"), MISSING, what, "give rows of their own to validation")
    for name, test in tests.items():
        for split, dataset, use in (("train", train, "training"), ("validation", validation, "calibration")):
            if dataset and share_rows(test, dataset):
                what = f"it reads the same rows as datasets.{split}: a test split used for {use}"
                findings.add(("datasets", "test", name), MISSING, what, "give rows of their own to the test set")


# --- remedies and secrets ----------------------------------------------------------------------------------------


def _where_else(key: str, known: list[str]) -> str:
    """The remedy for an unknown key: another section that knows it, or the nearest name here."""
    alias = _ALIASES.get(key, key)
    if alias in known:
        return f"did you mean {alias}?"
    owners = [section for section, keys in _known_keys().items() if alias in keys]
    if owners:
        return "it belongs in " + " or ".join(f"{owner}.{alias}" for owner in owners)
    if alias in _TOP:
        return f"it belongs at the top of the recipe, as {alias}"
    return _nearest(key, known, "remove it")


def _nearest(key: str, known: list[str], otherwise: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else otherwise


def _refuse_secrets(value: Any, path: tuple, findings: Findings) -> None:
    """Recipes are written to disk and published with the model: no credential may be in one."""
    if is_secret(path, value):
        findings.add(
            path, value, "it looks like a credential, and recipes are published", "run `hf auth login` instead"
        )
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_secrets(item, (*path, key), findings)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_secrets(item, (*path, i), findings)

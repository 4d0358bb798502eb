"""One YAML file is one experiment: this module turns it into a checked [`Recipe`], or says all that is wrong with it.

Everything is checked before anything heavy is imported: keys, types, files, and what one section asks of another. The
sections `sft` and `distill` (and the arms, which override `distill`) stay plain dicts of checked settings of TRL's
SFTConfig and ModelConfig and of FIRSTConfig; only what was written is in them, so that the stages choose the defaults.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import CacheConfig, CalibrateConfig, DatasetConfig, Datasets, EvaluateConfig, PushConfig, TaskConfig
from ..field_types import union_members
from .file import Findings, RecipeError, read_override, read_recipe_file
from .keys import SETTINGS, TOP, TRAINING, first_only_keys, known_keys, training_fields, where_else
from .sections import check_recipe, refuse_secrets

__all__ = ["STAGES", "Recipe", "RecipeError", "load_recipe"]

STAGES = ("sft", "cache", "calibrate", "distill", "evaluate", "push")
DEFAULT_ARMS = {"fine_tuned": {"trainer": "sft"}, "distilled": {"recalibration_method": "none"}, "first": {}}


def arm_of(student: str) -> str:
    """`first/seed-1` -> `first`; an arm's own name stays as it is."""
    return student.partition("/")[0]


@dataclass
class Recipe:
    """A checked recipe. `sft`, `distill` and `arms` hold the settings as written; stages fill in the rest."""

    name: str
    task: TaskConfig
    datasets: Datasets
    output_dir: str = "runs"
    seed: int = 0
    seeds: list[int] | None = None
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

    @property
    def students(self) -> list[str]:
        """The students' folders below `students/`: one per arm, or `<arm>/seed-<n>` where there are several seeds.

        A student's name stands wherever an arm's can.
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
        section = self.distill | {key: value for key, value in self._arm(arm).items() if key != "trainer"}
        if self.arm_trainer(arm) == "sft":
            section = {key: value for key, value in section.items() if key not in first_only_keys()}
        return section

    def _arm(self, arm: str) -> dict:
        arm = arm_of(arm)
        if arm not in self.arms:
            raise ValueError(f"There is no arm {arm!r} in this recipe; its arms are {', '.join(self.arms) or 'none'}.")
        return self.arms[arm]

    def to_dict(self) -> dict:
        """Plain values that [`load_recipe`] reads back to an equal recipe; variables and overrides are resolved."""
        return _plain(self)

    def write_resolved(self, path: str | Path) -> None:
        """Write the recipe as it runs, defaults included, as YAML."""
        text = yaml.safe_dump(_escaped(self.to_dict()), sort_keys=False, allow_unicode=True, width=100)
        Path(path).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Dataclasses as mappings, without the settings that are None; what the user wrote in a mapping stays as it is."""
    if dataclasses.is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {key: _plain(item) for key, item in items.items() if item is not None}
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
            literal `${`. Relative paths in it start at the current directory.
        overrides: `--key value`, `--key=value`, `--section.key value`. A key without a section belongs to the top of
            the recipe (name, output_dir, seed), else to the section of `stage`, else to the only one that knows it.
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
    refuse_secrets(tree, (), findings)
    parts = check_recipe(tree, findings)
    findings.raise_if_any()
    return Recipe(**parts)


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
            findings.add_override(f"the argument {word!r} belongs to no setting", "write --key value")
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
    annotation = _annotation_at(path) or "Any"
    as_text = not set(union_members(annotation)) - {"str", "None"}
    if isinstance(value, list):
        place[path[-1]] = [read_override(item) for item in value]
    elif as_text and not (value == "null" and "None" in annotation):
        place[path[-1]] = value  # the shell has eaten any quotes: 123 and yes are meant as text here
    else:
        place[path[-1]] = read_override(value)


def _override_path(key: str, stage: str | None, findings: Findings) -> tuple | None:
    if "." in key:
        return tuple(key.split("."))
    if key in TOP:
        return (key,)
    owners = [section for section in known_keys() if key in known_keys()[section]]
    if stage in owners:
        return (stage, key)
    if len(owners) == 1:
        return (owners[0], key)
    if owners:
        candidates = " or ".join(f"--{owner}.{key}" for owner in owners)
        findings.add_override(f"--{key} is a setting of several sections", f"write {candidates}")
    else:
        findings.add_override(f"--{key} is unknown", where_else(key, [*TOP]))
    return None


def _annotation_at(path: tuple) -> str | None:
    """The type of the setting at a path, where the path leads to one."""
    section, key = path[0], path[-1]
    if len(path) == 1:
        return TOP.get(section)
    if section in SETTINGS and len(path) == 2:
        return annotations_of(SETTINGS[section]).get(key)
    if section == "datasets":
        cls = TaskConfig if path[-2] == "task" else DatasetConfig
        return annotations_of(cls).get(key)
    if section in TRAINING or (section == "arms" and len(path) == 3):
        spec = training_fields("sft" if section == "sft" else "distill").get(key)
        return None if spec is None else "str" if spec.choices else spec.annotation
    return None


def annotations_of(cls: type) -> dict[str, str]:
    """Setting -> its type as written: `config` postpones the evaluation of annotations."""
    return {f.name: str(f.type) for f in dataclasses.fields(cls)}

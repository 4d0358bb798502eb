"""From the plain values of a recipe to its checked parts, with every problem recorded and none raised.

One function per kind of section. What a single setting accepts is in its dataclass, what settings ask of each other in
`first_trl.recipe.rules` and `first_trl.recipe.dataset_rules`; here they are applied, and each problem gets its place.
"""

import dataclasses
import re
from typing import Any

from ..config import CacheConfig, CalibrateConfig, DatasetConfig, Datasets, TaskConfig
from ..field_types import MisfitError, SettingsError, fit_value
from .dataset_rules import broken_source, share_rows
from .file import MISSING, Findings, is_secret
from .keys import SECTIONS, SETTINGS, TOP, first_only_keys, training_fields, where_else
from .rules import LIMITS, NOT_YOURS, broken_model_path, broken_training_rules

TRAINERS = ("first", "sft")
# Columns of the report that are no trained student.
REPORT_ARMS = ("teacher", "teacher_recalibrated", "base", "fine_tuned_post_hoc", "distilled_post_hoc")

_RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)


def check_recipe(tree: dict, findings: Findings) -> dict[str, Any]:
    """The arguments of [`first_trl.recipe.loading.Recipe`]; complete only where `findings` stays empty."""
    for key in tree:
        if key not in SECTIONS:
            findings.add((key,), MISSING, "unknown section", where_else(key, list(SECTIONS)))
    top = {key: _top_value(tree, key, findings) for key in TOP if key in tree}
    if "name" not in tree:
        findings.add(("name",), MISSING, "it is missing", "write e.g. `name: my-run`; the run's folder is called so")
    settings = {
        section: _settings(cls, _mapping(tree, (section,), findings), (section,), findings)
        for section, cls in SETTINGS.items()
    }
    arms = _arms(tree, findings)
    sft = _training(_mapping(tree, ("sft",), findings), ("sft",), findings)
    distill = _training(_mapping(tree, ("distill",), findings), ("distill",), findings)
    datasets = _datasets(_mapping(tree, ("datasets",), findings), settings["task"], findings)
    _check_models(sft, distill, arms, settings["cache"], findings)
    trained: dict[tuple, dict] = {("distill",): distill}
    trained |= {("arms", arm): own for arm, own in arms.items()}
    for path, section in trained.items():
        if tree.get("seeds") is not None and "seed" in section:
            findings.add(
                (*path, "seed"), section["seed"], "the recipe has seeds for every student", "remove one of them"
            )
    _check_divergence(settings["calibrate"], distill, arms, findings)
    _check_support(settings["task"], settings["cache"], datasets, findings)
    if "push" in tree and settings["push"] and arms and settings["push"].arm not in arms:
        remedy = f"choose one of {', '.join(arms)}"
        findings.add(("push", "arm"), settings["push"].arm, "there is no such arm", remedy)
    given_teacher = settings["cache"] and settings["cache"].teacher
    if _mapping(tree, ("datasets",), Findings("")).get("train") is None and (arms or not given_teacher):
        findings.add(("datasets", "train"), MISSING, "it is missing", "write the split to train on")
    return {**top, **settings, "datasets": datasets, "sft": sft, "distill": distill, "arms": arms}


def _top_value(tree: dict, key: str, findings: Findings) -> Any:
    value = tree[key]
    try:
        value = fit_value(value, TOP[key], minimum=0 if key == "seed" else None)
    except MisfitError as misfit:
        findings.add((key,), value, misfit.problem, misfit.remedy)
        return value
    if key == "seeds" and value is not None and (not value or len(set(value)) < len(value) or min(value) < 0):
        findings.add((key,), value, "these are not seeds", "list different whole numbers from 0 on, e.g. [0, 1, 2]")
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


def _settings(cls: Any, section: dict, path: tuple, findings: Findings) -> Any:
    """An object of one of our dataclasses, or None with the reasons in `findings`."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in known:
            findings.add((*path, key), section[key], "unknown key", where_else(key, list(known)))
    missing = [key for key, f in known.items() if f.default is dataclasses.MISSING and key not in section]
    for key in missing:
        remedy = f"write it: {known[key].metadata['help'].rstrip('.')}"
        findings.add((*path, key), MISSING, "it is missing", remedy)
    given = {key: value for key, value in section.items() if key in known}
    try:
        return cls(**given) if not missing else None
    except SettingsError as error:
        for problem in error.problems:
            findings.add((*path, *problem.key.split(".")), problem.value, problem.problem, problem.remedy)
        return None


def _training(section: dict, path: tuple, findings: Findings, trainer: str = "first") -> dict:
    """The checked settings of `sft`, `distill` or an arm, with each value as its field wants it."""
    specs = training_fields("sft" if path[0] == "sft" else "distill")
    checked = {}
    for key, value in section.items():
        if key in NOT_YOURS:
            findings.add((*path, key), value, *NOT_YOURS[key])
        elif is_secret((key,), value):
            continue  # reported for the whole recipe at once
        elif key not in specs:
            findings.add((*path, key), value, "unknown key", where_else(key, list(specs)))
        elif trainer == "sft" and key in first_only_keys():
            remedy = "remove it, or write trainer: first"
            findings.add((*path, key), value, "an arm with trainer: sft does not know it", remedy)
        else:
            try:
                limits = {"choices": specs[key].choices} | LIMITS.get(key, {})
                checked[key] = fit_value(value, specs[key].annotation, **limits)
            except MisfitError as misfit:
                findings.add((*path, key), value, misfit.problem, misfit.remedy)
                if specs[key].annotation.startswith("bool"):
                    checked[key] = value  # `use_peft: "true"` is one mistake, not a missing use_peft as well
    return checked


def _arms(tree: dict, findings: Findings) -> dict[str, dict]:
    arms = {}
    for arm in _mapping(tree, ("arms",), findings):
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
    """The rules between settings of one training run, for the teacher and for every student; and their weights."""
    for problem in broken_training_rules(sft, trainer="sft"):
        findings.add(("sft", problem.key), problem.value, problem.problem, problem.remedy)
    for arm, overrides in arms.items():
        for problem in broken_training_rules(distill | overrides, overrides.get("trainer", "first")):
            path = ("arms", arm, problem.key) if problem.key in overrides else ("distill", problem.key)
            findings.add(path, problem.value, problem.problem, problem.remedy)
    teacher = cache.teacher if cache else None
    models: dict[tuple, dict] = {("sft", "model_name_or_path"): sft, ("distill", "model_name_or_path"): distill}
    models |= {("arms", arm, "model_name_or_path"): overrides for arm, overrides in arms.items()}
    named = {path: section["model_name_or_path"] for path, section in models.items() if path[-1] in section}
    for path, model in {**named, ("cache", "teacher"): teacher}.items():
        for what, remedy in broken_model_path(model) if model is not None else []:
            findings.add(path, model, what, remedy)
    for path, needed, whose in (
        (("sft", "model_name_or_path"), teacher is None, "teacher"),
        (("distill", "model_name_or_path"), bool(arms), "student"),
    ):
        if needed and models[path].get("model_name_or_path") is None:
            findings.add(path, MISSING, f"there is no {whose}", f"write the {whose}'s Hub id or folder")


def _check_divergence(calibrate: CalibrateConfig | None, distill: dict, arms: dict, findings: Findings) -> None:
    """A reverse divergence from a teacher without a tail is infinite."""
    for arm, own in arms.items():
        section = distill | own
        method = section.get("recalibration_method", calibrate.method if calibrate else None)
        losses = section.get("divergence", "forward_kl"), section.get("tail", "bucket")
        if own.get("trainer") != "sft" and (*losses, method) == ("reverse_kl", "bucket", "probability"):
            what = "the recalibration `probability` leaves the teacher no tail, so that every loss would be infinite"
            path = ("arms", arm, "divergence") if "divergence" in own else ("distill", "divergence")
            findings.add(path, "reverse_kl", what, "write forward_kl or jsd, or recalibrate by temperature")


def _check_support(task: TaskConfig | None, cache: CacheConfig | None, data: Datasets | None, findings) -> None:
    """Keeping the probabilities of the choices needs choices, and an answer that is all of the completion."""
    if task is None or cache is None or cache.support == "top_k":
        return
    if not task.choices:
        remedy = "list the closed answers as task.choices, or write support: top_k"
        findings.add(("cache", "support"), cache.support, "the task has no choices", remedy)
    elif task.append_eos and task.completion is not None:
        what = "cache.support: choices keeps the choices' tokens, and the end of sequence is none of them"
        findings.add(("task", "append_eos"), True, what, "write append_eos: false, or cache.support: top_k")
    for name, test in (data.test if data else {}).items():
        if test.task and "choices" in test.task and not test.task["choices"]:
            remedy = "give it choices, or write cache.support: top_k"
            what = "cache.support: choices recalibrates among choices, and this set has none"
            findings.add(("datasets", "test", name, "task", "choices"), test.task["choices"], what, remedy)


def _datasets(section: dict, task: TaskConfig | None, findings: Findings) -> Datasets | None:
    for key in section:
        if key not in ("train", "transfer", "validation", "test"):
            remedy = "write train, transfer, validation, or test with a name for each set"
            findings.add(("datasets", key), MISSING, "unknown split", remedy)
    train, transfer = (
        _dataset(section, ("datasets", role), findings) if section.get(role) is not None else None
        for role in ("train", "transfer")
    )
    validation = None
    if section.get("validation") is None:
        findings.add(
            ("datasets", "validation"), MISSING, "it is missing", "write the split that calibration is fitted on"
        )
    else:
        validation = _dataset(section, ("datasets", "validation"), findings)
    tests = _tests(section, task, findings)
    _refuse_shared_rows({"train": train, "transfer": transfer, "validation": validation}, tests, findings)
    return Datasets(train, validation, tests, transfer) if validation else None


def _dataset(section: dict, path: tuple, findings: Findings) -> DatasetConfig | None:
    dataset = _settings(DatasetConfig, _mapping(section, path, findings), path, findings)
    if dataset is None:
        return None
    readable = not any(unread[: len(path)] == path for unread in findings.unreadable)
    for problem in broken_source(dataset) if readable else []:
        findings.add((*path, problem.key), problem.value, problem.problem, problem.remedy)
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
        if name == "validation":
            what = "the report keeps the answers to the validation split under this name"
            findings.add((*path, name), MISSING, what, "choose another name")
        dataset = _dataset(sets, (*path, name), findings)
        if dataset is not None:
            tests[name] = dataset
            merged = dataclasses.asdict(task) | dataset.task if task and dataset.task else {}
            _settings(TaskConfig, merged, (*path, name, "task"), findings)
    return tests


def _refuse_shared_rows(splits: dict[str, DatasetConfig | None], tests: dict, findings: Findings) -> None:
    """A number is only honest on rows that nothing was fitted on, and a recalibration on rows that nobody learnt."""
    given = {name: dataset for name, dataset in splits.items() if dataset}
    reads = {"train": "train", "transfer": "train", "validation": "validation"}  # the split read where none is named
    for role, other in (("validation", "train"), ("validation", "transfer"), ("transfer", "train")):
        if {role, other} <= set(given) and share_rows(given[role], reads[role], given[other], reads[other]):
            what = f"it reads the same rows as datasets.{other}, and a model is over-confident on what it learnt"
            findings.add(("datasets", role), MISSING, what, f"give rows of their own to {role}")
    for test_name, test in tests.items():
        for name, dataset in given.items():
            if share_rows(test, "test", dataset, reads[name]):
                use = "calibration" if name == "validation" else "training"
                what = f"it reads the same rows as datasets.{name}: a test split used for {use}"
                findings.add(("datasets", "test", test_name), MISSING, what, "give rows of their own to the test set")


def refuse_secrets(value: Any, path: tuple, findings: Findings) -> None:
    """Recipes are written to disk and published with the model: no credential may be in one."""
    if is_secret(path, value):
        findings.add(
            path, value, "it looks like a credential, and recipes are published", "run `hf auth login` instead"
        )
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_secrets(item, (*path, key), findings)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            refuse_secrets(item, (*path, i), findings)

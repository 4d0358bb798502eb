"""What makes a job run again (the table is `jobs`), and how a job is made.

A stage is a command; a job is what it makes: one per stage, and one per student for `distill`. The record of a job, a
JSON file in `<run>/.records`, holds what it was made from (settings, digests of data and base models, identities of
earlier jobs) and the size and SHA-256 of every file that it made. A job is current when these inputs are today's, its
files are as they were written, and the jobs that it reads are current too. Its identity follows from its inputs and
the content of its weights, shards and values: one that is redone and comes out the same makes nothing after it stale.

What takes long is made in a new folder (`new_folder`), which takes the place of the finished one when its record is
written: nothing finished is lost before its successor is finished.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from .data.loading import hub_commit, local_files, source_commit
from .errors import FirstTrlError
from .files import Digests, exchange, files_of, locked, new_folder, read_json, write_atomically
from .log import is_main_process, status
from .recipe import Recipe, teacher_section
from .settings import SPEED_SETTINGS

LONG = timedelta(days=30)  # for processes that do not train together: the others wait for the last one
# What a job's identity is computed from; the rest of its files (logs, cards, times) differ between equal makings.
_CONTENT = (".safetensors", ".parquet", "calibration.json")
# The families among which `calibrate.method: auto` chooses. Not label smoothing: rows that nobody has seen may have
# less on their first token than it takes away.
AUTO_FAMILIES = ["temperature", "probability"]


@dataclass(frozen=True)
class Job:
    """What a stage makes, for `distill` one student, and everything that decides what comes out."""

    name: str  # `sft`, `cache`, `calibrate`, `distill.<student>` or `evaluate`
    settings: dict[str, Any]  # parts of the recipe, by their place in it
    data: dict[str, Any] = field(default_factory=dict)  # datasets, by their place in the recipe
    models: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # with revision, by the setting's name
    needs: tuple[str, ...] = ()  # the jobs whose files it reads
    folders: tuple[str, ...] = ()  # what it makes as a whole, in a new folder first; relative to the run folder
    outputs: tuple[str, ...] = ()  # patterns of the files that it makes besides

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def command(self) -> str:
        """The command that makes it."""
        student = self.name.partition(".")[2]
        return f"first-trl {self.stage} RECIPE" + (f" --arm {student}" if student else "")

    @property
    def reads(self) -> list[str]:
        """What it reads, as people name it."""
        files = [file for config in self.data.values() if config for file in _named_files(config) or [config.path]]
        return [*(model for model, _ in self.models.values()), *self.needs, *files]


def jobs(recipe: Recipe) -> dict[str, Job]:
    """The jobs of a recipe by name, in the order in which they are made. `push` makes nothing that is read later."""
    data, plain, given = recipe.datasets, recipe.to_dict(), recipe.cache.teacher
    task, train = {"task": plain["task"]}, {"datasets.train": data.train}
    validation = {"datasets.validation": data.validation}
    learned = {"datasets.transfer": data.transfer} if data.transfer else train
    tests = {f"datasets.test.{name}": config for name, config in data.test.items()}
    cache = {name: value for name, value in plain["cache"].items() if name not in SPEED_SETTINGS}
    teacher = {"cache.teacher": (given, recipe.cache.teacher_revision)} if given else {}
    runs = {"teacher": teacher_section(recipe)} if given else {}  # how, which `sft` has a part in
    sft = () if given else ("sft",)
    students = [_student_job(recipe, student, task, train, validation) for student in recipe.students]
    # fmt: off
    table = [
        Job("sft", {**task, "sft": recipe.sft, "seed": recipe.seed}, data=train | validation,
            models=_model_of("sft", recipe.sft), folders=("teacher",)),
        Job("cache", {**task, "cache": cache, **runs}, data=learned | validation, models=teacher, needs=sft,
            folders=tuple(f"cache/{role}" for role in cached_roles(recipe))),
        Job("calibrate", {"calibrate": plain["calibrate"], "methods": calibration_methods(recipe)},
            needs=("cache",), outputs=("calibration.json",)),
        *students,
        Job("evaluate", {**task, "evaluate": plain["evaluate"], "distill": recipe.distill, **runs},
            data=validation | tests, models=teacher | _model_of("distill", recipe.distill),
            needs=(*sft, "calibrate", *(job.name for job in students)), outputs=("report/*.*",)),
    ]
    # fmt: on
    return {job.name: job for job in table if not (given and job.name == "sft")}


def _student_job(recipe: Recipe, student: str, task: dict, train: dict, validation: dict) -> Job:
    section, on_labels = recipe.arm_section(student), recipe.arm_trainer(student) == "sft"
    settings = {
        "distill": section,
        "trainer": recipe.arm_trainer(student),
        "recalibration": recalibration_of(recipe, student),
        "seed": recipe.seed_of(student),
        "closing": [recipe.distill.get("closing", True), recipe.evaluate.seed],
        **({"rounds": 2} if recipe.has_second_round(student) else {}),
    }
    rows = (train if on_labels else {}) | validation  # the latter for its closing temperature and thresholds
    needs = () if on_labels else ("cache", "calibrate") if needs_calibration(recipe, student) else ("cache",)
    models = _model_of("distill", section)
    return Job(f"distill.{student}", task | settings, rows, models, needs, (f"students/{student}",))


def _model_of(place: str, section: dict) -> dict[str, tuple[str, str | None]]:
    model = section.get("model_name_or_path")
    return {f"{place}.model_name_or_path": (model, section.get("model_revision"))} if model else {}


def recalibration_of(recipe: Recipe, arm: str) -> tuple[str, float | None]:
    """(method, value) of an arm; value None is the one that `calibrate` finds, `auto` the method that it chooses."""
    section = recipe.arm_section(arm)
    if recipe.arm_trainer(arm) == "sft":
        return "none", None
    value = section.get("recalibration_value")
    default = recipe.calibrate.method if value is None else "temperature"
    return section.get("recalibration_method") or default, value


def needs_calibration(recipe: Recipe, arm: str) -> bool:
    """Whether an arm reads `calibration.json`."""
    method, value = recalibration_of(recipe, arm)
    return method != "none" and value is None


def positions_of(recipe: Recipe) -> str:
    """Where the teacher is measured: at the answer of a closed question, at every token of free text."""
    return recipe.calibrate.positions or ("answer" if recipe.task.choices else "all")


def calibration_methods(recipe: Recipe) -> list[str]:
    """The families that `calibrate` fits: the recipe's own (for `auto`, all candidates), and those of its arms."""
    own = AUTO_FAMILIES if recipe.calibrate.method == "auto" else [recipe.calibrate.method]
    of_arms = [recalibration_of(recipe, arm)[0] for arm in recipe.arms if needs_calibration(recipe, arm)]
    return [method for method in dict.fromkeys([*own, *of_arms]) if method != "auto"]


def cached_roles(recipe: Recipe) -> tuple[str, ...]:
    """The splits that the teacher is run over: without rows for students to learn from, validation alone."""
    learnt = recipe.datasets.transfer or recipe.datasets.train
    return ("train", "validation") if learnt else ("validation",)


def teacher_path(recipe: Recipe) -> str:
    """The teacher's model id or folder: the one given, or the one that `sft` makes."""
    return recipe.cache.teacher or str(recipe.run_folder / "teacher")


class Stale(NamedTuple):
    """Why a job is not current: which one, of it and those that it needs, and the reason in words."""

    job: Job
    reason: str
    damaged: bool = False  # finished from today's inputs, and a file of it is missing or changed


class Run:
    """The jobs of a recipe and their records in its run folder.

    Args:
        full: read every file again, where otherwise one is not whose size and times are as when it was last read.
        source: the recipe's file, where something is to be made.
    """

    def __init__(self, recipe: Recipe, full: bool = False, source: str = "."):
        self.recipe, self.path = recipe, Path(recipe.run_folder)
        self.source = os.path.relpath(source, self.path)  # the same wherever both were moved to together
        self.jobs = jobs(recipe)
        self.digests = Digests(self.path / ".records" / "digests.json", full)
        self._stale: dict[str, Stale | None] = {}

    def file(self, name: str, suffix: str = ".json") -> Path:
        """The record of a job, or with a suffix (`.lock`, `.started`) what belongs to its making."""
        return self.path / ".records" / f"{name}{suffix}"

    def record(self, name: str) -> dict | None:
        """The record of a finished job; None where there is none that can be read."""
        record = read_json(self.file(name)) or {}
        fields = {"identity": str, "inputs": dict, "outputs": dict}
        return record if all(isinstance(record.get(key), kind) for key, kind in fields.items()) else None

    def inputs(self, name: str) -> dict:
        """Everything that a job is made from today, as plain data."""
        job = self.jobs[name]
        earlier = {need: self.record(need) for need in job.needs}
        inputs = {
            "settings": job.settings,
            "data": {place: self._data(config) for place, config in job.data.items() if config is not None},
            "models": {place: self._model(*model) for place, model in job.models.items()},
            "jobs": {need: record["identity"] if record else None for need, record in earlier.items()},
        }
        inputs = json.loads(json.dumps(inputs, sort_keys=True, default=_plain))
        for place, model in inputs["models"].items():  # known by its files, wherever they lie
            section, _, setting = place.partition(".")
            if "files" in model:
                inputs["settings"].get(section, {}).pop(setting, None)
        return inputs

    def _data(self, config) -> dict:
        """A dataset: its settings, and the content of its files, whatever pattern or folder names them."""
        settings, files = _plain(config), local_files(config)
        if files:
            named = [Path(name).name for name in _named_files(config)]
            settings |= {"path": Path(config.path).name, "data_files": named}
        top = os.path.commonpath([file.parent for file in files]) if files else "."
        contents = {os.path.relpath(file, top): self.digests.of(file) for file in files}
        return {**settings, "commit": source_commit(config), "files": contents}

    def _model(self, model: str, revision: str | None) -> dict:
        """A model: its id and the commit of its revision, or the content of its folder and of an adapter's base."""
        path = Path(model)
        if not path.is_dir():
            return {"id": model, "commit": hub_commit(model, revision, "model")}
        files = {name: self.digests.of(path / name) for name in files_of(path)}
        base = (read_json(path / "adapter_config.json") or {}).get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).is_dir():
            files |= {f"base/{name}": self.digests.of(Path(base, name)) for name in files_of(Path(base))}
        return {"name": path.resolve().name, "files": files}

    def stale(self, name: str) -> Stale | None:
        """Why a job is not current; None where it is."""
        if name not in self._stale:
            self._stale[name] = self._why_stale(self.jobs[name])
            self.digests.save()
        return self._stale[name]

    def _why_stale(self, job: Job) -> Stale | None:
        if earlier := next(filter(None, map(self.stale, job.needs)), None):
            return earlier
        if (record := self.record(job.name)) is None:
            return Stale(job, "it is not finished")
        if found := differences(record["inputs"], self.inputs(job.name)):
            more = f"; and {len(found) - 3} more" * (len(found) > 3)
            return Stale(job, "; ".join(found[:3]) + more)
        for file, made in record["outputs"].items():
            if not (self.path / file).is_file():
                return Stale(job, f"{self.path / file} is missing", damaged=True)
            if self.digests.of(self.path / file) != made["sha256"]:
                return Stale(job, f"{self.path / file} is not as it was written", damaged=True)
        return None

    def begin(self, name: str, overwrite: bool = False) -> bool | None:
        """Prepare the making of a job: None if it is current, else whether an interrupted attempt is continued."""
        job, record, inputs = self.jobs[name], self.record(name), self.inputs(name)
        if record and any(new_folder(self.path / folder).is_dir() for folder in job.folders):
            made = self._files(job)  # of a kill between the record and the exchange?
            recorded = {file: each["sha256"] for file, each in record["outputs"].items()}
            if made.keys() == recorded.keys() and all(self.digests.of(made[file]) == recorded[file] for file in made):
                exchange(self.path, job.folders)
        stale = self.stale(name)
        if stale is None:
            return None
        if record and record.get("recipe") != self.source and not stale.damaged and not overwrite:
            raise FirstTrlError(
                f"{self.path} holds the finished {name} of another recipe, {record.get('recipe')} ({stale.reason}). "
                "Give this run a --name of its own, or replace that work with --overwrite."
            )
        continues = read_json(self.file(name, ".started")) == inputs
        for folder in job.folders:
            target, new = self.path / folder, new_folder(self.path / folder)
            if not continues and new.is_dir():
                shutil.rmtree(new)  # an attempt from other inputs
            damaged = stale.damaged or record is None
            if damaged and job.stage == "cache" and target.is_dir() and not new.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                target.resolve().rename(new)  # its whole shards are kept
        write_atomically(self.file(name, ".started"), json.dumps(inputs, indent=1))
        return continues

    def finish(self, name: str, seconds: float, **notes: Any) -> None:
        """Record that a job is done, and put what it made in its place."""
        job, inputs = self.jobs[name], read_json(self.file(name, ".started"))
        outputs = {
            file: {"size": path.stat().st_size, "sha256": self.digests.of(path)}
            for file, path in self._files(job).items()
        }
        assert outputs, f"{name} ended without writing anything"
        content = {file: each["sha256"] for file, each in outputs.items() if file.endswith(_CONTENT)}
        record = {
            "identity": hashlib.sha256(json.dumps([inputs, content], sort_keys=True).encode()).hexdigest(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "recipe": self.source,
            "settings": self.recipe.to_dict(),
            **notes,
            "outputs": outputs,
            "inputs": inputs,
        }
        write_atomically(self.file(name), json.dumps(record, indent=1, default=str))
        exchange(self.path, job.folders)
        self.file(name, ".started").unlink(missing_ok=True)
        self._stale.clear()

    def _files(self, job: Job) -> dict[str, Path]:
        """{path relative to the run folder: where it lies now} of the files that a job has made."""
        made: dict[str, Path] = {}
        for folder in job.folders:
            new = new_folder(self.path / folder)
            place = new if new.is_dir() else self.path / folder
            made |= {f"{folder}/{name}": place / name for name in files_of(place)}
        for file in (file for pattern in job.outputs for file in sorted(self.path.glob(pattern))):
            if file.is_file() and not file.name.startswith("."):
                made[file.relative_to(self.path).as_posix()] = file
        return made


def _named_files(config) -> list[str]:
    return [config.data_files] if isinstance(config.data_files, str) else config.data_files or []


def _plain(value: Any) -> Any:
    """A section of the recipe as plain data; any other value as text."""
    return dict(vars(value)) if hasattr(value, "__dict__") else str(value)


def differences(recorded: dict, today: dict) -> list[str]:
    """What has changed between the inputs in a record and those of today, in words; settings first."""
    found = []
    for kind in ("settings", "data", "models", "jobs"):
        before, now = _leaves(recorded.get(kind)), _leaves(today.get(kind))
        for place in sorted({*before, *now}):
            old, new = before.get(place), now.get(place)
            if old == new:
                continue
            if "files" in place:
                what = "is new" if old is None else "is gone" if new is None else "has changed"
                found.append(f"{place[-1]} of {'.'.join(place[: place.index('files')])} {what}")
            elif kind == "jobs":
                found.append(f"{place[-1]} has changed since")
            else:
                is_now, was = ("not set" if value is None else repr(value) for value in (new, old))
                found.append(f"{'.'.join(place)} is {is_now}, and was {was} when it was made")
    return found


def _leaves(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{place: value} of everything in nested mappings that is no mapping, without what is None."""
    if not isinstance(value, dict):
        return {} if value is None else {place: value}
    return {at: leaf for key, item in value.items() for at, leaf in _leaves(item, (*place, str(key))).items()}


def require(recipe: Recipe, *names: str, full: bool = False) -> None:
    """Refuse, on the main process, earlier jobs that are not current; those that the recipe has not are passed over.

    `full` reads all of their files again. The message says why, and names the command that makes what is missing.
    """
    run = Run(recipe, full)
    for name in names if is_main_process() else ():
        if name in run.jobs and (stale := run.stale(name)):
            raise FirstTrlError(
                f"{stale.job.name} of {run.path} is {'damaged' if stale.damaged else 'not up to date'}: "
                f"{stale.reason}. Run `{stale.job.command}`, or `first-trl run RECIPE` for all that is missing."
            )


def init_distributed(timeout: timedelta | None = None):
    """Join the processes of `accelerate launch`, which wait `timeout` for one another; returns its `PartialState`."""
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():  # without it each process takes itself for the only one
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the trainers' own states too
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return PartialState(cpu=use_cpu, **({"timeout": timeout} if timeout else {}))


def run_job(
    recipe: Recipe,
    options: argparse.Namespace,
    name: str,
    make: Callable[[bool], Any],
    timeout: timedelta | None = None,
) -> None:
    """Make a job unless it is current, and record it. The main process holds its lock meanwhile.

    Args:
        make: makes it on every process, in `new_folder`s, given whether this continues an interrupted attempt.
        timeout: `LONG` for a job whose processes do not train together.
    """
    from accelerate.utils import broadcast_object_list

    state = init_distributed(timeout)
    run = Run(recipe, source=options.recipe)
    with locked(run.file(name, ".lock"), f"{name} of {run.path}") if state.is_main_process else nullcontext():
        decision: list = [None]
        if state.is_main_process:
            decision = [run.begin(name, options.overwrite)]
            if decision[0] is not None:
                recipe.write_resolved(run.path / "recipe.resolved.yaml")
        (continues,) = broadcast_object_list(decision)
        if continues is None:
            status(f"{name}: up to date, nothing to do")
            return
        started = time.monotonic()
        make(continues)
        state.wait_for_everyone()
        if state.is_main_process:
            run.finish(name, time.monotonic() - started, skip_checks=options.skip_checks)
    job, following = run.jobs[name], [*run.jobs, "push, or the report in a browser"]
    wrote = ", ".join(str(run.path / output.removesuffix("/*.*")) for output in [*job.folders, *job.outputs])
    status(
        f"{name}: read {', '.join(job.reads)}; wrote {wrote} in {time.monotonic() - started:.0f} s; "
        f"next: {following[following.index(name) + 1]}"
    )


def recorded_recipe(recipe: Recipe) -> Recipe:
    """The recipe as its jobs ran, in the place of what it says today: from their records, which must be current."""
    run = Run(recipe)
    ran = {name: record["settings"] for name in run.jobs if (record := run.record(name))}
    today = recipe.to_dict()
    sections = {name: ran[name][name] for name in ("sft", "cache", "calibrate") if name in ran}
    place = {key: today[key] for key in ("name", "output_dir", "push")}
    return Recipe.model_validate({**ran.get("evaluate", today), **sections, **place})

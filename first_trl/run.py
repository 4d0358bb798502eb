"""The jobs of a recipe: what each is made from, whether it is current, and how one is made.

A stage is a command; a job is what it makes: one per stage, and one per student for `distill`. `jobs` is the table of
them. The record of a finished job, a JSON file in `<run>/.records`, holds what it was made from (settings, digests of
data and base models, identities of earlier jobs) and the size and SHA-256 of every file that it made. A job is current
when these inputs are today's, its files are as they were written, and the jobs that it reads are current too. The
identity of a job follows from its inputs and the content of its weights, shards and values: a job that is redone
and comes out the same makes nothing after it stale.

What takes long is made in a new folder (`new_folder`), which takes the place of the finished one when its record is
written: nothing finished is lost before its successor is finished. Nothing here trains or scores anything.
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
from typing import Any

from .data.loading import hub_commit, local_files, source_commit
from .errors import FirstTrlError
from .files import Digests, files_of, locked, write_atomically
from .log import status
from .recipe import Recipe, teacher_section
from .records import differences, exchange, finish_exchange, new_folder, read_json
from .settings import SPEED_SETTINGS

LONG = timedelta(days=30)  # for processes that do not train together: the others wait for the last one
# What a job's identity is computed from; the rest of its files (logs, cards, times) differ between equal makings.
_CONTENT = (".safetensors", ".parquet", "calibration.json")


@dataclass(frozen=True)
class Job:
    """One job of a recipe.

    Args:
        name: `sft`, `cache`, `calibrate`, `distill.<student>` or `evaluate`.
        settings: the parts of the recipe that decide what comes out, by their place in it.
        data: datasets by their place in the recipe.
        models: models of the Hub or of this machine, with their revision, by the setting that names them.
        needs: the jobs whose files it reads.
        folders: what it makes as a whole, in a new folder first; relative to the run folder.
        outputs: patterns of the files that it makes besides.
    """

    name: str
    settings: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    models: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

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
    data, plain = recipe.datasets, recipe.to_dict()
    given = recipe.cache.teacher
    teacher = {"cache.teacher": (given, recipe.cache.teacher_revision)} if given else {}
    runs = {"teacher": teacher_section(recipe)} if given else {}  # how, which `sft` has a part in
    after_sft = () if given else ("sft",)
    table = []
    if not given:
        settings = {"task": plain["task"], "sft": recipe.sft, "seed": recipe.seed}
        rows = {"datasets.train": data.train, "datasets.validation": data.validation}
        models = _model_of("sft", recipe.sft)
        table.append(Job("sft", settings, rows, models, folders=("teacher",)))
    cache = {name: value for name, value in plain.get("cache", {}).items() if name not in SPEED_SETTINGS}
    rows = {f"datasets.{'transfer' if data.transfer else 'train'}": data.transfer or data.train}
    rows["datasets.validation"] = data.validation
    folders = tuple(f"cache/{role}" for role in cached_roles(recipe))
    settings = {"task": plain["task"], "cache": cache, **runs}
    table.append(Job("cache", settings, rows, teacher, after_sft, folders))
    settings = {"calibrate": plain.get("calibrate", {}), "methods": calibration_methods(recipe)}
    table.append(Job("calibrate", settings, needs=("cache",), outputs=("calibration.json",)))
    table += [_student_job(recipe, student, plain["task"]) for student in recipe.students]
    students = tuple(job.name for job in table if job.stage == "distill")
    rows = {"datasets.validation": data.validation}
    rows |= {f"datasets.test.{name}": config for name, config in data.test.items()}
    models = teacher | _model_of("distill", recipe.distill)
    settings = {"task": plain["task"], "evaluate": plain.get("evaluate", {}), "distill": recipe.distill, **runs}
    needs = (*after_sft, "calibrate", *students)
    table.append(Job("evaluate", settings, rows, models, needs, outputs=("report/*.*",)))
    return {job.name: job for job in table}


def _student_job(recipe: Recipe, student: str, task: dict) -> Job:
    section, on_labels = recipe.arm_section(student), recipe.arm_trainer(student) == "sft"
    settings = {
        "distill": section,
        "trainer": recipe.arm_trainer(student),
        "recalibration": recalibration_of(recipe, student),
        "seed": recipe.seed_of(student),
        "task": task,
        "closing": [recipe.distill.get("closing", True), recipe.evaluate.seed],
    }
    rows, needs = {}, ("calibrate",) if needs_calibration(recipe, student) else ()
    if on_labels:
        rows = {"datasets.train": recipe.datasets.train}
    else:
        needs = ("cache", *needs)
    rows["datasets.validation"] = recipe.datasets.validation  # for its closing temperature and thresholds
    models = _model_of("distill", section)
    return Job(f"distill.{student}", settings, rows, models, needs, (f"students/{student}",))


def _model_of(place: str, section: dict) -> dict[str, tuple[str, str | None]]:
    model = section.get("model_name_or_path")
    return {f"{place}.model_name_or_path": (model, section.get("model_revision"))} if model else {}


def jobs_of(recipe: Recipe, stage: str) -> list[str]:
    """The names of a stage's jobs, in order."""
    return [job.name for job in jobs(recipe).values() if job.stage == stage]


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


def positions_of(recipe) -> str:
    """Where the teacher is measured: at the answer of a closed question, at every token of free text."""
    return recipe.calibrate.positions or ("answer" if recipe.task.choices else "all")


def calibration_methods(recipe: Recipe) -> list[str]:
    """The families that `calibrate` fits: the recipe's own, and those that an arm asks for."""
    wanted = control_methods(recipe)
    wanted += [recalibration_of(recipe, arm)[0] for arm in recipe.arms if needs_calibration(recipe, arm)]
    return [method for method in dict.fromkeys(wanted) if method != "auto"]


def control_methods(recipe: Recipe) -> list[str]:
    """The families that `evaluate` may apply to answers: the recipe's own, or all that `auto` chooses among."""
    method = recipe.calibrate.method
    return calibration_candidates(recipe) if method == "auto" else [method]


def calibration_candidates(recipe: Recipe) -> list[str]:
    """The families among which `calibrate.method: auto` chooses.

    Not label smoothing: rows that nobody has seen may have less on their first token than it takes away.
    """
    return ["temperature", "probability"]


def cached_roles(recipe: Recipe) -> tuple[str, ...]:
    """The splits that the teacher is run over: without rows for students to learn from, validation alone."""
    learnt = recipe.datasets.transfer or recipe.datasets.train
    return ("train", "validation") if learnt else ("validation",)


def teacher_path(recipe: Recipe) -> str:
    """The teacher's model id or folder: the one given, or the one that `sft` makes."""
    return recipe.cache.teacher or str(recipe.run_folder / "teacher")


@dataclass(frozen=True)
class Stale:
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

    def file(self, name: str, suffix: str = "") -> Path:
        """The record of a job, or with a suffix (`.lock`, `.started`) what belongs to its making."""
        return self.path / ".records" / f"{name}{suffix or '.json'}"

    def record(self, name: str) -> dict | None:
        """The record of a finished job; None where there is none that can be read."""
        record = read_json(self.file(name))
        fields = {"identity": str, "inputs": dict, "outputs": dict}
        whole = record is not None and all(isinstance(record.get(key), kind) for key, kind in fields.items())
        return record if whole else None

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
        return {**settings, "commit": source_commit(config), "files": self._contents(files)}

    def _contents(self, files: list[Path]) -> dict[str, str]:
        """{path below their common folder: digest} of files."""
        top = os.path.commonpath([file.parent for file in files]) if files else "."
        return {os.path.relpath(file, top): self.digests.of(file) for file in files}

    def _model(self, model: str, revision: str | None) -> dict:
        """A model: the content of its folder, or its id and the commit that its revision stands for."""
        path = Path(model)
        if not path.is_dir():
            return {"id": model, "commit": hub_commit(model, revision, "model")}
        return {"name": path.resolve().name, "files": {name: self.digests.of(path / name) for name in files_of(path)}}

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
        for file, digest in record["outputs"].items():
            if not (self.path / file).is_file():
                return Stale(job, f"{self.path / file} is missing", damaged=True)
            if self.digests.of(self.path / file) != digest["sha256"]:
                return Stale(job, f"{self.path / file} is not as it was written", damaged=True)
        return None

    def begin(self, name: str, overwrite: bool = False) -> bool | None:
        """Prepare the making of a job: None if it is current, else whether an interrupted attempt is continued.

        Raises:
            FirstTrlError: another recipe of the same name has finished it.
        """
        job, record, inputs = self.jobs[name], self.record(name), self.inputs(name)
        if record and job.folders and all(new_folder(self.path / folder).is_dir() for folder in job.folders):
            finish_exchange(self.path, job.folders, record["outputs"], self.digests)
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
        job = self.jobs[name]
        outputs = self._made(job)
        assert outputs, f"{name} ended without writing anything"
        inputs = read_json(self.file(name, ".started"))
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

    def _made(self, job: Job) -> dict[str, dict]:
        """{path relative to the run folder: size and SHA-256} of what a job has made, where it lies now."""
        made: dict[str, Path] = {}
        for folder in job.folders:
            new = new_folder(self.path / folder)
            place = new if new.is_dir() else self.path / folder
            made |= {f"{folder}/{name}": place / name for name in files_of(place)}
        for file in (file for pattern in job.outputs for file in sorted(self.path.glob(pattern))):
            if file.is_file() and not file.name.startswith("."):
                made[file.relative_to(self.path).as_posix()] = file
        return {name: {"size": file.stat().st_size, "sha256": self.digests.of(file)} for name, file in made.items()}


def _named_files(config) -> list[str]:
    return [config.data_files] if isinstance(config.data_files, str) else config.data_files or []


def _plain(value: Any) -> Any:
    """A section of the recipe as plain data; any other value as text."""
    return dict(vars(value)) if hasattr(value, "__dict__") else str(value)


def is_current(recipe: Recipe, job: str) -> bool:
    """Whether a job is finished, from what the recipe says today, and its files are whole."""
    return Run(recipe).stale(job) is None


def require(recipe: Recipe, *names: str, full: bool = False) -> None:
    """Check, on the main process, that earlier jobs are current; those that the recipe has not are passed over.

    Args:
        full: read all of their files again; see `Run`.

    Raises:
        FirstTrlError: one is not; the message says why, and names the command that makes it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    run = Run(recipe, full)
    for name in names:
        if name in run.jobs and (stale := run.stale(name)):
            raise FirstTrlError(
                f"{stale.job.name} of {run.path} is {'damaged' if stale.damaged else 'not up to date'}: "
                f"{stale.reason}. Run `{stale.job.command}`, or `first-trl run RECIPE` for all that is missing."
            )


def init_distributed(timeout: timedelta | None = None):
    """Join the processes that `accelerate launch` started; returns accelerate's `PartialState`.

    Without an accelerator, accelerate takes each process for the only one unless it is set to use the CPU.

    Args:
        timeout: how long processes that are done wait for the others; one that dies still ends the job.
    """
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():
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
        options: of the stage's command.
        make: makes it on every process, its folders as `new_folder` says, given whether this continues an interrupted
            attempt.
        timeout: see `init_distributed`; `LONG` for a job whose processes do not train together.
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
    made = dict.fromkeys(str(run.path / output.removesuffix("/*.*")) for output in [*job.folders, *job.outputs[:1]])
    wrote = ", ".join(made)
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

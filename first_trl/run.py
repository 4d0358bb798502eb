"""The jobs of a recipe: what each is made from, whether it is current, and how one is made.

A stage is a command; a job is what it makes: one per stage, and one per arm for `distill`. `inputs_of` says what a job
is made from, `run_job` makes it if that has changed. A record is one JSON file per job in `<run>/.records`. It holds
the inputs (settings, fingerprints of files, identities of the records that came before) and the files that came out. A
job is current when a record exists, its inputs equal today's, and its outputs are still there. Each record has an
identity of its own, new at every making, so redoing one job makes everything built on it stale, and nothing else.
`stage_command` is what every stage's command does around its job: read the recipe, keep a log, and fail in one line.
Nothing here trains or scores anything.
"""

import argparse
import functools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

from .data.loading import source_identity
from .failures import explain
from .files import locked, path_fingerprint, write_atomically
from .log import RunLog, libraries_into, recording, status
from .recipe import STAGES, Recipe, RecipeError, load_recipe
from .redaction import redacted
from .settings import SPEED_SETTINGS

METHODS_WITHOUT_VALUE = ("none",)
LONG = timedelta(days=30)  # for processes that do not train together: the others wait for the last one


def parse_stage(stage: str, argv: list[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe and the options of `python -m first_trl.stages.STAGE RECIPE [--key value ...]`."""
    parser = argparse.ArgumentParser(
        prog=f"first-trl {stage}",
        allow_abbrev=False,
        epilog="Any setting of the recipe can be overridden: --key value for this stage's own, --section.key value.",
    )
    parser.add_argument("recipe", help="the experiment's YAML file")
    if stage == "distill":
        parser.add_argument("--arm", help="train this arm only, or one of its seeds: first/seed-1")
    if stage == "push":
        parser.add_argument("--dry_run", action="store_true", help="write the folder to upload, and upload nothing")
    parser.add_argument("--quiet", action="store_true", help="print errors alone; the run's log.txt has the rest")
    options, overrides = parser.parse_known_args(argv)
    try:
        recipe = load_recipe(options.recipe, overrides, stage=stage)
    except RecipeError as error:
        raise SystemExit(str(error) if os.environ.get("RANK", "0") == "0" else 1) from None
    if getattr(options, "arm", None) and options.arm not in [*recipe.arms, *recipe.students]:
        parser.error(f"unknown arm {options.arm!r}; the recipe has {', '.join(recipe.arms)}")
    return recipe, options


def jobs_of(recipe: Recipe, stage: str) -> list[str]:
    """The jobs of a stage, in order; `push` leaves nothing behind and is not among them."""
    if stage == "distill":
        return [f"distill.{student}" for student in recipe.students]
    if stage == "sft" and recipe.cache.teacher is not None:
        return []  # the teacher is given
    return [stage] if stage != "push" else []


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
    return method not in METHODS_WITHOUT_VALUE and value is None


def calibration_methods(recipe: Recipe) -> list[str]:
    """The families that `calibrate` fits: the recipe's own, and those that an arm asks for."""
    wanted = control_methods(recipe)
    wanted += [recalibration_of(recipe, arm)[0] for arm in recipe.arms if needs_calibration(recipe, arm)]
    return [method for method in dict.fromkeys(wanted) if method != "auto"]


def control_methods(recipe: Recipe) -> list[str]:
    """The families that `evaluate` may lay over answers: the recipe's own, or all that `auto` chooses among."""
    method = recipe.calibrate.method
    return calibration_candidates(recipe) if method == "auto" else [method]


def calibration_candidates(recipe: Recipe) -> list[str]:
    """The families among which `calibrate.method: auto` chooses: those that this cache can serve.

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


def _local(path) -> str | None:
    """A fingerprint of a path on this machine; None for a Hub id, which its revision identifies."""
    return path_fingerprint(path) if path and Path(path).exists() else None


def _dataset(config, role: str) -> dict | None:
    return None if config is None else {"settings": vars(config), "rows": source_identity(config, role)}


def inputs_of(recipe: Recipe, job: str) -> dict:
    """Everything that a job is made from, as plain data; equal inputs mean that it need not be redone."""
    run = RunFolder(recipe.run_folder)
    data = recipe.datasets
    if job == "sft":
        return {
            "task": vars(recipe.task),
            "train": _dataset(data.train, "train"),
            "validation": _dataset(data.validation, "validation"),
            "settings": recipe.sft,
            "seed": recipe.seed,
            "base": _local(recipe.sft["model_name_or_path"]),
        }
    if job == "cache":
        given = recipe.cache.teacher
        return {
            "task": vars(recipe.task),
            "train": _dataset(data.transfer or data.train, "train"),
            "validation": _dataset(data.validation, "validation"),
            "settings": {name: value for name, value in vars(recipe.cache).items() if name not in SPEED_SETTINGS},
            "teacher": _local(given) if given else run.identity("sft"),
        }
    if job == "calibrate":
        settings = {**vars(recipe.calibrate), "methods": calibration_methods(recipe)}
        return {"settings": settings, "cache": run.identity("cache")}
    if job == "evaluate":
        return {
            "task": vars(recipe.task),
            "validation": _dataset(data.validation, "validation"),
            "test": {name: _dataset(config, "test") for name, config in data.test.items()},
            "settings": vars(recipe.evaluate),
            "made": {name: run.identity(name) for name in ("sft", "calibrate", *jobs_of(recipe, "distill"))},
        }
    arm = job.removeprefix("distill.")
    if recipe.arm_trainer(arm) == "sft":
        rows: dict = {
            "task": vars(recipe.task),
            "train": _dataset(data.train, "train"),
            "validation": _dataset(data.validation, "validation"),
        }
    else:
        rows = {"cache": run.identity("cache")}
    return {
        "settings": recipe.arm_section(arm),
        "trainer": recipe.arm_trainer(arm),
        "recalibration": recalibration_of(recipe, arm),
        "seed": recipe.seed_of(arm),
        "base": _local(recipe.arm_section(arm)["model_name_or_path"]),
        **rows,
        "calibration": run.identity("calibrate") if needs_calibration(recipe, arm) else None,
    }


def input_names(recipe: Recipe, job: str) -> list[str]:
    """What a job reads, as people name it: models, files and folders."""
    run, data = recipe.run_folder, recipe.datasets
    if job == "sft":
        return [recipe.sft["model_name_or_path"], *_files(data.train)]
    if job == "cache":
        return [teacher_path(recipe), *_files(data.transfer or data.train), *_files(data.validation)]
    if job == "calibrate":
        return [str(run / "cache" / "validation")]
    if job == "evaluate":
        students = [str(run / "students" / student) for student in recipe.students]
        return [teacher_path(recipe), *students, f"{len(data.test)} test sets"]
    arm = job.removeprefix("distill.")
    rows = _files(data.train) if recipe.arm_trainer(arm) == "sft" else [str(run / "cache" / "train")]
    calibration = [str(run / "calibration.json")] if needs_calibration(recipe, arm) else []
    return [recipe.arm_section(arm)["model_name_or_path"], *rows, *calibration]


def _files(config) -> list[str]:
    if config is None:
        return []
    files = config.data_files or config.path
    return [files] if isinstance(files, str) else files


def is_current(recipe: Recipe, job: str) -> bool:
    """Whether a job is finished and what it was made from has not changed."""
    return RunFolder(recipe.run_folder).is_current(job, inputs_of(recipe, job))


def require(recipe: Recipe, *jobs: str) -> None:
    """Check that earlier jobs are there.

    Raises:
        FileNotFoundError: one is missing; the message names the command that makes it.
    """
    for job in jobs:
        if job in jobs_of(recipe, job.split(".")[0]) and RunFolder(recipe.run_folder).identity(job) is None:
            raise FileNotFoundError(
                f"{recipe.run_folder} has no finished '{job}' yet. Run `first-trl {job.split('.')[0]} RECIPE`, or "
                "`first-trl run RECIPE` for everything."
            )


def init_distributed(timeout: timedelta | None = None):
    """Join the processes that `accelerate launch` started; returns accelerate's `PartialState`.

    Without an accelerator, accelerate takes each process for the only one unless it is told to use the CPU.

    Args:
        timeout: how long processes that are done wait for the others; one that dies still ends the job.
    """
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the trainers' own states too
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return PartialState(cpu=use_cpu, **({"timeout": timeout} if timeout else {}))


def run_job(recipe: Recipe, job: str, make: Callable[[bool], list[str]], timeout: timedelta | None = None) -> None:
    """Make a job unless it is current, and record it. The main process holds its lock meanwhile.

    Args:
        make: makes it on every process of the job, given whether this continues an interrupted attempt; returns the
            paths that it wrote, relative to the run folder.
        timeout: see `init_distributed`; `LONG` for a job whose processes do not train together.
    """
    from accelerate.utils import broadcast_object_list

    state, run = init_distributed(timeout), RunFolder(recipe.run_folder)
    with run.lock(job) if state.is_main_process else nullcontext():
        inputs = inputs_of(recipe, job)
        decision: list = [None]
        if state.is_main_process:
            decision = ["current" if run.is_current(job, inputs) else run.start(job, inputs)]
            recipe.write_resolved(recipe.run_folder / "recipe.resolved.yaml")
        continues = broadcast_object_list(decision)[0]
        if continues == "current":
            status(f"{job}: up to date, nothing to do")
            return
        started = time.monotonic()
        outputs = make(continues)
        state.wait_for_everyone()
        if state.is_main_process:
            run.finish(job, inputs, outputs, time.monotonic() - started)
    read, written = ", ".join(input_names(recipe, job)), ", ".join(str(recipe.run_folder / name) for name in outputs)
    status(f"{job}: read {read}; wrote {written} in {time.monotonic() - started:.0f} s; next: {_next(recipe, job)}")


def _next(recipe: Recipe, job: str) -> str:
    jobs = [each for stage in STAGES for each in jobs_of(recipe, stage)]
    return [*jobs, "push, or the report in a browser"][jobs.index(job) + 1]


class RunFolder:
    """Records of the jobs done in one run folder.

    Args:
        path: the folder, `runs/<name>`; made on the first record.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def _file(self, job: str, suffix: str = "") -> Path:
        return self.path / ".records" / f"{job}{suffix}.json"

    def record(self, job: str) -> dict | None:
        """The record of a finished job, or None."""
        file = self._file(job)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def identity(self, job: str) -> str | None:
        """The identity of a finished job, for the inputs of whatever is built on it."""
        record = self.record(job)
        return record["identity"] if record and self._outputs_exist(record) else None

    def is_current(self, job: str, inputs: dict) -> bool:
        """Whether `job` was finished from exactly these inputs and its outputs are still there."""
        record = self.record(job)
        return record is not None and record["inputs"] == _plain(inputs) and self._outputs_exist(record)

    def _outputs_exist(self, record: dict) -> bool:
        return all((self.path / name).exists() for name in record["outputs"])

    def lock(self, job: str) -> AbstractContextManager[None]:
        """Hold `job`, so that no second command makes it at the same time, over the files of the first.

        Raises:
            FirstTrlError: another process holds it; its pid and host are named.
        """
        return locked(self.path / ".records" / f"{job}.lock", f"{job} of {self.path}")

    def start(self, job: str, inputs: dict) -> bool:
        """Note that `job` begins. True if it continues an interrupted attempt from the same inputs."""
        file = self._file(job, ".started")
        continues = file.is_file() and json.loads(file.read_text(encoding="utf-8")) == _plain(inputs)
        if not continues:
            write_atomically(file, json.dumps(_plain(inputs), indent=1))
        return continues

    def finish(self, job: str, inputs: dict, outputs: list[str], seconds: float) -> None:
        """Record that `job` is done.

        Args:
            outputs: paths relative to the run folder, all of which exist now.
        """
        missing = [name for name in outputs if not (self.path / name).exists()]
        assert not missing, f"{job} ended without writing {missing}"
        record = {
            "identity": uuid.uuid4().hex,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "outputs": outputs,
            "inputs": _plain(inputs),
        }
        write_atomically(self._file(job), json.dumps(record, indent=1))
        self._file(job, ".started").unlink(missing_ok=True)


def _plain(value):
    """`value` as it comes back from JSON, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def stage_command(stage: str) -> Callable:
    """Make `main(recipe, options)` a command `main(argv=None)`, whose failures are one line and exit status 1."""

    def decorate(job: Callable[[Recipe, argparse.Namespace], None]) -> Callable[[list[str] | None], None]:
        @functools.wraps(job)
        def main(argv: list[str] | None = None) -> None:
            recipe, options = parse_stage(stage, argv)
            path = recipe.run_folder / "log.txt"
            title = f"first-trl {stage} {' '.join(sys.argv[1:] if argv is None else argv)}"
            with recording(path, quiet=options.quiet, title=title) as log:
                try:
                    with libraries_into(log):
                        job(recipe, options)
                except (Exception, KeyboardInterrupt) as error:
                    raise SystemExit(failure(error, stage, log)) from None

        return main

    return decorate


def failure(error: BaseException, stage: str, log: RunLog) -> str | int:
    """What the user is told of an error, whose traceback goes to the log; an exit status where they stopped it."""
    log.add_traceback(error)
    if isinstance(error, KeyboardInterrupt):
        return 130
    known = explain(error, stage)
    process = f" in process {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
    text = " ".join(str(error).split())
    told = known or f"{type(error).__name__}{': ' if text else ''}{text[:300]} (unexpected; traceback in {log.path})"
    line = redacted(f"[first-trl] {stage} failed{process}: {told}")
    log.add(line)
    return line

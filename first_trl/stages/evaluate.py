"""Measure every arm and every control on every test set, and write the report.

    accelerate launch -m first_trl.stages.evaluate RECIPE [--key value ...]

Reads the teacher, the students and the test sets; writes `runs/<name>/report/`. The rows are shared out over the
processes of the job. `teacher_recalibrated` and `<arm>_post_hoc` are the same answers after a recalibration. Answers
are kept: where only settings of the report have changed since, they are measured again and no model is run.
"""

import hashlib
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

from first_trl.errors import FirstTrlError
from first_trl.files import file_digest, files_of, read_json, write_atomically
from first_trl.log import Progress
from first_trl.run import LONG, Run, jobs, require, run_job, status, teacher_path
from first_trl.stages.command import stage_command


@stage_command("evaluate")
def main(recipe, options) -> None:
    require(recipe, *jobs(recipe)["evaluate"].needs, full=True)
    run_job(recipe, options, "evaluate", lambda continues: evaluate(recipe), timeout=LONG)


def evaluate(recipe) -> None:
    """Score all arms, add the recalibrated controls and write the report."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from first_trl.data.rows import describe_lost
    from first_trl.evaluation import answer_sets

    state, sets = PartialState(), measured_sets(recipe)
    lost = {name: rows.lost for name, (rows, _) in sets.items()}
    for name in lost:
        if line := describe_lost(name, lost[name]):
            status(f"evaluate: {line}")
    arms = ["teacher", *(["base"] if "model_name_or_path" in recipe.distill else []), *recipe.students]
    record = recipe.run_folder / "report" / "answers" / "made_from.json"
    kept = [state.is_main_process and record.is_file() and read_json(record) == made_from(recipe, record.parent)]
    if broadcast_object_list(kept)[0]:
        status("evaluate: the answers of the same models to the same rows are there, and are measured again")
    else:
        with Progress("evaluate", len(arms), "models") as progress:
            for arm in arms:
                answer_sets(*model_of(recipe, arm), sets, record.parent / arm, recipe)
                progress.update(note=arm)
    if state.is_main_process:
        write_atomically(record, json.dumps(made_from(recipe, record.parent)))
        report(recipe, arms, lost)


def made_from(recipe, folder: Path) -> dict:
    """What answers are made from (all but the report's own settings, as one digest), and the files that hold them."""
    versions = {name: version(name) for name in ("first-trl", "transformers", "torch", "peft")}
    inputs = {"versions": versions} | Run(recipe).inputs("evaluate")
    for name in ("num_bins", "bootstrap", "seed"):
        inputs["settings"]["evaluate"].pop(name)
    files = {name: file_digest(folder / name) for name in files_of(folder) if name.endswith(".parquet")}
    return {"inputs": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(), "files": files}


def model_of(recipe, arm: str) -> tuple[str | Path, dict]:
    """The model of an arm, and the settings that it is loaded with."""
    from first_trl.recipe import teacher_section

    if arm == "teacher":
        return teacher_path(recipe), teacher_section(recipe)
    if arm == "base":
        return recipe.distill["model_name_or_path"], recipe.distill
    return recipe.run_folder / "students" / arm, recipe.arm_section(arm)


def report(recipe, arms: list[str], lost: dict[str, dict]) -> None:
    """Measure what was answered and write the report; `lost` are the rows of each set that were dropped or cut."""
    from first_trl.evaluation import VALIDATION, by_arm, collect, teacher_curves
    from first_trl.redaction import without_local_paths
    from first_trl.report.writing import write_report

    folder, tests = recipe.run_folder / "report", list(recipe.datasets.test)
    calibration = json.loads((recipe.run_folder / "calibration.json").read_text(encoding="utf-8"))
    closing, controls = closing_temperatures(recipe)
    found = collect(folder / "answers", arms, closing | controls, tests, calibration)
    fitted = (f"{name} with {method} {value:.3g}" for name, (method, value) in found.fitted.items())
    status(f"evaluate: measured as fitted on validation: {', '.join(fitted) or 'nothing'}")
    for name, reason in found.omitted.items():
        status(f"evaluate: {name} is left out: {reason}; another calibrate.method serves every row")
    predictions = by_arm(found.predictions)
    validation = {arm: sets.pop(VALIDATION) for arm, sets in predictions.items()}
    logs = {arm: recipe.run_folder / "students" / arm / "trainer_state.json" for arm in recipe.students}
    training = {arm: json.loads(file.read_text(encoding="utf-8"))["log_history"] for arm, file in logs.items()}
    write_report(
        folder,
        predictions,
        calibration,
        provenance={"name": recipe.name, "recipe": without_local_paths(recipe.to_dict())},
        out_of_domain={name for name, config in recipe.datasets.test.items() if config.out_of_domain},
        num_bins=recipe.evaluate.num_bins,
        bootstrap=recipe.evaluate.bootstrap,
        seed=recipe.evaluate.seed,
        validation=validation,
        test_curves=teacher_curves(folder / "answers", tests, calibration),
        omitted=found.omitted,
        outside=found.outside,
        lost=lost,
        closing=closing,
        controls=controls,
        training=training,
    )


def closing_temperatures(recipe) -> tuple[dict[str, float], dict[str, float]]:
    """{student: the closing temperature that it carries}, {student that carries none: one fitted here, a control}."""
    from first_trl.evaluation import VALIDATION, closing_of, read_answers
    from first_trl.student import CLOSING_FILE

    carried, controls = {}, {}
    for student in recipe.students if recipe.task.choices else []:
        file = recipe.run_folder / "students" / student / CLOSING_FILE
        if file.is_file():
            carried[student] = json.loads(file.read_text(encoding="utf-8"))["temperature"]
        else:
            answers = recipe.run_folder / "report" / "answers" / student / f"{VALIDATION}.parquet"
            closing = closing_of(read_answers(answers), f"{student} on {VALIDATION}", recipe.evaluate.seed)
            controls[student] = closing["temperature"]
    return carried, controls


def measured_sets(recipe) -> dict:
    """{validation and every test set: (its `UsableRows`, its task)}, without rows that models were fitted on.

    Raises:
        FirstTrlError: a test set shares prompts with another split, and is neither to drop them nor to keep them.
    """
    from accelerate import PartialState

    from first_trl.data.rows import check_disjoint, load_rows, without_shared
    from first_trl.evaluation import VALIDATION, task_of_set
    from first_trl.modeling import load_tokenizer

    tokenizer, data = load_tokenizer(teacher_path(recipe), recipe.cache.teacher_revision), recipe.datasets
    splits = {VALIDATION: (data.validation, VALIDATION, recipe.task)}
    if not recipe.evaluate.allow_overlap:
        fitted = {"train": data.train, "transfer": data.transfer}
        splits = {role: (c, "train", recipe.task) for role, c in fitted.items() if c is not None} | splits
    tests = {name: (config, "test", task_of_set(recipe.task, config.task)) for name, config in data.test.items()}
    load = partial(load_rows, tokenizer=tokenizer, write=recipe.cache.write_answers)
    with PartialState().main_process_first():
        used = {
            name: load(config, role, task, place=f"datasets.{'test.' * (name in tests)}{name}")
            for name, (config, role, task) in (splits | tests).items()
        }
    found = check_disjoint({name: rows.tokenized for name, rows in used.items()})
    problems = []
    for name in tests if not recipe.evaluate.allow_overlap else ():
        shared = [overlap for overlap in found if overlap.second == name and overlap.first in splits]
        if data.test[name].overlap == "drop" and shared:
            used[name] = without_shared(used[name], {row for overlap in shared for _, row in overlap.rows})
        else:
            problems += [f"{o.count} of {name} are in {o.first}, e.g. row {o.rows[0][1]}" for o in shared]
    if problems:
        raise FirstTrlError(
            f"Test sets share rows with what models were fitted on: {'; '.join(problems)}. Remove them from the test "
            "set, set datasets.test.*.overlap: drop, or evaluate.allow_overlap: true if that is meant."
        )
    return {name: (used[name], task) for name, (_, _, task) in ({VALIDATION: splits[VALIDATION]} | tests).items()}


if __name__ == "__main__":
    main()

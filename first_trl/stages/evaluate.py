"""Measure every arm and every control on every test set, and write the report.

    accelerate launch -m first_trl.stages.evaluate RECIPE [--key value ...]

Reads the teacher, the students and the test sets; writes `runs/<name>/report/`. The rows are shared out over the
processes of the job. `teacher_recalibrated` and `<arm>_post_hoc` are the same answers after a recalibration.
"""

import json

from first_trl.run import LONG, jobs, require, run_job, status, teacher_path
from first_trl.stages.command import stage_command


@stage_command("evaluate")
def main(recipe, options) -> None:
    require(recipe, *jobs(recipe)["evaluate"].needs, full=True)
    run_job(recipe, options, "evaluate", lambda continues: evaluate(recipe), timeout=LONG)


def evaluate(recipe) -> None:
    """Score all arms, add the recalibrated controls and write the report."""
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process and not recipe.evaluate.allow_overlap:
        refuse_overlap(recipe)
    arms = ["teacher", *(["base"] if "model_name_or_path" in recipe.distill else []), *recipe.students]
    for arm in arms:
        answer_all_sets(recipe, arm)
    if state.is_main_process:
        report(recipe, arms)


def report(recipe, arms: list[str]) -> None:
    """Measure what was answered and write the report."""
    from first_trl.evaluation import VALIDATION, by_arm, collect, teacher_curves
    from first_trl.report.writing import write_report

    folder, tests = recipe.run_folder / "report", list(recipe.datasets.test)
    calibration = json.loads((recipe.run_folder / "calibration.json").read_text(encoding="utf-8"))
    found = collect(folder / "answers", arms, closing_temperatures(recipe), tests, calibration)
    for name, (method, value) in found.fitted.items():
        status(f"evaluate: {name} is measured with {method} {value:.3g}, fitted on validation")
    for name, reason in found.omitted.items():
        status(f"evaluate: {name} is left out: {reason}; another calibrate.method serves every row")
    predictions = by_arm(found.predictions)
    validation = {arm: sets.pop(VALIDATION) for arm, sets in predictions.items()}
    write_report(
        folder,
        predictions,
        calibration,
        provenance={"recipe": recipe.to_dict()},
        out_of_domain={name for name, config in recipe.datasets.test.items() if config.out_of_domain},
        num_bins=recipe.evaluate.num_bins,
        bootstrap=recipe.evaluate.bootstrap,
        seed=recipe.evaluate.seed,
        validation=validation,
        test_curves=teacher_curves(folder / "answers", tests, calibration),
        omitted=found.omitted,
        training={arm: training_log(recipe, arm) for arm in recipe.students},
    )


def closing_temperatures(recipe) -> dict[str, float]:
    """{student: its closing temperature}: the one that it carries, or one fitted here where it carries none."""
    from first_trl.evaluation import VALIDATION, closing_of, read_answers
    from first_trl.student import CLOSING_FILE

    temperatures = {}
    for student in recipe.students if recipe.task.choices else []:
        file = recipe.run_folder / "students" / student / CLOSING_FILE
        if file.is_file():
            closing = json.loads(file.read_text(encoding="utf-8"))
        else:
            answers = recipe.run_folder / "report" / "answers" / student / f"{VALIDATION}.parquet"
            closing = closing_of(read_answers(answers), f"{student} on {VALIDATION}", recipe.evaluate.seed)
        temperatures[student] = closing["temperature"]
    return temperatures


def refuse_overlap(recipe) -> None:
    """Refuse test rows that a model was trained or a recalibration fitted on: their figures would flatter.

    Raises:
        ValueError: a test set shares prompts with another split; the message counts them.
    """

    from first_trl.data.choices import with_placeholder_answers
    from first_trl.data.loading import load_split
    from first_trl.data.rows import check_disjoint, tokenize_dataset
    from first_trl.evaluation import test_task
    from first_trl.modeling import load_tokenizer

    tokenizer = load_tokenizer(teacher_path(recipe), recipe.cache.teacher_revision)
    data = recipe.datasets
    learnt = {"train": data.train, "transfer": data.transfer, "validation": data.validation}
    splits = {role: (config, role, recipe.task) for role, config in learnt.items() if config is not None}
    splits |= {name: (config, "test", test_task(recipe.task, config.task)) for name, config in data.test.items()}
    tokenized = {
        name: tokenize_dataset(
            with_placeholder_answers(load_split(config, role), task)
            if role == "transfer"
            else load_split(config, role),
            task,
            tokenizer,
            place=f"datasets.{'test.' * (role == 'test')}{name}",
        )
        for name, (config, role, task) in splits.items()
    }
    shared = [found for found in check_disjoint(tokenized) if found.first in learnt and found.second in data.test]
    if shared:
        raise ValueError(
            "Test sets share rows with what models were fitted on: "
            + "; ".join(
                f"{found.count} of {found.second} are in {found.first}, e.g. row {found.rows[0][1]}"
                for found in shared
            )
            + ". Remove them from the test set, or set evaluate.allow_overlap: true if that is meant."
        )


def answer_all_sets(recipe, arm: str) -> None:
    """One model's answers to validation and to every test set, in `report/answers/<arm>/`."""
    from first_trl.evaluation import answer_sets, test_task
    from first_trl.training import teacher_section

    if arm == "teacher":
        path, section = teacher_path(recipe), teacher_section(recipe)
    elif arm == "base":
        path, section = recipe.distill["model_name_or_path"], recipe.distill
    else:
        path, section = recipe.run_folder / "students" / arm, recipe.arm_section(arm)
    sets = {"validation": (recipe.datasets.validation, "validation", recipe.task)}
    for name, config in recipe.datasets.test.items():
        sets[name] = config, "test", test_task(recipe.task, config.task)
    answer_sets(path, section, sets, recipe.run_folder / "report" / "answers" / arm, recipe)
    status(f"evaluate: {arm} answered {', '.join(sets)}")


def training_log(recipe, arm: str) -> list[dict]:
    """What the trainer of a student logged, step by step."""
    file = recipe.run_folder / "students" / arm / "trainer_state.json"
    return json.loads(file.read_text(encoding="utf-8"))["log_history"]


if __name__ == "__main__":
    main()

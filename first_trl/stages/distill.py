"""Train the students: each arm of the recipe, in a folder of its own.

    accelerate launch -m first_trl.stages.distill RECIPE [--arm NAME] [--key value ...]

Reads `runs/<name>/cache/train` and `calibration.json`; writes `runs/<name>/students/<arm>/`, or, where the recipe has
several `seeds`, `students/<arm>/seed-<n>/`: the weights, and what it takes to predict with them. An arm with
`trainer: sft` is the control: TRL's SFTTrainer on the labels of `datasets.train`, the teacher unused.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from first_trl.constants import PREDICT_FILE
from first_trl.errors import FirstTrlError
from first_trl.files import new_folder, write_atomically
from first_trl.log import status
from first_trl.recipe import arm_of, teacher_section
from first_trl.run import jobs, needs_calibration, recalibration_of, require, run_job, teacher_path
from first_trl.stages.command import stage_command

SECOND_RATE = 0.3  # of the learning rate, in a second round: what validation chose for students that learn sentiment


@stage_command("distill")
def main(recipe, options) -> None:
    caches = cache(partial(open_for_students, recipe))  # once for all students
    for student in recipe.students:
        if options.arm in (None, student, arm_of(student)):
            require(recipe, *jobs(recipe)[f"distill.{student}"].needs)
            run_job(recipe, options, f"distill.{student}", partial(make_student, recipe, student, caches))


def make_student(recipe, student: str, caches: Callable, continues: bool) -> None:
    """Train one student, an arm or one of its seeds; then one pass over validation for what it carries to predict."""
    from accelerate import PartialState

    from first_trl.training import label_trainer, train_and_save

    folder, title = new_folder(recipe.run_folder / "students" / student), f"distill.{student}"
    if recipe.arm_trainer(student) == "sft":
        section, seed = recipe.arm_section(student), recipe.seed_of(student)
        train_and_save(partial(label_trainer, recipe, section, folder, seed), folder, continues, title)
        return close_student(recipe, student, folder)
    first = folder / "round-1" if recipe.has_second_round(student) else None
    if first is not None:
        train_and_save(partial(cache_trainer, recipe, student, first, caches), first, continues, f"{title}, round 1")
        close_student(recipe, student, first)
        PartialState().wait_for_everyone()  # the others read its closing temperature
    train_and_save(partial(cache_trainer, recipe, student, folder, caches, first), folder, continues, title)
    close_student(recipe, student, folder, first)
    if first is not None and PartialState().is_main_process:
        shutil.rmtree(first)


def open_for_students(recipe, role: str):
    """The teacher's cache of a split, verified by the main process alone."""
    from accelerate import PartialState

    from first_trl.cache.identity import open_recipe_cache

    is_main = PartialState().is_main_process
    return open_recipe_cache(recipe, role, teacher_path(recipe), teacher_section(recipe), verify=is_main)


def cache_arguments(recipe, student: str, folder: Path, first: Path | None = None):
    """(FIRSTConfig, ModelConfig) of a student, the teacher recalibrated as its arm says.

    Of a second round, where `first` holds the student of the first: its closing temperature multiplies that of the
    targets, which were that much too sharp or too soft for it.
    """
    from first_trl.first_config import FIRSTConfig
    from first_trl.student import CLOSING_FILE
    from first_trl.training import second_round_steps, training_arguments

    method, value = recalibration_of(recipe, student)
    section = recipe.arm_section(student) | {"recalibration_method": method, "recalibration_value": value}
    if needs_calibration(recipe, student):
        section["calibration"] = str(recipe.run_folder / "calibration.json")
        section["recalibration_method"] = None if method == "auto" else method
    args, model_args = training_arguments(section, FIRSTConfig, folder, recipe.seed_of(student))
    if first is not None:
        closing = json.loads((first / CLOSING_FILE).read_text(encoding="utf-8"))
        found = closing if closing["scope"] == "choices" else closing["vocabulary"]
        if found is None:
            raise FirstTrlError("distill.rounds: 2: logits with a bias or a cap have no closing temperature; write 1")
        args.recalibration_method = "temperature"
        args.recalibration_value = (args.recalibration_value or 1.0) * found["temperature"]
        args.max_steps, args.learning_rate = second_round_steps(steps_of(first)), SECOND_RATE * args.learning_rate
        if not model_args.use_peft:
            model_args.model_name_or_path = str(first)
    return args, model_args


def steps_of(folder: Path) -> int:
    """The steps that a finished student was trained for."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def cache_trainer(recipe, student: str, folder: Path, caches: Callable, first: Path | None = None):
    """The trainer of a student on the teacher's cache; of its second round, where `first` holds the first."""
    from peft import PeftModel

    from first_trl.modeling import load_tokenizer
    from first_trl.trainer import FIRSTTrainer
    from first_trl.training import model_arguments, roles

    args, model_args = cache_arguments(recipe, student, folder, first)
    student_model = model_arguments(args, model_args)
    if first is not None and model_args.use_peft:
        model = PeftModel.from_pretrained(student_model["model"], str(first), is_trainable=True)
        student_model = {"model": model}
    splits = {role: caches(role) for role in roles(args)}
    return FIRSTTrainer(
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=load_tokenizer(model_args.model_name_or_path, model_args.model_revision),
        **student_model,
    )


def close_student(recipe, student: str, folder: Path, first: Path | None = None) -> None:
    """One pass of a trained student over validation: its closing temperature and its thresholds, beside its weights.

    Writes `calibration.json` (unless `distill.closing` is false) and `predict.json` into the student's `folder`. Where
    `first` holds the student of a first round, "rounds" has what the targets of both were recalibrated by.
    """
    from accelerate import PartialState

    from first_trl.data.rows import load_rows
    from first_trl.evaluation import (
        VALIDATION,
        answer_sets,
        closing_of,
        predictions,
        read_answers,
        shipped_answers,
        vocabulary_closing,
    )
    from first_trl.modeling import load_tokenizer
    from first_trl.student import CLOSING_FILE, describe_student

    section, place = recipe.arm_section(student), f"{student} on {VALIDATION}"
    with PartialState().main_process_first():
        rows = load_rows(recipe.datasets.validation, VALIDATION, recipe.task, load_tokenizer(folder))
    answer_sets(folder, section, {VALIDATION: (rows, recipe.task)}, folder, recipe)
    if not PartialState().is_main_process:
        return
    file = folder / f"{VALIDATION}.parquet"
    answers, temperature = read_answers(file), 1.0
    file.unlink()
    if recipe.distill.get("closing", True):
        closing: dict = {"schema_version": 1, "scope": "vocabulary"}
        if "choice_log_probs" in answers:
            closing = closing_of(answers, place, recipe.evaluate.seed)
            temperature, (low, high) = closing["temperature"], closing["interval"]
            answers = shipped_answers(answers, temperature)
            status(
                f"distill.{student}: closing temperature {temperature:.3g} (fitted {closing['fitted']:.3g}, 95 % "
                f"interval {low:.3g} to {high:.3g}: {closing['why']}); ECE on validation "
                f"{100 * closing['ece_before']:.1f} % as trained, {100 * closing['ece_after']:.1f} % as shipped"
            )
        closing["vocabulary"] = vocabulary_closing(folder, section, rows.rows, recipe)
        if "choice_log_probs" not in answers and closing["vocabulary"]:  # of the whole vocabulary, as free text is
            temperature = closing["vocabulary"]["temperature"]
        if first is not None:
            both = {first: None, folder: first}
            closing["rounds"] = [
                {"value": cache_arguments(recipe, student, own, before)[0].recalibration_value, "steps": steps_of(own)}
                for own, before in both.items()
            ]
        write_atomically(folder / CLOSING_FILE, json.dumps(closing, indent=1))
    content = describe_student(student, recipe.task, section, predictions(answers, place), temperature)
    write_atomically(folder / PREDICT_FILE, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

"""Train the students: each arm of the recipe, in a folder of its own.

    accelerate launch -m first_trl.stages.distill RECIPE [--arm NAME] [--key value ...]

Reads `runs/<name>/cache/train` and `calibration.json`; writes `runs/<name>/students/<arm>/`, or, where the recipe has
several `seeds`, `students/<arm>/seed-<n>/`: the weights, and what it takes to predict with them. An arm with
`trainer: sft` is the control: TRL's SFTTrainer on the labels of `datasets.train`, the teacher unused.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from first_trl.constants import PREDICT_FILE
from first_trl.files import new_folder, write_atomically
from first_trl.log import status
from first_trl.recipe import arm_of
from first_trl.run import jobs, needs_calibration, recalibration_of, require, run_job, teacher_path
from first_trl.stages.command import stage_command


@stage_command("distill")
def main(recipe, options) -> None:
    caches = cache(partial(open_for_students, recipe))  # once for all students
    for arm in recipe.students:
        if options.arm in (None, arm, arm_of(arm)):
            require(recipe, *jobs(recipe)[f"distill.{arm}"].needs)
            run_job(recipe, options, f"distill.{arm}", partial(make_student, recipe, arm, caches))


def make_student(recipe, arm: str, caches: Callable, continues: bool) -> None:
    """Train one student, then one pass over validation for its closing temperature and thresholds."""
    from accelerate import PartialState

    from first_trl.checkpoints import remove_checkpoints

    folder = new_folder(recipe.run_folder / "students" / arm)
    if not (continues and (folder / "trainer_state.json").is_file()):  # written when training has ended
        train_arm(recipe, arm, caches, continues)
    elif PartialState().is_main_process:  # it was interrupted before they were removed
        remove_checkpoints(folder)
    close_student(recipe, arm, folder)


def open_for_students(recipe, role: str):
    """The teacher's cache of a split, verified by the main process alone."""
    from accelerate import PartialState

    from first_trl.cache.identity import open_recipe_cache
    from first_trl.recipe import teacher_section

    is_main = PartialState().is_main_process
    return open_recipe_cache(recipe, role, teacher_path(recipe), teacher_section(recipe), verify=is_main)


def train_arm(recipe, arm: str, caches: Callable, continues: bool) -> None:
    """Train one student, of an arm or of one of its seeds."""
    from trl import SFTTrainer

    from first_trl.first_config import FIRSTConfig
    from first_trl.modeling import adapters_to_float32, load_tokenizer
    from first_trl.trainer import FIRSTTrainer
    from first_trl.training import (
        label_arguments,
        model_arguments,
        tokenized_splits,
        train_and_save,
        training_arguments,
    )

    folder = new_folder(recipe.run_folder / "students" / arm)
    on_labels = recipe.arm_trainer(arm) == "sft"
    section, seed = recipe.arm_section(arm), recipe.seed_of(arm)
    if on_labels:
        args, model_args = label_arguments(recipe, section, folder, seed)
    else:
        method, value = recalibration_of(recipe, arm)
        if needs_calibration(recipe, arm):
            calibration = json.loads((recipe.run_folder / "calibration.json").read_text(encoding="utf-8"))
            method = calibration["method"] if method == "auto" else method
            value = calibration["families"][method]["value"]
        section = {**section, "recalibration_method": method, "recalibration_value": value}
        args, model_args = training_arguments(section, FIRSTConfig, folder, seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    roles = ("train", "validation") if args.eval_strategy != "no" else ("train",)
    if on_labels:
        splits = tokenized_splits(recipe, roles, tokenizer)
    else:
        splits = {role: caches(role) for role in roles}
    trainer = (SFTTrainer if on_labels else FIRSTTrainer)(
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        **model_arguments(args, model_args),
    )
    if on_labels and not (args.bf16 or args.fp16):
        adapters_to_float32(trainer.model)  # as FIRSTTrainer does: the arms differ in their targets alone
    train_and_save(trainer, folder, continues, f"distill.{arm}")


def close_student(recipe, student: str, folder: Path) -> None:
    """One pass of a trained student over validation: its closing temperature and its thresholds, beside its weights.

    Writes `calibration.json` (unless `distill.closing` is false) and `predict.json` into the student's `folder`.
    """
    from accelerate import PartialState

    from first_trl.data.rows import load_rows
    from first_trl.evaluation import VALIDATION, answer_sets, closing_of, predictions, read_answers, shipped_answers
    from first_trl.modeling import load_tokenizer
    from first_trl.student import CLOSING_FILE, describe_student

    section = recipe.arm_section(student)
    tokenizer = load_tokenizer(folder, None)
    with PartialState().main_process_first():
        rows = load_rows(recipe.datasets.validation, VALIDATION, recipe.task, tokenizer)
    sets = {VALIDATION: (rows, recipe.task)}
    answer_sets(folder, section, sets, folder, recipe)
    if not PartialState().is_main_process:
        return
    answers, closing = read_answers(folder / f"{VALIDATION}.parquet"), None
    (folder / f"{VALIDATION}.parquet").unlink()
    if "choice_log_probs" in answers and recipe.distill.get("closing", True):
        closing = closing_of(answers, f"{student} on {VALIDATION}", recipe.evaluate.seed)
        write_atomically(folder / CLOSING_FILE, json.dumps(closing, indent=1))
        low, high = closing["interval"]
        before, after = (f"{100 * closing[name]:.1f} %" for name in ("ece_before", "ece_after"))
        status(
            f"distill.{student}: closing temperature {closing['temperature']:.3g} (fitted {closing['fitted']:.3g}, "
            f"95 % interval {low:.3g} to {high:.3g}: {closing['why']}); ECE on validation {before} as trained, "
            f"{after} as shipped"
        )
    temperature = closing["temperature"] if closing else 1.0
    shipped = predictions(shipped_answers(answers, temperature) if closing else answers, f"{student} on {VALIDATION}")
    content = describe_student(student, recipe.task, section, shipped, temperature)
    write_atomically(folder / PREDICT_FILE, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

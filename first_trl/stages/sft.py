"""Fine-tune the teacher on the labels, with TRL's SFTTrainer.

    accelerate launch -m first_trl.stages.sft RECIPE [--key value ...]

Reads the recipe's `task`, `datasets.train` and `sft`; writes `runs/<name>/teacher/`, an adapter or a whole model. With
`sft.cross_fit: J` it writes J of them, `teacher/fold-0` to `teacher/fold-<J-1>`, each trained on all rows but a fold.
"""

from pathlib import Path

from first_trl.run import run_job, stage_command, teacher_folders


@stage_command("sft")
def main(recipe, options) -> None:
    if recipe.cache.teacher is not None:
        raise ValueError(f"cache.teacher gives a teacher ({recipe.cache.teacher}); run `first-trl cache` instead.")
    run_job(recipe, "sft", lambda continues: fine_tune_all(recipe, continues))


def fine_tune_all(recipe, continues: bool) -> list[str]:
    """Train the teacher, or one for each fold, except those that an interrupted attempt finished."""
    from accelerate import PartialState

    from first_trl.training import clear_unfinished

    if PartialState().is_main_process:
        clear_unfinished(recipe.run_folder / "teacher", continues)
    PartialState().wait_for_everyone()
    for fold, folder in enumerate(map(Path, teacher_folders(recipe))):
        if not (recipe.cross_fit and (folder / "trainer_state.json").is_file()):  # written when all else is
            fine_tune(recipe, folder, continues, fold)
    return ["teacher"]


def fine_tune(recipe, folder: Path, continues: bool, fold: int) -> None:
    """Train one teacher on the labels, of all rows or of those outside its fold."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    from first_trl.data.folds import rows_outside
    from first_trl.modeling import adapters_to_float32
    from first_trl.training import label_arguments, model_arguments, tokenized_splits, train_and_save

    args, model_args = label_arguments(recipe, recipe.sft, folder, recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    splits = tokenized_splits(recipe, ("train", "validation") if args.eval_strategy != "no" else ("train",), tokenizer)
    if recipe.cross_fit:
        outside = rows_outside(splits["train"], fold, recipe.cross_fit, recipe.seed)
        splits["train"] = splits["train"].select(outside)
    trainer = SFTTrainer(
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        **model_arguments(model_args),
    )
    if not (args.bf16 or args.fp16):
        adapters_to_float32(trainer.model)
    train_and_save(trainer, folder, continues)


if __name__ == "__main__":
    main()

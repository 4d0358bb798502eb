"""Fine-tune the teacher on the labels, with TRL's SFTTrainer.

    accelerate launch -m first_trl.stages.sft RECIPE [--key value ...]

Reads the recipe's `task`, `datasets.train` and `sft`; writes `runs/<name>/teacher/`, an adapter or a whole model.
"""

from first_trl.errors import FirstTrlError
from first_trl.files import new_folder
from first_trl.run import run_job
from first_trl.stages.command import stage_command


@stage_command("sft")
def main(recipe, options) -> None:
    if recipe.cache.teacher is not None:
        raise FirstTrlError(f"cache.teacher gives a teacher ({recipe.cache.teacher}); run `first-trl cache` instead.")
    run_job(recipe, options, "sft", lambda continues: fine_tune(recipe, continues))


def fine_tune(recipe, continues: bool) -> None:
    """Train the teacher on the labels."""
    from trl import SFTTrainer

    from first_trl.modeling import adapters_to_float32, check_head, load_tokenizer
    from first_trl.training import label_arguments, model_arguments, tokenized_splits, train_and_save

    folder = new_folder(recipe.run_folder / "teacher")
    args, model_args = label_arguments(recipe, recipe.sft, folder, recipe.seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    splits = tokenized_splits(recipe, ("train", "validation") if args.eval_strategy != "no" else ("train",), tokenizer)
    trainer = SFTTrainer(
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        **model_arguments(args, model_args),
    )
    check_head(trainer.model, fused=True)
    if not (args.bf16 or args.fp16):
        adapters_to_float32(trainer.model)
    train_and_save(trainer, folder, continues, "sft")


if __name__ == "__main__":
    main()

"""Fine-tune the teacher on the labels, with TRL's SFTTrainer.

    accelerate launch -m first_trl.stages.sft RECIPE [--key value ...]

Reads the recipe's `task`, `datasets.train` and `sft`; writes `runs/<name>/teacher/`, an adapter or a whole model.
"""

from functools import partial

from first_trl.errors import FirstTrlError
from first_trl.files import new_folder
from first_trl.run import run_job
from first_trl.stages.command import stage_command


@stage_command("sft")
def main(recipe, options) -> None:
    if recipe.cache.teacher is not None:
        raise FirstTrlError(f"cache.teacher gives a teacher ({recipe.cache.teacher}); run `first-trl cache` instead.")
    run_job(recipe, options, "sft", partial(fine_tune, recipe))


def fine_tune(recipe, continues: bool) -> None:
    """Train the teacher on the labels."""
    from first_trl.training import label_trainer, train_and_save

    folder = new_folder(recipe.run_folder / "teacher")
    train_and_save(partial(label_trainer, recipe, recipe.sft, folder, recipe.seed), folder, continues, "sft")


if __name__ == "__main__":
    main()

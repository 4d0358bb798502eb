"""Upload a student's adapter, with its card and its measurements, to the Hugging Face Hub.

    accelerate launch -m first_trl.stages.push RECIPE [--dry_run] [--key value ...]

Reads `runs/<name>/students/<arm>` and `report/`; writes `runs/<name>/push/`, exactly what is uploaded.
"""

from first_trl.run import recorded_recipe, require, status
from first_trl.stages.command import stage_command


@stage_command("push")
def main(recipe, options) -> None:
    require(recipe, *(f"distill.{student}" for student in recipe.students_of(recipe.push.arm)), "evaluate", full=True)
    from accelerate import PartialState

    if PartialState().is_main_process:
        push(recorded_recipe(recipe), options.dry_run)


def push(recipe, dry_run: bool) -> None:
    """Prepare the folder and upload it, unless this is a rehearsal."""
    from first_trl.hub.card import prepare_upload_folder, push_folder

    settings = recipe.push
    if settings.hub_model_id is None and not dry_run:
        raise ValueError("push.hub_model_id is missing; set it to 'your-name/your-model', or rehearse with --dry_run.")
    folder = prepare_upload_folder(recipe.run_folder, settings.arm, recipe, recipe.run_folder / "push")
    next_step = "; next: the same command without --dry_run" * dry_run
    status(f"push: wrote {folder}, exactly what is uploaded{next_step}")
    if not dry_run:
        url = push_folder(
            folder,
            settings.hub_model_id,
            private=settings.private,
            revision=settings.revision,
            create_pr=settings.create_pr,
            commit_message=settings.commit_message,
        )
        status(f"push: uploaded to {url}")


if __name__ == "__main__":
    main()

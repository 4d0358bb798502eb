"""Upload a student's adapter, with its card and its measurements, to the Hugging Face Hub.

    accelerate launch -m first_trl.stages.push RECIPE [--dry_run] [--key value ...]

Reads `runs/<name>/students/<arm>` and `report/`; writes `runs/<name>/push/`, exactly what is uploaded.
"""

import json

from first_trl.errors import FirstTrlError
from first_trl.run import recorded_recipe, require, status
from first_trl.stages.command import stage_command


@stage_command("push")
def main(recipe, options) -> None:
    students = recipe.students if recipe.push.arm == "best" else recipe.students_of(recipe.push.arm)
    require(recipe, *(f"distill.{student}" for student in students), "evaluate", full=True)
    from accelerate import PartialState

    if PartialState().is_main_process:
        push(recorded_recipe(recipe), options.dry_run)


def push(recipe, dry_run: bool) -> None:
    """Prepare the folder and upload it, unless this is a rehearsal."""
    from first_trl.hub.card import check_license, collect_facts, prepare_upload_folder
    from first_trl.hub.upload import push_folder

    settings = recipe.push
    if settings.hub_model_id is None and not dry_run:
        raise FirstTrlError("push.hub_model_id is missing; set it to 'your-name/your-model', or try --dry_run.")
    arm = chosen_arm(recipe)
    folder = prepare_upload_folder(recipe.run_folder, arm, recipe, recipe.run_folder / "push")
    try:
        check_license(collect_facts(recipe.run_folder, arm, recipe, {}))
    except FirstTrlError as error:
        if not dry_run:
            raise
        status(f"push: WARNING: {error}")
    next_step = "; next: the same command without --dry_run" * dry_run
    if settings.hub_model_id is None:
        next_step += ", with push.hub_model_id set"
    status(f"push: wrote {folder}, exactly what is uploaded{next_step}")
    if not dry_run:
        options = {"private": settings.private, "revision": settings.revision, "create_pr": settings.create_pr}
        url = push_folder(folder, settings.hub_model_id, **options, commit_message=settings.commit_message)
        status(f"push: uploaded to {url}")


def chosen_arm(recipe) -> str:
    """`push.arm`; with `best` the student of the lowest NLL on validation, as shipped, which the report names."""
    if recipe.push.arm != "best":
        return recipe.push.arm
    file = recipe.run_folder / "report" / "metrics.json"
    best = json.loads(file.read_text(encoding="utf-8"))["selection"]["best"]
    if best is None:
        raise FirstTrlError(f"push.arm: best needs the validation NLL of a student, and {file} has none; name an arm.")
    status(f"push.arm: best is {best}, which has the lowest NLL on validation")
    return best


if __name__ == "__main__":
    main()

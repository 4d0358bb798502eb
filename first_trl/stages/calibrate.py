"""Find the recalibration that makes the teacher's confidence true on the validation cache.

    accelerate launch -m first_trl.stages.calibrate RECIPE [--key value ...]

Reads `runs/<name>/cache/validation`, no model and no GPU; writes `runs/<name>/calibration.json` with the value, the
whole search curve and the errors before and after, for every family that an arm of the recipe asks for.
"""

import json

from first_trl.pipeline import cached_roles, calibration_methods, require, run_work, say, teacher_path
from first_trl.stage_command import stage_command


@stage_command("calibrate")
def main(recipe, options) -> None:
    require(recipe, "cache")
    run_work(recipe, "calibrate", lambda continues: calibrate(recipe))


def calibrate(recipe) -> list[str]:
    """Search every family on the validation cache; returns what was written."""
    from first_trl.cache_identity import open_recipe_cache
    from first_trl.calibration import search
    from first_trl.rows import calibration_rows
    from first_trl.run_folder import write_atomically
    from first_trl.training import teacher_section

    settings = recipe.calibrate
    rows = {}
    for role in cached_roles(recipe):
        cache = open_recipe_cache(recipe, role, teacher_path(recipe), teacher_section(recipe))
        left_out = None if settings.include_eos else cache.manifest["eos_token_id"]
        rows[role] = calibration_rows(cache.dataset, settings.positions, left_out)
    log_probs, target, tail_sums = rows["validation"]
    families = {}
    for method in calibration_methods(recipe):
        result = search(
            log_probs,
            target,
            method=method,
            criterion=settings.criterion,
            num_bins=settings.num_bins,
            bootstrap=settings.bootstrap,
            seed=settings.seed,
            tail_power_knots=cache.manifest.get("tail_powers"),
            tail_power_log_sums=tail_sums,
        )
        families[method] = result.to_dict()
        say(f"calibrate: {search_line(result)}")
    teacher = {"validation": rows["validation"].summary()}
    if "train" in rows:
        seen, unseen = rows["train"].summary(), teacher["validation"]
        teacher = {"cached_rows": seen, **teacher}
        say(
            f"calibrate: on the rows it labels the teacher is {100 * seen['accuracy']:.1f} % right at confidence "
            f"{seen['confidence']:.2f}, on validation {100 * unseen['accuracy']:.1f} % at {unseen['confidence']:.2f}"
        )
    calibration = {
        "schema_version": 1,
        "method": settings.method,
        "value": families[settings.method]["value"],
        "criterion": settings.criterion,
        "positions": settings.positions,
        "num_bins": settings.num_bins,
        "num_positions": len(target),
        "teacher": teacher,
        "families": families,
    }
    write_atomically(recipe.run_folder / "calibration.json", json.dumps(calibration, indent=1))
    return ["calibration.json"]


def search_line(result) -> str:
    """What a search found, in a line."""
    before, positions = f"{100 * result.ece_before:.1f} %", f"{result.num_positions} validation positions"
    if result.value is None:
        return f"{result.method} leaves the teacher's ECE on {positions} at {before}"
    after = f"{100 * result.ece_after:.1f} %"
    return f"{result.method} {result.value:.3g} takes the teacher's ECE on {positions} from {before} to {after}"


if __name__ == "__main__":
    main()

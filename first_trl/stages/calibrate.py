"""Find the recalibration that makes the teacher's confidence true on the validation cache.

    accelerate launch -m first_trl.stages.calibrate RECIPE [--key value ...]

Reads `runs/<name>/cache/validation`, no model and no GPU; writes `runs/<name>/calibration.json` with the value, the
whole search curve and the errors before and after, for every family that an arm of the recipe asks for.
"""

import json

from first_trl.run import (
    AUTO_FAMILIES,
    cached_roles,
    calibration_methods,
    positions_of,
    require,
    run_job,
    status,
    teacher_path,
)
from first_trl.stages.command import stage_command


@stage_command("calibrate")
def main(recipe, options) -> None:
    require(recipe, "cache")
    run_job(recipe, options, "calibrate", lambda continues: calibrate(recipe))


def calibrate(recipe) -> None:
    """Search every family on the validation cache."""
    from first_trl.calibration import choose_family, search
    from first_trl.files import write_atomically

    settings = recipe.calibrate
    rows, max_smoothing, teacher = read_caches(recipe)
    data, judged_by = (rows.log_probs, rows.target), (settings.criterion, settings.num_bins)
    method, choice, families, warnings = settings.method, {}, {}, []
    if method == "auto":
        chosen = choose_family(*data, AUTO_FAMILIES, *judged_by, settings.seed)
        method, choice = chosen.method, {"choice": chosen.to_dict()}
        status(f"calibrate: auto chooses {method}: {chosen.why}")
    drawn = {"bootstrap": settings.bootstrap, "seed": settings.seed, "examples": rows.examples}
    for family in calibration_methods(recipe):
        result = search(*data, family, *judged_by, **drawn, max_smoothing=max_smoothing)
        families[family] = result.to_dict()
        status(f"calibrate: {search_line(result)}")
        warnings += result.warnings()
    for warning in dict.fromkeys(warnings):
        status(f"calibrate: WARNING: {warning}")
    calibration = {
        "schema_version": 1,
        "method": method,
        "value": families[method]["value"],
        **choice,
        "criterion": settings.criterion,
        "positions": positions_of(recipe),
        "num_bins": settings.num_bins,
        "num_positions": len(rows.target),
        "teacher": teacher,
        "families": families,
        **({"warnings": list(dict.fromkeys(warnings))} if warnings else {}),
    }
    write_atomically(recipe.run_folder / "calibration.json", json.dumps(calibration, indent=1))


def read_caches(recipe) -> tuple:
    """(rows of validation, the most smoothing that every row allows, the teacher on each cache).

    The rows to learn from are looked through in blocks, and are never in memory together.
    """
    import torch
    from accelerate import PartialState

    from first_trl.cache.arrays import calibration_rows, row_blocks, summary
    from first_trl.cache.identity import open_recipe_cache
    from first_trl.calibration import largest_smoothing
    from first_trl.data.choices import refuse_forced
    from first_trl.modeling import load_tokenizer
    from first_trl.recipe import teacher_section

    teacher, max_smoothing, positions, path = {}, 1.0, positions_of(recipe), teacher_path(recipe)
    for role in cached_roles(recipe):
        is_main = PartialState().is_main_process
        cache = open_recipe_cache(recipe, role, path, teacher_section(recipe), verify=is_main)
        forced = cache.manifest.get("forced")
        if "label_smoothing" in calibration_methods(recipe):  # its value must fit every row that a loss is computed on
            blocks = row_blocks(cache.dataset, "all")
            allowed = (largest_smoothing(torch.from_numpy(block.log_probs)) for block in blocks)
            max_smoothing = min(max_smoothing, *allowed)
        if role == "train":
            labelled = cache.manifest.get("labels") != "teacher"
            teacher["cached_rows"] = summary(row_blocks(cache.dataset, positions, forced), labelled)
            continue
        rows = calibration_rows(cache.dataset, positions, forced)
        if positions == "answer":
            refuse_forced(recipe.task, load_tokenizer(path, recipe.cache.teacher_revision), rows.label_ids)
        teacher["validation"] = summary([rows])
    if "cached_rows" in teacher:
        report_gap(teacher["cached_rows"], teacher["validation"])
    return rows, max_smoothing, teacher


def report_gap(cached: dict, validation: dict) -> None:
    """Say how the teacher is on the rows that it labels, and on those that it never saw."""
    from first_trl.cache.arrays import is_memorised

    seen, unseen = (
        ("" if found["accuracy"] is None else f"{100 * found['accuracy']:.1f} % right ")
        + f"at confidence {found['confidence']:.2f}"
        for found in (cached, validation)
    )
    status(f"calibrate: on the rows it labels the teacher is {seen}, on validation {unseen}")
    if is_memorised(cached, validation):
        status(
            "calibrate: WARNING: the teacher has memorised the rows that it labels, so that no value fitted on "
            "validation is true for them; give datasets.transfer other rows, which need no labels"
        )


def search_line(result) -> str:
    """What a search found, in a line."""
    before, positions = f"{100 * result.ece_before:.1f} %", f"{result.num_positions} validation positions"
    if result.value is None:
        return f"{result.method} leaves the teacher's ECE on {positions} at {before}"
    interval = " (95 % interval {:.3g} to {:.3g})".format(*result.interval) if result.interval else ""
    change = f"takes the teacher's ECE on {positions} from {before} to {100 * result.ece_after:.1f} %"
    return f"{result.method} {result.value:.3g}{interval} {change}"


if __name__ == "__main__":
    main()

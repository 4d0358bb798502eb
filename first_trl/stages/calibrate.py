"""Find the recalibration that makes the teacher's confidence true on the validation cache.

    accelerate launch -m first_trl.stages.calibrate RECIPE [--key value ...]

Reads `runs/<name>/cache/validation`, no model and no GPU; writes `runs/<name>/calibration.json` with the value, the
whole search curve and the errors before and after, for every family that an arm of the recipe asks for.
"""

import json
from typing import Any

from first_trl.cache.arrays import learned_by_heart
from first_trl.errors import FirstTrlError
from first_trl.run import (
    cached_roles,
    calibration_candidates,
    calibration_methods,
    require,
    run_job,
    status,
    teacher_path,
)
from first_trl.stages.command import stage_command

FORCED = 0.99  # of the answers that begin with one token: it is the template's
FEW_POSITIONS = 20


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
    method, choice, families = settings.method, None, {}
    if method == "auto":
        candidates, judged_by = calibration_candidates(recipe), (settings.criterion, settings.num_bins, settings.seed)
        choice = choose_family(rows.log_probs, rows.target, candidates, *judged_by)
        method = choice.method
        status(f"calibrate: auto chooses {method}: {choice.why}")
    for family in calibration_methods(recipe):
        result = search(
            rows.log_probs,
            rows.target,
            method=family,
            criterion=settings.criterion,
            num_bins=settings.num_bins,
            bootstrap=settings.bootstrap,
            seed=settings.seed,
            max_smoothing=max_smoothing,
        )
        families[family] = result.to_dict()
        status(f"calibrate: {search_line(result)}")
    calibration = {
        "schema_version": 1,
        "method": method,
        "value": families[method]["value"],
        **({"choice": choice.to_dict()} if choice else {}),
        "criterion": settings.criterion,
        "positions": settings.positions,
        "num_bins": settings.num_bins,
        "num_positions": len(rows.target),
        "teacher": teacher,
        "families": families,
    }
    write_atomically(recipe.run_folder / "calibration.json", json.dumps(calibration, indent=1))


def read_caches(recipe) -> tuple[Any, float, dict]:
    """(rows of validation, the most smoothing that every row allows, the teacher on each cache).

    Says the gap between the rows that the teacher labels and validation, where both are cached. The rows to learn from
    are looked through in blocks, and are never in memory together.
    """
    import torch
    from accelerate import PartialState

    from first_trl.cache.arrays import calibration_rows, row_blocks, summary
    from first_trl.cache.identity import open_recipe_cache
    from first_trl.calibration import largest_smoothing
    from first_trl.training import teacher_section

    settings, teacher, max_smoothing = recipe.calibrate, {}, 1.0
    is_main = PartialState().is_main_process
    for role in cached_roles(recipe):
        cache = open_recipe_cache(recipe, role, teacher_path(recipe), teacher_section(recipe), verify=is_main)
        forced = cache.manifest["forced"] | ({"closing": []} if settings.include_eos else {})
        if role == "validation":
            rows = calibration_rows(cache.dataset, settings.positions, forced)
            refuse_forced_answer(recipe, rows)
            continue
        labelled = cache.manifest.get("labels") != "teacher"
        teacher["cached_rows"] = summary(row_blocks(cache.dataset, settings.positions, forced), labelled)
        if "label_smoothing" in calibration_methods(recipe):  # its value must fit every row that students learn from
            blocks = row_blocks(cache.dataset, "all")
            max_smoothing = min(largest_smoothing(torch.from_numpy(block.log_probs)) for block in blocks)
    teacher["validation"] = summary([rows])
    if "cached_rows" in teacher:
        for line in gap_lines(**teacher):
            status(f"calibrate: {line}")
    return rows, max_smoothing, teacher


def refuse_forced_answer(recipe, rows) -> None:
    """A position that holds the same token in nearly every row measures nothing: an opening that a template forces.

    Raises:
        FirstTrlError: `calibrate.positions: answer` reads such a position.
    """
    import numpy as np

    from first_trl.modeling import load_tokenizer

    labels, counts = np.unique(rows.labels, return_counts=True)
    most, few = counts.max(), len(rows.labels) < FEW_POSITIONS
    if recipe.task.choices or recipe.calibrate.positions != "answer" or few or most < FORCED * len(rows.labels):
        return
    tokenizer = load_tokenizer(teacher_path(recipe), recipe.cache.teacher_revision)
    token = tokenizer.decode([int(labels[counts.argmax()])])
    raise FirstTrlError(
        f"calibrate.positions: answer reads the token {token!r} in {most} of {len(rows.labels)} validation answers, "
        "so that nothing is measured there. With a template that opens answers with thoughts set "
        "task.chat_template_kwargs: {enable_thinking: false}; else set calibrate.positions: all"
    )


def gap_lines(cached_rows: dict, validation: dict) -> list[str]:
    """The teacher on the rows that it labels beside validation, and a warning where it knows the former by heart."""
    seen, unseen = (
        ("" if found["accuracy"] is None else f"{100 * found['accuracy']:.1f} % right ")
        + f"at confidence {found['confidence']:.2f}"
        for found in (cached_rows, validation)
    )
    lines = [f"on the rows it labels the teacher is {seen}, on validation {unseen}"]
    if learned_by_heart(cached_rows, validation):
        lines.append(
            "WARNING: the teacher knows the rows that it labels by heart, so that no value fitted on validation is "
            "true for them; give datasets.transfer other rows, which need no labels"
        )
    return lines


def search_line(result) -> str:
    """What a search found, in a line."""
    before, positions = f"{100 * result.ece_before:.1f} %", f"{result.num_positions} validation positions"
    if result.value is None:
        return f"{result.method} leaves the teacher's ECE on {positions} at {before}"
    after = f"{100 * result.ece_after:.1f} %"
    return f"{result.method} {result.value:.3g} takes the teacher's ECE on {positions} from {before} to {after}"


if __name__ == "__main__":
    main()

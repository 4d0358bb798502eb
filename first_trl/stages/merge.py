"""Merge a student's adapter into its base, and measure again what that changes.

    first-trl merge RECIPE [--arm first]                  measured on the recipe's test sets
    first-trl merge ADAPTER --data questions.jsonl        measured on labelled rows of your own
    first-trl merge ... --calibrated                      its logits divided by their closing temperature

Writes `runs/<name>/merged/<student>/`, or a folder beside ADAPTER: a whole model, and `merge.json`.
"""

import argparse
import sys
from pathlib import Path

from first_trl.errors import FirstTrlError
from first_trl.failures import explain
from first_trl.log import status


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    page = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("first-trl merge", description=__doc__, formatter_class=page, allow_abbrev=False)
    parser.add_argument("source", metavar="RECIPE|ADAPTER", help="a recipe, or the folder of a student")
    parser.add_argument("--arm", help="which student of the recipe (default: push.arm)")
    parser.add_argument("--data", help="labelled rows to measure on; needed for an ADAPTER")
    temperature = (
        "divide every logit by the closing temperature over the vocabulary, for vLLM and others that know none"
    )
    parser.add_argument("--calibrated", action="store_true", help=temperature)
    parser.add_argument("--output", help="folder to write; it must not be there yet (default: beside the student)")
    options = parser.parse_args(argv)
    try:
        (merge_of_recipe if options.source.endswith((".yaml", ".yml")) else merge_of_folder)(options)
    except Exception as error:
        known = explain(error, "merge")
        if known is None:
            raise  # unexpected: there is no run's log to keep the traceback in
        print(f"[first-trl] merge failed: {known}", file=sys.stderr)
        return 1
    return 0


def merge_of_recipe(options: argparse.Namespace) -> None:
    """Merge a student of a run, which must be current; measured on the rows that `evaluate` measures on."""
    from first_trl.recipe import load_recipe
    from first_trl.run import require
    from first_trl.stages.evaluate import measured_sets
    from first_trl.stages.push import chosen_arm

    recipe = load_recipe(options.source)
    if options.arm is None and recipe.push.arm == "best":
        require(recipe, "evaluate")  # whose report names it
    arm = options.arm or chosen_arm(recipe)
    section = recipe.arm_section(arm)
    student = arm if arm in recipe.students else recipe.students_of(arm)[0]  # of several seeds, the first
    require(recipe, f"distill.{student}")
    folder, output = (recipe.run_folder / place / student for place in ("students", "merged"))
    if options.data:
        sets = labelled_rows(options.data, recipe.task, folder)
    else:
        measured = measured_sets(recipe)
        sets = {name: (measured[name][0].rows, measured[name][1]) for name in recipe.datasets.test}
    sizes = {"top_k": recipe.cache.top_k, "tokens_per_batch": recipe.evaluate.tokens_per_batch}
    merge_and_show(options, folder, section, sets, output, **sizes)


def merge_of_folder(options: argparse.Namespace) -> None:
    """Merge a student that is a folder, measured on labelled rows."""
    from first_trl.student import read_student

    folder = Path(options.source)
    if not folder.is_dir():
        raise FirstTrlError(f"there is no folder {folder}; give a recipe, or a student's folder, e.g. students/first")
    if options.data is None:
        raise FirstTrlError("--data is missing: a merged student must be measured again; give a file of labelled rows")
    task, description = read_student(folder)
    loading = description.loading.model_dump(exclude_none=True)
    sets = labelled_rows(options.data, task, folder)
    merge_and_show(options, folder, loading, sets, folder.with_name(f"{folder.name}-merged"))


def labelled_rows(path: str, task, student: Path) -> dict[str, tuple]:
    """{"data": (rows, task)} of a file."""
    from first_trl.data.rows import load_rows
    from first_trl.modeling import load_tokenizer
    from first_trl.settings import DatasetConfig

    config = DatasetConfig(path=path, split="train")
    return {"data": (load_rows(config, "test", task, load_tokenizer(student), place="--data").rows, task)}


def merge_and_show(options, student: Path, loading: dict, sets: dict, output: Path, **sizes: int) -> None:
    from first_trl.merging import merge, table

    output = Path(options.output or output)
    print(table(merge(student, loading, sets, output, calibrated=options.calibrated, **sizes)))
    status(f"merge: read {student}; wrote {output}, a whole model; next: first-trl predict {output}")

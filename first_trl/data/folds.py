"""Which fold a row belongs to, where several teachers share the rows: each learns all folds but one and labels that.

A fold follows from the tokens of the prompt and a seed, so it does not depend on the order of rows, on how many there
are, or on which process asks; rows with the same prompt are always in the same fold.
"""

import hashlib
from array import array
from collections.abc import Callable

IGNORED = -100


def fold_of(example: dict, folds: int, seed: int) -> int:
    """The fold, 0 to `folds` - 1, of a tokenised example with `input_ids` and `labels` (-100 in the prompt)."""
    length = next((i for i, label in enumerate(example["labels"]) if label != IGNORED), len(example["labels"]))
    digest = hashlib.sha256(f"{seed}:".encode() + array("q", example["input_ids"][:length]).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") % folds


def rows_outside(dataset, fold: int, folds: int, seed: int) -> list[int]:
    """The rows of a tokenised dataset that the teacher of a fold learns.

    Raises:
        ValueError: the fold has none of the rows, or all of them.
    """
    rows = [i for i, example in enumerate(dataset) if fold_of(example, folds, seed) != fold]
    if not 0 < len(rows) < len(dataset):
        raise ValueError(
            f"sft.cross_fit is {folds}, and fold {fold} has {len(dataset) - len(rows)} of {len(dataset)} rows of "
            "datasets.train. Give more rows, or fewer folds."
        )
    return rows


def each_by_its_own_teacher(teachers: list[Callable], seed: int) -> Callable:
    """A function like those of `teachers`, one for each fold: every example is run by the teacher of its fold."""

    def run_teacher(examples: list[dict], **options) -> list[dict]:
        folds = [fold_of(example, len(teachers), seed) for example in examples]
        rows: list[dict] = [{}] * len(examples)
        for fold, teacher in enumerate(teachers):
            own = [i for i, found in enumerate(folds) if found == fold]
            for i, row in zip(own, teacher([examples[i] for i in own], **options) if own else [], strict=True):
                rows[i] = row
        return rows

    return run_teacher

"""From rows of a cache to batches: TRL's own tokens, and the teacher's rows beside them in the same order.

A row of the dataset is one example, with one entry of the teacher's columns for each of its supervised positions;
packing joins examples, and moves those entries with their tokens. Nothing is tokenised or truncated here: the cache is
complete.

Shapes: N supervised positions of a batch in row-major order, K kept tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from trl import pack_dataset

from .cache.reader import TeacherCache
from .constants import IGNORED
from .first_config import FIRSTConfig

TEACHER_COLUMNS = ["teacher_ids", "teacher_log_probs", "teacher_tail_log_prob"]
COLUMNS = ["input_ids", "labels", *TEACHER_COLUMNS]
POSITIONS_PER_ROW = "positions_per_row"


def prepare_rows(cache: TeacherCache, args: FIRSTConfig, packing: bool) -> Dataset:
    """The cache's rows as the collator wants them, packed where asked."""
    dataset = cache.dataset.select_columns(COLUMNS).with_format("numpy")
    if not packing:
        return dataset
    max_length = args.max_length or cache.manifest.get("task", {}).get("max_length")
    if max_length is None:
        raise ValueError("packing needs max_length, the number of tokens in a packed row; set it in FIRSTConfig.")
    dataset = dataset.map(_one_entry_per_token, desc="Aligning teacher rows with tokens")
    return pack_dataset(dataset, max_length, args.packing_strategy).with_format("numpy")


@dataclass
class TeacherCollator:
    """TRL's collator for the tokens, and the teacher's rows beside them.

    Adds `teacher_ids` (N, K) int64 and `teacher_log_probs` (N, K+1) float32, last column the tail, where N counts the
    supervised positions of the batch in row-major order: the same order padded, padding-free and packed.

    Raises:
        ValueError: rows and supervised positions do not match, so the example is not as the cache wrote it; or a row
            has no supervised position.
    """

    tokens: Callable[[list[dict]], dict[str, torch.Tensor]]

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        token_columns = ("input_ids", "labels", "seq_lengths")
        batch = self.tokens([{name: row[name] for name in token_columns if name in row} for row in examples])
        supervised = batch["labels"][:, 1:] != IGNORED
        if not all(len(row["teacher_ids"]) for row in examples):
            raise ValueError(
                "A row of the dataset has no supervised position, so a student learns nothing from it: leave it out, "
                'as in dataset.filter(lambda row: len(row["teacher_ids"]) > 0).'
            )
        rows = {name: np.concatenate([np.asarray(row[name]) for row in examples]) for name in TEACHER_COLUMNS}
        if "seq_lengths" in examples[0]:  # packed: one entry per token, see `_one_entry_per_token`
            num_tokens = len(rows["teacher_ids"])
            kept = (batch["labels"][0, :num_tokens] != IGNORED).numpy()
            rows = {name: values[kept] for name, values in rows.items()}
        if len(rows["teacher_ids"]) != int(supervised.sum()):
            raise ValueError(
                f"A batch has {int(supervised.sum())} supervised positions but {len(rows['teacher_ids'])} rows: "
                "the dataset was changed after the cache was written. Pass the cache itself as the dataset."
            )
        log_probs_NK1 = np.concatenate(
            [rows["teacher_log_probs"].astype(np.float32), rows["teacher_tail_log_prob"].astype(np.float32)[:, None]],
            axis=1,
        )
        batch["teacher_ids"] = torch.from_numpy(rows["teacher_ids"].astype(np.int64))
        # float16 storage leaves a row's sum within 5e-4 of 1; a divergence between rows wants it exact
        batch["teacher_log_probs"] = torch.from_numpy(log_probs_NK1).log_softmax(dim=1)
        batch[POSITIONS_PER_ROW] = torch.tensor([_num_positions(row) for row in examples])
        return batch


def _num_positions(example: dict) -> int:
    """Supervised positions of an example; of a packed one, those of its documents."""
    if "seq_lengths" not in example:
        return len(example["teacher_ids"])
    starts = np.cumsum([0, *np.asarray(example["seq_lengths"])[:-1]])  # the first token of each is nobody's target
    supervised = np.asarray(example["labels"]) != IGNORED
    supervised[starts] = False
    return int(supervised.sum())


def _one_entry_per_token(example: dict) -> dict:
    """Spread the teacher's rows over the tokens, entry i for token i's label, so that packing moves both alike."""
    supervised = np.asarray(example["labels"]) != IGNORED
    supervised[:1] = False  # a document's first token is nobody's target
    spread = {}
    for name in TEACHER_COLUMNS:
        values = np.asarray(example[name])
        spread[name] = np.zeros((len(supervised), *values.shape[1:]), values.dtype)
        spread[name][supervised] = values
    return spread

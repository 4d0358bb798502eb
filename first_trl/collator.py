"""A cache's rows into batches: TRL's own tokens, and the teacher's rows beside them in the same order.

A row of the dataset is one example, with one entry of the teacher's columns for each of its supervised positions;
packing joins examples, and moves those entries with their tokens. Rows come as Arrow buffers: no number is ever a
Python object. Nothing is tokenised or truncated here: the cache is complete.

Shapes: E examples, T tokens of all of them, N supervised positions of a batch in row-major order, K kept tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.formatting import query_table
from trl import pack_dataset

from .cache.arrays import flat
from .cache.reader import TeacherCache
from .constants import IGNORED
from .errors import FirstTrlError
from .first_config import FIRSTConfig

TEACHER_COLUMNS = ["teacher_ids", "teacher_log_probs", "teacher_tail_log_prob"]
COLUMNS = ["input_ids", "labels", *TEACHER_COLUMNS]


class ArrowRows(Dataset):
    """A dataset whose batches reach the collator as one Arrow table each; single rows are dictionaries, as ever."""

    def __getitems__(self, keys: list[int]) -> list[pa.Table]:
        return [query_table(self._data, keys, indices=self._indices)]


def prepare_rows(cache: TeacherCache, args: FIRSTConfig, packing: bool) -> ArrowRows:
    """The cache's rows as the collator wants them, packed where asked."""
    dataset = cache.dataset.select_columns(COLUMNS).with_format(None)
    if packing:
        max_length = args.max_length or cache.manifest.get("task", {}).get("max_length")
        if max_length is None:
            raise FirstTrlError("packing needs max_length, the tokens of a packed row; set it in FIRSTConfig.")
        spread = dataset.with_format("arrow").map(_one_entry_per_token, batched=True, desc="Aligning teacher rows")
        dataset = pack_dataset(spread.with_format(None), max_length, args.packing_strategy).with_format(None)
    rows = copy.copy(dataset)
    rows.__class__ = ArrowRows
    return rows


def _one_entry_per_token(table: pa.Table) -> pa.Table:
    """Spread the teacher's rows over the tokens, entry i for token i's label, so that packing moves both alike."""
    lengths_E, supervised_T = _supervised(table["labels"].combine_chunks())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_E)]), pa.int32())
    row_T = np.where(supervised_T, np.cumsum(supervised_T) - 1, 0)  # any row will do where no label is learned
    for name in TEACHER_COLUMNS:
        entries = table[name].combine_chunks().flatten().take(pa.array(row_T))
        table = table.set_column(table.column_names.index(name), name, pa.ListArray.from_arrays(offsets, entries))
    return table


def _supervised(labels: pa.ListArray, documents: list[list[int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(E,) lengths, and (T,) which labels are learned: never a document's first token, which nothing predicts."""
    lengths_E = pc.list_value_length(labels).to_numpy(zero_copy_only=False)
    lengths = lengths_E if documents is None else np.concatenate(documents)
    supervised_T = labels.flatten().to_numpy(zero_copy_only=False) != IGNORED
    supervised_T[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
    return lengths_E, supervised_T


@dataclass
class TeacherCollator:
    """TRL's collator for the tokens, and the teacher's rows beside them.

    Adds, for the N supervised positions of the batch in row-major order, the same padded, padding-free and packed:
    `teacher_ids` (N, K) int64; `teacher_log_probs` (N, K+1) float32, last column the tail; `places` (N,) int64, where
    in the flattened (batch, tokens) the position is; and `positions_per_row` (E,).

    Args:
        tokens: TRL's collator.

    Raises:
        FirstTrlError: rows and supervised positions do not match, so that an example is not as the cache wrote it; a
            row has no supervised position; or a position has a token twice.
    """

    tokens: Callable[[list[dict]], dict[str, torch.Tensor]]

    def __call__(self, examples: list) -> dict[str, torch.Tensor]:
        table = examples[0] if isinstance(examples[0], pa.Table) else pa.Table.from_pylist(examples)
        documents = table["seq_lengths"].to_pylist() if "seq_lengths" in table.column_names else None
        lengths_E, supervised_T = _supervised(table["labels"].combine_chunks(), documents)
        ends = np.cumsum(lengths_E)
        positions_E = np.diff(np.concatenate([[0], np.cumsum(supervised_T)[ends - 1]]))
        ids_NK = flat(table["teacher_ids"])
        log_probs_NK1 = np.column_stack([flat(table["teacher_log_probs"]), flat(table["teacher_tail_log_prob"])])
        if documents is not None:  # packed, with one entry per token
            ids_NK, log_probs_NK1 = ids_NK[supervised_T], log_probs_NK1[supervised_T]
        self._check(positions_E, ids_NK)
        columns = {name: np.split(flat(table[name]), ends[:-1]) for name in ("input_ids", "labels")}
        if documents is not None:
            columns["seq_lengths"] = documents
        batch = self.tokens([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        batch["teacher_ids"] = torch.from_numpy(ids_NK)
        # float16 storage leaves a row's sum within 5e-4 of 1; a divergence between rows wants it exact
        batch["teacher_log_probs"] = torch.from_numpy(log_probs_NK1).log_softmax(dim=1)
        next_is_learned_BT = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        batch["places"] = next_is_learned_BT.flatten().nonzero().squeeze(1)
        batch["positions_per_row"] = torch.from_numpy(positions_E)
        return batch

    @staticmethod
    def _check(positions_E: np.ndarray, ids_NK: np.ndarray) -> None:
        """On the host, once, for on a GPU every check of ids would wait for the device."""
        if not positions_E.all():
            raise FirstTrlError(
                "A row of the dataset has no supervised position, so a student learns nothing from it: leave it out, "
                'as in dataset.filter(lambda row: len(row["teacher_ids"]) > 0).'
            )
        if len(ids_NK) != positions_E.sum():
            raise FirstTrlError(
                f"A batch has {positions_E.sum()} supervised positions but {len(ids_NK)} rows: the dataset was "
                "changed after the cache was written. Pass the cache itself as the dataset."
            )
        sorted_NK = np.sort(ids_NK, axis=1)
        if (sorted_NK[:, 0] < 0).any() or (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any():
            raise FirstTrlError("A row has a teacher token twice, or a negative one; make the cache again.")

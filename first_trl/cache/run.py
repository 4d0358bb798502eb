"""Running a teacher over a dataset into a cache: read, tokenise, score and write one shard after the other.

Memory does not grow with the dataset, which may be a stream. A shard is written by a second thread while the teacher
runs over the next. What a teacher is, and how a file gets whole onto a disk, is not known here.
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from .fingerprints import row_key
from .format import shard_name
from .writer import CacheWriter


def write_shards(
    writer: CacheWriter,
    dataset: Dataset | IterableDataset,
    encode: Callable[[dict, int], dict],
    run_teacher: Callable[[list[dict], Callable[[int], None]], list[dict]],
    *,
    present: Collection[str] = (),
    rank: int = 0,
    processes: int = 1,
    answered_by_teacher: bool = False,
    title: str = "cache",
) -> int:
    """Write the shards of process `rank` that are not already there; returns the rows of the whole dataset.

    Args:
        encode: an example (`input_ids`, `labels`) from a row and its number in the dataset.
        run_teacher: the columns of a shard from its examples; calls its second argument with the tokens of each batch.
        present: names of the shards that were there when the job began, the same on every process. They are dealt out
            to be checked, and the others to be made, so that neither falls to one process.
        answered_by_teacher: the tokens after the prompts are the teacher's. The rows of a finished shard are then not
            compared with the dataset's, only the job that made it is.
        title: of the progress bar, which the first process shows.

    Raises:
        ValueError: a row cannot be encoded, or a shard not be written.
    """
    turns = {True: count(), False: count()}
    num_rows, own_rows, own_tokens, writing = 0, 0, 0, None
    with (
        ThreadPoolExecutor(max_workers=1) as background,
        tqdm(desc=title, unit=" tokens", unit_scale=True, disable=rank != 0) as bar,
    ):
        for index, rows in enumerate(_slices(dataset, writer.rows_per_shard)):
            first, num_rows = num_rows, num_rows + len(rows)
            if next(turns[shard_name(index) in present]) % processes != rank:
                continue
            examples = [encode(row, first + i) for i, row in enumerate(rows)]
            own_rows, own_tokens = own_rows + len(rows), own_tokens + sum(len(row["input_ids"]) for row in examples)
            if isinstance(dataset, Dataset):  # the tokens to come, if they are like those so far
                bar.total = round(own_tokens / own_rows * len(dataset) / processes)
            keys = [row_key(row["input_ids"], row["labels"]) for row in examples]
            if writer.shard_is_complete(index, None if answered_by_teacher else keys):
                bar.update(own_tokens - bar.n)
                continue
            columns = run_teacher(examples, bar.update)
            _raise_error_of(writing)
            writing = background.submit(writer.write_shard, index, columns)
        _raise_error_of(writing)
    return num_rows


def _raise_error_of(writing: Future | None) -> None:
    """Wait for a shard to be on the disk."""
    if writing is not None:
        writing.result()


def _slices(dataset: Dataset | IterableDataset, size: int) -> Iterator[Dataset | list[dict]]:
    """The rows of each shard; those of a `Dataset` are read when they are looked at."""
    if isinstance(dataset, Dataset):
        for start in range(0, len(dataset), size):
            yield dataset.select(range(start, min(start + size, len(dataset))))
        return
    stream = iter(dataset)
    while rows := list(islice(stream, size)):
        yield rows

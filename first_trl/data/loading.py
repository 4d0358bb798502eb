"""Load a split of a dataset and tokenise it; why a source could not be loaded, in plain words, and the remedy.

`datasets` reports a broken file, a missing split and an unreachable Hub in its own terms, several exceptions deep.
`explain_load_error` reads those exceptions and the local files, and finds the line at fault. How one row is encoded is
`first_trl.data.encoding`.
"""

import errno
import glob
import hashlib
import json
from array import array
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DatasetConfig, TaskConfig
from ..constants import IGNORED
from .encoding import encode_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# File suffix -> builder of `datasets`.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_split(config: DatasetConfig, role: str, *, streaming: bool = False) -> "Dataset":
    """Load one split, with its columns renamed, shuffled if a seed is set, then cut to `max_rows`.

    Class labels become their names. `path` may be a json, csv, parquet or text file. Code that comes with a dataset is
    never run. `role` ("train", "validation" or "test") names the split when the recipe does not.

    Raises:
        ValueError: the source is missing, broken, empty, gated or unreachable, with the remedy.
    """
    import datasets

    path, data_files = _source(config, role)
    split = config.split or (role if data_files is None else "train")
    try:
        dataset = datasets.load_dataset(
            path, name=config.name, data_files=data_files, split=split, revision=config.revision, streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = explain_load_error(error, path, split, data_files)
        raise ValueError(f"datasets.{role}: {config.path!r} cannot be loaded: {reason}") from error
    dataset = _name_class_labels(_rename_columns(dataset, config, role))
    if config.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=config.shuffle_seed)
    if streaming:
        return dataset if config.max_rows is None else dataset.take(config.max_rows)
    if len(dataset) == 0:
        raise ValueError(f"datasets.{role}: {config.path!r}, split {split!r} has no rows; choose another one")
    return dataset if config.max_rows is None else dataset.select(range(min(config.max_rows, len(dataset))))


def _source(config: DatasetConfig, role: str) -> tuple[str, list[str] | None]:
    """(path, data_files) for `datasets.load_dataset`; a file as path becomes a builder and a data file."""
    data_files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
    builder = BUILDERS.get(Path(config.path).suffix)
    if data_files is None and builder is not None and not Path(config.path).is_dir():
        return builder, [config.path]
    if data_files is None and config.path in BUILDERS.values():
        raise ValueError(f"datasets.{role}: path {config.path!r} reads files, and none is named; set data_files")
    return config.path, data_files


def _rename_columns(dataset: "Dataset", config: DatasetConfig, role: str) -> "Dataset":
    renames = {column: name for name, column in (config.columns or {}).items()}
    present = dataset.column_names or []
    missing = [column for column in renames if column not in present]
    if missing:
        raise ValueError(
            f"datasets.{role}.columns: {config.path!r} has no column {missing[0]!r}; choose among {', '.join(present)}"
        )
    replaced = [name for name in renames.values() if name in present and name not in renames]
    return dataset.remove_columns(replaced).rename_columns(renames) if renames else dataset


def _name_class_labels(dataset: "Dataset") -> "Dataset":
    import datasets

    features = dataset.features or {}
    names = {column: kind.names for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    if not names:
        return dataset
    named = datasets.Features({**features, **{column: datasets.Value("string") for column in names}})
    return dataset.map(partial(_class_names, names=names), batched=True, features=named)


def _class_names(batch: dict[str, list], names: dict[str, list[str]]) -> dict[str, list]:
    # -1 is how datasets writes "no label"; it becomes a missing value, which a template refuses.
    return {
        column: [None if label is None or label < 0 else known[label] for label in batch[column]]
        for column, known in names.items()
    }


def tokenize_dataset(
    dataset: "Dataset",
    task: TaskConfig,
    tokenizer: "PreTrainedTokenizerBase",
    num_proc: int | None = None,
    place: str = "",
) -> "Dataset":
    """Encode every row, in order, into exactly `input_ids` and `labels` (lists of int32); no row is dropped.

    Args:
        place: where the rows come from, such as `datasets.train`, for the messages of errors.

    Raises:
        ValueError: as `encode_example`, beginning with the place and the number of the row.
    """
    import datasets

    lists = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")})
    # Named here, because a tokenizer's own hash changes when it is used, and the cache would never be found again.
    parts = [dataset._fingerprint, asdict(task), _tokenizer_state(tokenizer), Path(__file__).read_bytes()]
    return dataset.map(
        partial(encode_row, task=task, tokenizer=tokenizer, place=place),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=lists,
        num_proc=num_proc,
        new_fingerprint=datasets.fingerprint.Hasher.hash(parts),
        desc="Tokenizing",
    )


def _tokenizer_state(tokenizer) -> list:
    """What decides the tokens of a text, without the padding and truncation that earlier calls left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if backend is not None:
        state.update(padding=None, truncation=None)
    digest = hashlib.sha256(json.dumps(state).encode())
    return [digest.hexdigest(), tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]


@dataclass(frozen=True)
class Overlap:
    """Examples of `second` whose prompt is also in `first`: how many, and a few as (row of first, row of second)."""

    first: str
    second: str
    count: int
    rows: list[tuple[int, int]]


def check_disjoint(splits: dict[str, "Dataset"]) -> list[Overlap]:
    """Prompts shared between tokenised splits, one `Overlap` per pair that shares any.

    `splits` is {"train": ..., "transfer": ..., "validation": ..., and any test sets}, those that there are, in this
    order; pairs of two test sets are not compared. What to do about an overlap is the caller's decision. Rows are
    those of the datasets that were tokenised.
    """
    prompts = {name: _prompt_rows(dataset) for name, dataset in splits.items()}
    overlaps, names = [], list(splits)
    for first in (name for name in ("train", "transfer", "validation") if name in splits):
        for second in names[names.index(first) + 1 :]:
            shared = prompts[first].keys() & prompts[second].keys()
            rows = sorted((row, prompts[first][prompt][0]) for prompt in shared for row in prompts[second][prompt])
            if rows:
                overlaps.append(Overlap(first, second, len(rows), [(there, here) for here, there in rows[:5]]))
    return overlaps


def _prompt_rows(dataset: "Dataset") -> dict[bytes, list[int]]:
    """Digest of a prompt's tokens -> the rows that have it, in order."""
    rows: dict[bytes, list[int]] = {}
    for index, example in enumerate(dataset.select_columns(["input_ids", "labels"])):
        length = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        digest = hashlib.sha256(array("q", example["input_ids"][:length])).digest()
        rows.setdefault(digest, []).append(index)
    return rows


# Why a source could not be loaded


def explain_load_error(error: Exception, path: str, split: str, data_files: list[str] | None) -> str:
    """What is wrong with this source, and the remedy. `path` and `data_files` as `datasets.load_dataset` got them."""
    chain = _causes(error)
    full = [e for e in chain if isinstance(e, OSError) and e.errno == errno.ENOSPC]
    if full:
        return f"no space left on the disk while preparing it ({full[0]}); free some, or point HF_HOME at another disk"
    if path not in BUILDERS.values() and not Path(path).exists():
        return _explain_hub_error(error, chain, path)
    files = local_files(path, data_files)
    if not files:
        asked = ", ".join(data_files) if data_files else f"data files in the folder {path}"
        return f"there is no {asked} (looked from {Path.cwd().name}/); correct data_files, relative to where you run"
    for file in files:
        problem = file_problem(file)
        if problem:
            return problem
    names = ", ".join(map(str, files[:3]))
    return _explain_text(str(error), split) or f"{' '.join(str(chain[-1]).split())} (read from {names}); mend the data"


def local_files(path: str, data_files: list[str] | None) -> list[Path]:
    """The local files behind a source that exist, patterns expanded."""
    base = Path(path) if Path(path).is_dir() else Path()
    if data_files is None:
        return sorted(file for file in base.rglob("*") if file.suffix in BUILDERS)
    found = [name for pattern in data_files for name in sorted(glob.glob(str(base / pattern), recursive=True))]
    return [Path(name) for name in found]


def file_problem(file: Path) -> str | None:
    """What is wrong with one file: nothing in it, or the first line of JSON that does not parse; None if it reads."""
    if file.stat().st_size == 0:
        return f"the file {file} is empty; write the data again"
    if file.suffix == ".jsonl" or (file.suffix == ".json" and not _is_one_document(file)):
        return _json_lines_problem(file)
    return None


def _is_one_document(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _json_lines_problem(file: Path) -> str | None:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one too
                start = line[:60].decode("utf-8", "replace").rstrip()
                return f"{file}, line {number} is not valid JSON ({error}): {start!r}; mend or delete that line"
            if not isinstance(row, dict):
                return (
                    f"{file}, line {number} is not a JSON object: {line[:60].decode()!r}; write one {{...}} per line"
                )
    return None


def _explain_hub_error(error: Exception, chain: list[BaseException], path: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    local = f"If {path!r} is meant as a local folder or file, it does not exist (paths start where you run this)"
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated dataset" in str(error):
        page = f"{constants.ENDPOINT}/datasets/{path}"
        return f"it is gated; accept its terms at {page}, then run `hf auth login` with an account that may read it"
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or constants.HF_HUB_OFFLINE:
        return (
            "it is not among the downloaded datasets and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE, or download it "
            f"first where there is a network. {local}"
        )
    codes = [e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None]
    if 401 in codes or 403 in codes or isinstance(error, FileNotFoundError):
        return (
            f"{str(error).rstrip('.')}; check the spelling and the revision, and run `hf auth login` if the dataset "
            f"is private. {local}"
        )
    if isinstance(error, ConnectionError) or codes:
        return f"the Hub cannot be reached ({error}); check the network, or HF_ENDPOINT if it is set. {local}"
    return _explain_text(str(error), "") or f"{chain[-1]}. {local}"


def _explain_text(text: str, split: str) -> str | None:
    """Errors that `datasets` tells apart by their text alone; the text names what is available."""
    if text.startswith("Unknown split"):
        return f"it has no split {split!r}. {text.partition('. ')[2]} Set `split`"
    if text.startswith("Unrecognized instruction format"):
        return f"the split {split!r} cannot be read; write a name or a slice such as train[:90%]"
    if text.endswith("corresponds to no data!"):
        return f"the split {split!r} has no rows; choose another one"
    if text.startswith("BuilderConfig") or "Config name is missing" in text:
        return f"{' '.join(text.split())} Set `name` to one of them"
    if "Dataset scripts are no longer supported" in text:
        return "it needs code of its own to be run, which is refused; use a copy of it stored as parquet, json or csv"
    return None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain

"""Where a split comes from, what identifies its content, and its rows as they are; what cannot be read is refused.

How one row is encoded is `first_trl.data.encoding`; which rows are used, `first_trl.data.rows`.
"""

import csv
import errno
import glob
import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import BUILDERS, HUB_ID
from ..errors import FirstTrlError
from ..failures import causes
from ..files import file_digest
from ..settings import DatasetConfig

if TYPE_CHECKING:
    from datasets import Dataset


def looks_local(path: str) -> bool:
    """Whether a path can only mean this machine, or does name something on it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or os.path.exists(path)


def _named_files(config: DatasetConfig) -> list[str]:
    return [config.data_files] if isinstance(config.data_files, str) else config.data_files or []


def source_problem(config: DatasetConfig) -> tuple[str, str, str] | None:
    """(setting, what is wrong, the remedy) of where a split comes from, as far as this machine tells; else None."""
    path, files = config.path, _named_files(config)
    key = "data_files" if files else "path"
    if path in BUILDERS.values() and not files:
        return key, "it reads files, and none is given", "write data_files: path/to/the/file"
    if any(re.match(r"/[^/]*[*?\[]", file) for file in files):
        return key, "it looks through the whole disk", "name the folder that holds the data"
    in_files = path in BUILDERS.values() or Path(path).suffix in BUILDERS
    if len({"://" in file for file in files}) > 1:
        return key, "some of these are files here, others addresses", "give files of one kind"
    if "://" in path or any("://" in file for file in files) or not (in_files or looks_local(path)):
        remedy = "write owner/name, a folder, a file, or json with data_files"
        on_hub = "://" in path or in_files or HUB_ID.fullmatch(path)
        return None if on_hub else (key, "it is neither a folder nor the id of a dataset on the Hub", remedy)
    each: list[str | None] = [*files] or [None]
    if not all(local_files(config.model_copy(update={"data_files": file})) for file in each):
        remedy = "give an existing one, from the current directory; ~ is written ${HOME}"
        return key, f"there is no such {'file' if files or in_files else 'folder'}", remedy
    return None


def local_files(config: DatasetConfig) -> list[Path]:
    """The files on this machine that a source reads, patterns and folders resolved; none for a source on the Hub."""
    path, patterns = Path(config.path), _named_files(config)
    is_builder = config.path in BUILDERS.values()  # also where there is a folder of that name
    if path.is_dir() and not patterns:
        inside = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
        return [path / file for file in inside if not any(part[0] in "._" for part in file.parts)]
    if patterns and not path.is_dir() and not is_builder:
        return []  # files of a repository on the Hub, whatever has their names here
    base = path if path.is_dir() and not is_builder else Path()
    # Each pattern in the order of the recipe, which is that of the rows
    found = [Path(name) for each in patterns for name in sorted(glob.glob(str(base / each), recursive=True))]
    return [file for file in dict.fromkeys(found if patterns else [path]) if file.is_file()]


def source_identity(config: DatasetConfig, role: str) -> dict[str, Any]:
    """What decides the rows of a split, as plain data without a path of this machine; equal data mean equal rows."""
    files = local_files(config)
    return {
        "path": Path(config.path).name if Path(config.path).exists() else config.path,
        "name": config.name,
        "files": [Path(name).name for name in _named_files(config)],
        "files_sha256": content_digest(files) if files else None,
        "split": config.split,
        "revision": config.revision,
        "commit": source_commit(config),
        "columns": config.columns,
        "max_rows": config.max_rows,
        "shuffle_seed": config.shuffle_seed,
        "role": role,
    }


def content_digest(files: list[Path]) -> str:
    """SHA-256 over the names and contents of files, in hexadecimal."""
    # A ctime cannot be set back, so that other content under the same size and time is noticed
    found = ((file, file.stat()) for file in files)
    digests = [[file.name, _digest(file, at.st_size, at.st_mtime_ns, at.st_ctime_ns)] for file, at in found]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest(file: Path, *state: int) -> str:
    return file_digest(file)


@lru_cache(maxsize=64)
def hub_commit(repo: str, revision: str | None, kind: str) -> str | None:
    """The commit of a `model` or `dataset` of the Hub, offline that of the copy which is here; None where unknown."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if not HUB_ID.fullmatch(repo):
        return None
    file = {"dataset": "README.md", "model": "config.json"}[kind]
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision)).parent.name
    except LocalEntryNotFoundError:
        return None
    except EntryNotFoundError:
        return HfApi().repo_info(repo, repo_type=kind, revision=revision).sha
    except (HfHubHTTPError, OSError):  # loading it says what is wrong
        return None


def source_commit(config: DatasetConfig) -> str | None:
    """`hub_commit` of a dataset; None for local files."""
    local = config.path in BUILDERS.values() or Path(config.path).exists()
    return None if local else hub_commit(config.path, config.revision, "dataset")


def load_split(config: DatasetConfig, role: str, *, streaming: bool = False) -> "Dataset":
    """Load one split, with its columns renamed, shuffled if a seed is set, then cut to `max_rows`.

    Class labels become their names, and every cell of a CSV file is text, as it is written there. Local files are
    known by their content and a Hub revision by its commit, so that an older copy of `datasets` is never served. Code
    that comes with a dataset is never run. `role` ("train", "validation" or "test") names the split when the recipe
    does not.

    Raises:
        FirstTrlError: the source is missing, broken, empty, gated or unreachable; or it is to be streamed, and would
            not give the rows of the other stages.
    """
    import datasets

    place = f"datasets.{role}"
    if problem := source_problem(config):
        raise FirstTrlError(f"{place}.{problem[0]} = {getattr(config, problem[0])!r}: {'; '.join(problem[1:])}")
    # A stream is shuffled in a buffer and cannot be sliced: the cache would hold other rows than the other stages
    sliced = {"shuffle_seed": config.shuffle_seed is not None, "split": "[" in (config.split or "")}
    if streaming and (key := next((key for key, is_set in sliced.items() if is_set), "")):
        raise FirstTrlError(
            f"{place}.{key} = {getattr(config, key)!r}: with it cache.streaming reads other rows than other stages "
            f"do; set cache.streaming: false, or remove {key}"
        )
    files, path = local_files(config), config.path
    data_files: list[str] | None = _named_files(config) or None
    options: dict[str, Any] = {}
    if files:
        # `datasets` knows a file by its path and time, which archives and images set to one value
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "first_trl" / content_digest(files)[:32]
        options = {"cache_dir": str(cache)}
        if data_files or not Path(path).is_dir():
            path, data_files = _builder(config, files, place), [str(file) for file in files]
        if all(file.suffix == ".csv" for file in files):
            options |= _csv_options(files, place)
    elif path not in BUILDERS.values():
        options = {"revision": source_commit(config) or config.revision}
    split = config.split or (role if data_files is None else "train")
    try:
        dataset = datasets.load_dataset(
            path, name=config.name, data_files=data_files, split=split, streaming=streaming, **options
        )
    # TypeError: of a line that is no object, before datasets 5
    except (OSError, ValueError, TypeError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise FirstTrlError(f"{place}: {config.path!r} cannot be loaded: {_load_problem(error, files)}") from error
    dataset = _name_class_labels(_rename_columns(dataset, config, place))
    if config.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=config.shuffle_seed)
    if streaming:
        return dataset if config.max_rows is None else dataset.take(config.max_rows)
    if len(dataset) == 0:
        raise FirstTrlError(f"{place}: {config.path!r}, split {split!r} has no rows; choose another one")
    return dataset if config.max_rows is None else dataset.select(range(min(config.max_rows, len(dataset))))


def _builder(config: DatasetConfig, files: list[Path], place: str) -> str:
    """The builder of `datasets` that reads these files."""
    if config.path in BUILDERS.values():
        return config.path
    kinds = {file.suffix for file in files}
    if len(kinds) > 1 or not kinds <= BUILDERS.keys():
        raise FirstTrlError(
            f"{place}: {config.path!r} has files of {', '.join(sorted(kinds))}; name one kind: {', '.join(BUILDERS)}"
        )
    return BUILDERS[kinds.pop()]


def _csv_options(files: list[Path], place: str) -> dict[str, Any]:
    """How CSV files are read: every cell as the text it holds, so that `NA` is a word and no digit is lost.

    Refused is what pandas would shift or rename without an error.
    """
    import datasets

    csv.field_size_limit(2**31 - 1)
    columns: list[str] = []
    for file in files:
        with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            columns = columns or header
            if len(set(header)) < len(header) or header != columns:
                raise FirstTrlError(
                    f"{place}: {file} has the columns {header}; name each once, and alike in all files"
                )
            for row in reader:
                if row and len(row) != len(header):
                    raise FirstTrlError(
                        f"{place}: {file}, line {reader.line_num}: {len(row)} cells where the header has "
                        f"{len(header)}; quote the cells that hold a comma, or delete that line"
                    )
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]} if columns else {}


def _rename_columns(dataset: "Dataset", config: DatasetConfig, place: str) -> "Dataset":
    renames = {column: name for name, column in (config.columns or {}).items()}
    present = dataset.column_names or []
    if missing := [column for column in renames if column not in present]:
        raise FirstTrlError(f"{place}.columns: there is no column {missing[0]!r}; choose among {', '.join(present)}")
    replaced = [name for name in renames.values() if name in present and name not in renames]
    return dataset.remove_columns(replaced).rename_columns(renames) if renames else dataset


def _name_class_labels(dataset: "Dataset") -> "Dataset":
    import datasets

    features = dataset.features or {}
    names = {column: kind.names for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    if not names:
        return dataset
    texts = datasets.Features({**features, **{column: datasets.Value("string") for column in names}})
    # -1 is how datasets writes "no label"; it becomes a missing value, which a template refuses
    return dataset.map(
        lambda batch: {
            column: [None if label is None or label < 0 else known[label] for label in batch[column]]
            for column, known in names.items()
        },
        batched=True,
        features=texts,
    )


def _load_problem(error: Exception, files: list[Path]) -> str:
    """What is wrong with a source that `datasets` cannot load, and the remedy."""
    for file in files:
        if problem := _file_problem(file):
            return problem
    chain = causes(error)
    text = " ".join(f"{error}{f' ({chain[-1]})' * (len(chain) > 1)}".split())
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return f"{text}; free some space, or point HF_HOME at another disk"
    if files:
        return f"{text}; correct `split`, `name` or the data in {files[0]}"
    return (
        f"{text}; check the spelling, `name` and `split`, and the network (HF_HUB_OFFLINE, HF_ENDPOINT); of a gated "
        "dataset accept the terms on its page, and run `hf auth login`"
    )


def _file_problem(file: Path) -> str | None:
    """What is wrong with one file: nothing in it, or the first line of JSON that does not parse; None if it reads."""
    if file.stat().st_size == 0:
        return f"{file} is empty; write the data again"
    if file.suffix not in (".jsonl", ".json") or (file.suffix == ".json" and _json_problem(file.read_bytes()) is None):
        return None
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and (problem := _json_problem(line, dict)):
                start = line[:60].decode("utf-8", "replace").rstrip()
                return f"{file}, line {number} {problem}: {start!r}; write one {{...}} per line"
    return None


def _json_problem(text: bytes, kind: type = object) -> str | None:
    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        row = json.loads(text, object_pairs_hook=once_each)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a \\ud83d\\ude00 pair
        return f"holds {error.object[error.start]!r}, half of a character"
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
        return f"is not valid JSON ({error})"
    return None if isinstance(row, kind) else "is not a JSON object"

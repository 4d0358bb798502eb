"""Load a split of a dataset and tokenise it; why a source could not be loaded, in plain words, and the remedy.

`datasets` reports a broken file, a missing split and an unreachable Hub in its own terms, several exceptions deep.
`explain_load_error` reads those exceptions and the local files, and finds the line at fault. How one row is encoded is
`first_trl.data.encoding`.
"""

import csv
import errno
import glob
import hashlib
import json
import os
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import BUILDERS, HUB_ID
from ..errors import FirstTrlError
from ..files import file_digest
from ..settings import DatasetConfig

if TYPE_CHECKING:
    from datasets import Dataset


def looks_local(path: str) -> bool:
    """Whether a path can only mean this machine, or does name something on it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or os.path.exists(path)


def source_problem(config: DatasetConfig) -> tuple[str, str, str] | None:
    """(setting, what is wrong, the remedy) of where a split comes from, as far as this machine tells; else None."""
    path, key = config.path, "path" if config.data_files is None else "data_files"
    files = [config.data_files] if isinstance(config.data_files, str) else config.data_files or []
    if path in BUILDERS.values() and not files:
        return "path", "it reads files, and none is given", "write data_files: path/to/the/file"
    if any(re.match(r"/[^/]*[*?\[]", file) for file in files):
        return key, "it looks through the whole disk", "name the folder that holds the data"
    in_files = path in BUILDERS.values() or Path(path).suffix in BUILDERS
    if "://" in path or any("://" in file for file in files) or not (in_files or looks_local(path)):
        remedy = "write owner/name, a folder, a file, or json with data_files"
        on_hub = "://" in path or in_files or HUB_ID.fullmatch(path)
        return None if on_hub else ("path", "it is neither a folder nor the id of a dataset on the Hub", remedy)
    each: list[str | None] = [*files] or [None]
    for file in each:
        if not local_files(config.model_copy(update={"data_files": file})):
            remedy = "give an existing one, from the current directory; ~ is written ${HOME}"
            return key, f"there is no such {'file' if files or in_files else 'folder'}", remedy
    return None


def local_files(config: DatasetConfig) -> list[Path]:
    """The files on this machine that a source reads, patterns and folders resolved; none for a source on the Hub."""
    path, named = Path(config.path), config.data_files
    if named is None and path.is_dir():
        inside = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
        return [path / file for file in inside if not any(part[0] in "._" for part in file.parts)]
    if named is None:
        return [path] if path.is_file() else []
    base = path if path.is_dir() else Path()
    patterns = [named] if isinstance(named, str) else named
    # Each pattern in the order of the recipe, which is that of the rows
    found = [Path(name) for pattern in patterns for name in sorted(glob.glob(str(base / pattern), recursive=True))]
    return [file for file in dict.fromkeys(found) if file.is_file()]


def source_identity(config: DatasetConfig, role: str) -> dict[str, Any]:
    """What decides the rows of a split, as plain data without a path of this machine; equal data mean equal rows.

    `files_sha256` is over the names and the contents of the local files, `commit` as `source_commit`.
    """
    files = local_files(config)
    named = [config.data_files] if isinstance(config.data_files, str) else config.data_files or []
    return {
        "path": Path(config.path).name if Path(config.path).exists() else config.path,
        "name": config.name,
        "files": [Path(name).name for name in named],
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
    digests = [[file.name, _file_digest(str(file), *_size_and_time(file))] for file in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _size_and_time(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns  # a file's ctime cannot be set back


@lru_cache(maxsize=4096)
def _file_digest(path: str, *size_and_times: int) -> str:
    return file_digest(path)


@lru_cache(maxsize=64)
def hub_commit(repo: str, revision: str | None, kind: str) -> str | None:
    """The commit that a revision of a `model` or `dataset` of the Hub stands for, None where nothing is known of it.

    Without a network it is that of the copy which is here.
    """
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

    if streaming:
        _refuse_other_rows(config, role)
    files = local_files(config)
    path, data_files = _source(config, role, files)
    split = config.split or (role if data_files is None else "train")
    options: dict[str, Any] = {"revision": config.revision}
    if files:
        # `datasets` knows a file by its path and time, which archives and images set to one value
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "first_trl" / content_digest(files)[:32]
        options = {"cache_dir": str(folder)}
    elif path not in BUILDERS.values():
        options = {"revision": source_commit(config) or config.revision}
    try:
        options |= _csv_options(files, f"datasets.{role}")
        dataset = datasets.load_dataset(
            path, name=config.name, data_files=data_files, split=split, streaming=streaming, **options
        )
    except FirstTrlError:
        raise
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = explain_load_error(error, path, split, data_files, files)
        raise FirstTrlError(f"datasets.{role}: {config.path!r} cannot be loaded: {reason}") from error
    dataset = _name_class_labels(_rename_columns(dataset, config, role))
    if config.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=config.shuffle_seed)
    if streaming:
        return dataset if config.max_rows is None else dataset.take(config.max_rows)
    if len(dataset) == 0:
        raise FirstTrlError(f"datasets.{role}: {config.path!r}, split {split!r} has no rows; choose another one")
    return dataset if config.max_rows is None else dataset.select(range(min(config.max_rows, len(dataset))))


def _refuse_other_rows(config: DatasetConfig, role: str) -> None:
    """A stream is shuffled in a buffer and cannot be sliced: the cache would hold other rows than the other stages."""
    for key, value in (("shuffle_seed", config.shuffle_seed), ("split", config.split)):
        if value is not None and (key == "shuffle_seed" or "[" in str(value)):
            raise FirstTrlError(
                f"datasets.{role}.{key} is {value!r}, with which cache.streaming reads other rows than the other "
                f"stages; set cache.streaming: false, or remove {key} (max_rows alone gives the same rows either way)"
            )


def _source(config: DatasetConfig, role: str, files: list[Path]) -> tuple[str, list[str] | None]:
    """(path, data_files) for `datasets.load_dataset`; local files are named one by one, as they were resolved."""
    named = [config.data_files] if isinstance(config.data_files, str) else config.data_files
    if named is None and config.path in BUILDERS.values():
        raise FirstTrlError(f"datasets.{role}: path {config.path!r} reads files, and none is named; set data_files")
    if named is None and Path(config.path).is_dir():
        return config.path, None
    if named is None:
        builder = BUILDERS.get(Path(config.path).suffix)
        return (builder, [config.path]) if builder else (config.path, None)
    if not files:
        return config.path, named
    kinds = {BUILDERS.get(file.suffix, "") for file in files} if Path(config.path).is_dir() else {config.path}
    if len(kinds) > 1 or "" in kinds:
        raise FirstTrlError(
            f"datasets.{role}.data_files: {', '.join(named)} stands for files of several kinds "
            f"({', '.join(sorted({file.suffix for file in files}))}); name files of one kind: {', '.join(BUILDERS)}"
        )
    return kinds.pop(), [str(file) for file in files]


def _csv_options(files: list[Path], place: str) -> dict[str, Any]:
    """How CSV files are read: every cell as the text it holds, so that `NA` is a word and no digit is lost.

    Raises:
        FirstTrlError: a header names a column twice, files differ in their columns, or a row has more or fewer cells
            than its header; pandas would shift or rename columns without an error.
    """
    import datasets

    if not files or any(file.suffix != ".csv" for file in files):
        return {}
    csv.field_size_limit(2**31 - 1)
    columns: list[str] | None = None
    for file in files:
        with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            if doubled := [name for number, name in enumerate(header) if name in header[:number]]:
                raise FirstTrlError(f"{place}: {file} names the column {doubled[0]!r} twice; rename one of them")
            if columns is not None and header != columns:
                raise FirstTrlError(
                    f"{place}: {file} has the columns {header}, {files[0]} has {columns}; make them equal"
                )
            columns = header
            for row in reader:
                if row and len(row) != len(header):
                    raise FirstTrlError(
                        f"{place}: {file}, line {reader.line_num}: {len(row)} cells where the header has "
                        f"{len(header)}; quote the cells that hold a comma, or delete that line"
                    )
    features = datasets.Features({name: datasets.Value("string") for name in columns or []})
    return {"features": features, "keep_default_na": False, "na_values": [""]} if columns else {}


def _rename_columns(dataset: "Dataset", config: DatasetConfig, role: str) -> "Dataset":
    renames = {column: name for name, column in (config.columns or {}).items()}
    present = dataset.column_names or []
    missing = [column for column in renames if column not in present]
    if missing:
        raise FirstTrlError(
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


# Why a source could not be loaded


def explain_load_error(
    error: Exception, path: str, split: str, data_files: list[str] | None, files: list[Path]
) -> str:
    """What is wrong with this source, and the remedy. `path` and `data_files` as `datasets.load_dataset` got them."""
    chain = _causes(error)
    full = [e for e in chain if isinstance(e, OSError) and e.errno == errno.ENOSPC]
    if full:
        return f"no space left on the disk while preparing it ({full[0]}); free some, or point HF_HOME at another disk"
    if path not in BUILDERS.values() and not Path(path).exists():
        return _explain_hub_error(error, chain, path)
    if not files:
        asked = ", ".join(data_files) if data_files else f"data files in the folder {path}"
        return f"there is no {asked} (looked from {Path.cwd().name}/); correct data_files, relative to where you run"
    for file in files:
        problem = file_problem(file)
        if problem:
            return problem
    names = ", ".join(map(str, files[:3]))
    return (
        _explain_text(str(error), split) or f"{' '.join(str(chain[-1]).split())} (read from {names}); correct the data"
    )


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
            place, start = f"{file}, line {number}", line[:60].decode("utf-8", "replace").rstrip()
            try:
                row = json.loads(line, object_pairs_hook=_once_each)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # half of a \\ud83d\\ude00 pair
                return (
                    f"{place} holds {error.object[error.start]!r}, half of a character: {start!r}; correct that text"
                )
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
                return f"{place} is not valid JSON ({error}): {start!r}; correct or delete that line"
            if not isinstance(row, dict):
                return f"{place} is not a JSON object: {start!r}; write one {{...}} per line"
    return None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if doubled := [name for number, name in enumerate(names) if name in names[:number]]:
        raise FirstTrlError(f"the key {doubled[0]!r} stands twice")
    return dict(pairs)


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

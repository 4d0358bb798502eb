"""Where the splits of a recipe come from, checked without loading them: files that are missing, rows used twice.

What settings alone can tell. Whether two differently named sources hold the same examples is found by
`first_trl.data.encoding` when it reads them.
"""

import glob
import re
from pathlib import Path

from ..config import DatasetConfig
from ..data.loading import BUILDERS
from ..field_types import Problem
from .rules import HUB_NAME, exists, looks_local

_READERS = set(BUILDERS.values())
_HOME = ("~ is not expanded in recipes", "write ${HOME} instead of ~")


def broken_source(dataset: DatasetConfig) -> list[Problem]:
    """What is wrong with where a split comes from."""
    path, files = dataset.path, _listed_files(dataset)
    if path.startswith("~"):
        return [Problem("path", path, *_HOME)]
    if path in _READERS:
        if not files:
            return [Problem("path", path, "it reads files, and none is given", "write data_files: path/to/the/file")]
        return [problem for file in files for problem in _broken_data_file(file, None)]
    if Path(path).suffix in BUILDERS and not Path(path).is_dir():
        if not exists(path) and "://" not in path:
            return [
                Problem("path", path, "there is no such file", "give an existing file, from the current directory")
            ]
        return []
    if looks_local(path):
        if not Path(path).is_dir():
            return [Problem("path", path, "there is no such folder", "give an existing folder, or a Hub id")]
        return [problem for file in files for problem in _broken_data_file(file, Path(path))]
    if not HUB_NAME.fullmatch(path):
        remedy = "write owner/name, a folder, a file, or json with data_files"
        return [Problem("path", path, "it is neither a folder nor the id of a dataset on the Hub", remedy)]
    return []


def _listed_files(dataset: DatasetConfig) -> list[str]:
    files = dataset.data_files
    return [] if files is None else [files] if isinstance(files, str) else list(files)


def _broken_data_file(file: str, folder: Path | None) -> list[Problem]:
    if "://" in file:
        return []
    if file.startswith("~"):
        return [Problem("data_files", file, *_HOME)]
    if not _local_files(file, folder):
        where = f"from the folder {folder}" if folder else "from the current directory"
        return [Problem("data_files", file, "there is no such file", f"give an existing file, {where}")]
    return []


def _local_files(file: str, folder: Path | None = None) -> set[str]:
    """Real paths of the files that a name or a pattern stands for."""
    pattern = str(folder / file) if folder else file
    found = glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else [pattern] * exists(pattern)
    return {str(Path(name).resolve()) for name in found if Path(name).is_file()}


def share_rows(first: DatasetConfig, first_role: str, second: DatasetConfig, second_role: str) -> bool:
    """Whether two splits read the same rows, as far as their settings tell; `max_rows` is not looked at.

    Args:
        first_role, second_role: `train`, `validation` or `test`, the split that is read where none is named.
    """
    files = [_file_identities(dataset) for dataset in (first, second)]
    roles = ["train", "train"] if all(files) else [first_role, second_role]
    if not _splits_overlap(first.split or roles[0], second.split or roles[1]):
        return False
    if all(files):
        return bool(files[0] & files[1])
    return not any(files) and _identity(first) == _identity(second)


def _identity(dataset: DatasetConfig) -> tuple:
    path = str(Path(dataset.path).resolve()) if looks_local(dataset.path) else dataset.path
    return path, dataset.name, dataset.revision or "main"


def _file_identities(dataset: DatasetConfig) -> set:
    """What tells a split's files apart from another's; empty where it is not made of listed files."""
    path, files = dataset.path, _listed_files(dataset)
    if not files and Path(path).suffix in BUILDERS and not Path(path).is_dir():
        path, files = "json", [path]
    folder = Path(path) if path not in _READERS and looks_local(path) else None
    if path not in _READERS and folder is None:
        return {(*_identity(dataset), file) for file in files}
    return {name for file in files for name in (_local_files(file, folder) or {file})}


# name, or name[start:stop] in rows or in percent
_SLICE = re.compile(r"([^\[\]]+)(?:\[(\d*)(%?):(\d*)(%?)\])?")


def _splits_overlap(first: str, second: str) -> bool:
    return any(_parts_overlap(a.strip(), b.strip()) for a in first.split("+") for b in second.split("+"))


def _parts_overlap(first: str, second: str) -> bool:
    """Whether `train[:90%]` and `train[80%:]` share rows. Slices in different units cannot be told and pass."""
    match_1, match_2 = _SLICE.fullmatch(first), _SLICE.fullmatch(second)
    if match_1 is None or match_2 is None:
        return first == second
    (name, *slice_1), (other, *slice_2) = match_1.groups(), match_2.groups()
    if name != other:
        return False
    if slice_1[0] is None or slice_2[0] is None:
        return True
    units = {start_unit or stop_unit for _, start_unit, _, stop_unit in (slice_1, slice_2) if start_unit or stop_unit}
    counted = [bool(start and not unit) or bool(stop and not end) for start, unit, stop, end in (slice_1, slice_2)]
    if units and any(counted):
        return False
    (start_1, stop_1), (start_2, stop_2) = (
        (int(start or 0), int(stop) if stop else float("inf")) for start, _, stop, _ in (slice_1, slice_2)
    )
    return start_1 < stop_2 and start_2 < stop_1

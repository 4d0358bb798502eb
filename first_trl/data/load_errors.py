"""Say in plain words why a dataset could not be loaded, and what to do about it.

`datasets` reports a broken file, a missing split and an unreachable Hub in its own terms, several exceptions deep.
This module reads those exceptions and the local files, and finds the line at fault. It loads nothing, raises nothing.
"""

import errno
import glob
import json
from pathlib import Path

# File suffix -> builder of `datasets`.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


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

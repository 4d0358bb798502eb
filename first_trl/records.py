"""What a record says beside what is there today, and how a finished folder is replaced by its successor.

A job that takes long makes its folder anew in `new_folder`. Its record is written when all of it is there, and only
then are the two exchanged: a kill at any moment leaves the old folder or the new one whole. Which jobs there are, and
what they are made from, is `first_trl.run`.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import Digests


def read_json(file: Path) -> dict | None:
    """The mapping in a JSON file; None where there is no such file, or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def new_folder(folder: Path) -> Path:
    """Where the successor of a finished folder is made: on the same disk, whatever `folder` links to."""
    folder = folder.resolve()
    return folder.parent / ".new" / folder.name


def exchange(run: Path, folders: tuple[str, ...]) -> None:
    """Let the new folders of a job take the place of its finished ones.

    Args:
        folders: relative to the run folder.
    """
    for folder in folders:
        target, new = (run / folder).resolve(), new_folder(run / folder)
        old = new.with_name(f"{new.name}.old")
        if new.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            new.rename(target)
        if new.parent.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            with suppress(OSError):  # another job's new folder is in it
                new.parent.rmdir()


def finish_exchange(run: Path, folders: tuple[str, ...], outputs: dict[str, dict], digests: Digests) -> None:
    """Exchange folders that were recorded as finished, and whose exchange a kill prevented."""
    for file, recorded in outputs.items():
        folder = next(each for each in folders if file.startswith(f"{each}/"))
        made = new_folder(run / folder) / file.removeprefix(f"{folder}/")
        if not made.is_file() or digests.of(made) != recorded["sha256"]:
            return
    exchange(run, folders)


def differences(recorded: dict, today: dict) -> list[str]:
    """What has changed between the inputs in a record and those of today, in words; settings first."""
    found = []
    for kind in ("settings", "data", "models", "jobs"):
        before, now = _leaves(recorded.get(kind)), _leaves(today.get(kind))
        for place in sorted({*before, *now}):
            if before.get(place) != now.get(place):
                found.append(_difference(kind, place, before.get(place), now.get(place)))
    return found


def _difference(kind: str, place: tuple[str, ...], before: Any, now: Any) -> str:
    if "files" in place:
        of = ".".join(place[: place.index("files")])
        return f"{place[-1]} of {of} " + ("is new" if before is None else "is gone" if now is None else "has changed")
    if kind == "jobs":
        return f"{place[-1]} has changed since"
    values = ["not set" if value is None else repr(value) for value in (now, before)]
    return f"{'.'.join(place)} is {values[0]}, and was {values[1]} when it was made"


def _leaves(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{place: value} of everything in nested mappings that is no mapping, without what is None."""
    if not isinstance(value, dict):
        return {} if value is None else {place: value}
    return {at: leaf for key, item in value.items() for at, leaf in _leaves(item, (*place, str(key))).items()}

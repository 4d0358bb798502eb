"""Files and folders that are never seen half-written, what identifies a file, and the lock of whoever writes one.

Every file that the package writes for later reading goes through `write_atomically` or `replace_atomically`. A folder
that takes long is made in `new_folder`, and exchanged for the finished one when all of it is there.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import FirstTrlError

ALWAYS_READ_BELOW = 2**20  # bytes


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there replaces `path` when the block ends without error.

    A reader sees the old file or the new one, never a part: the new one is on the disk before it gets the name, and
    the name is on the disk when this returns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(file: Path) -> dict | None:
    """The mapping in a JSON file; None where there is no such file, or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """SHA-256 of files, kept in a file: one whose size, inode and times are as then is not read again.

    The time of the last change of status (ctime) cannot be set, so that other content under the same modification
    time is noticed. Files below a MiB are always read.

    Args:
        path: where the digests are kept.
        full: read every file, and update what is kept.
    """

    def __init__(self, path: Path, full: bool = False):
        self.path, self.full, self._known, self._changed = path, full, read_json(path) or {}, False

    def of(self, file: Path) -> str:
        """The digest of a file's content."""
        found = file.stat()
        if found.st_size < ALWAYS_READ_BELOW:
            return file_digest(file)
        state, key = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns], str(file.resolve())
        if self.full or self._known.get(key, [None])[:-1] != state:
            self._known[key], self._changed = [*state, file_digest(file)], True
        return self._known[key][-1]

    def save(self) -> None:
        """Keep what was read; a place that cannot be written only means that it is read again."""
        if self._changed:
            with suppress(OSError):
                write_atomically(self.path, json.dumps(self._known))
            self._changed = False


def files_of(folder: Path) -> list[str]:
    """The files below a folder, as sorted relative paths, without hidden ones."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def new_folder(folder: Path) -> Path:
    """Where the successor of a finished folder is made: on the same disk, whatever `folder` links to."""
    folder = folder.resolve()
    return folder.parent / ".new" / folder.name


def exchange(run: Path, folders: tuple[str, ...]) -> None:
    """Let new folders (relative to the run folder) take the place of finished ones; a kill leaves either whole."""
    for folder in folders:
        target, new = (run / folder).resolve(), new_folder(run / folder)
        old = new.with_name(f"{new.name}.old")
        if new.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        with suppress(OSError):  # there is none, or another job's new folder is in it
            new.parent.rmdir()


@contextmanager
def locked(path: str | Path, job: str) -> Iterator[None]:
    """Hold the lock file `path` while `job` is written; the system releases the lock of a process that dies.

    Raises:
        FirstTrlError: another process holds it; its pid and host are named.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise FirstTrlError(
            f"{job} is being written by {who}; wait for it or stop it, or choose another --name."
        ) from None
    try:
        write_atomically(holder, f"process {os.getpid()} on host {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()  # its empty file stays: removing it would let two processes hold a lock each

"""Files that are never seen half-written, what identifies a file, and the lock of whoever writes one.

Every file that the package writes for later reading goes through `write_atomically` or `replace_atomically`.
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import FirstTrlError

HASHED_BELOW = 64 * 2**20  # bytes; larger files are known by size and time of change


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there replaces `path` when the block ends without error.

    A reader sees the old file or the new one, never a part: the new one is on the disk before it gets the name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_fingerprint(path: str | Path) -> str:
    """A digest of a file or folder: contents of small files, size and modification time of large ones.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        small = status.st_size < HASHED_BELOW
        content = hashlib.sha256(file.read_bytes()).hexdigest() if small else str(status.st_mtime_ns)
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        digest.update(f"{name}\0{status.st_size}\0{content}\n".encode())
    return digest.hexdigest()


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
            f"{job} is being written by {who}. Wait until it ends, or stop it, and run again; or give this run a "
            "--name of its own."
        ) from None
    try:
        write_atomically(holder, f"process {os.getpid()} on host {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()  # its empty file stays: removing it would let two processes hold a lock each

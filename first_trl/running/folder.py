"""The run folder's memory: what each finished piece of work was made from, so that it is redone when that changes.

A record is one JSON file per piece of work in `<run>/.records`. It holds the inputs (settings, fingerprints of files,
identities of the records that came before) and the files that came out. A piece is current when a record exists, its
inputs equal today's, and its outputs are still there. Each record has an identity of its own, new at every making, so
redoing one piece makes everything built on it stale, and nothing else. Who makes a piece holds its lock meanwhile.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

HASHED_BELOW = 64 * 2**20  # bytes; larger files are known by size and time of change


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


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """Records of the work done in one run folder.

    Args:
        path: the folder, `runs/<name>`; made on the first record.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def _file(self, work: str, suffix: str = "") -> Path:
        return self.path / ".records" / f"{work}{suffix}.json"

    def record(self, work: str) -> dict | None:
        """The record of a finished piece of work, or None."""
        file = self._file(work)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def identity(self, work: str) -> str | None:
        """The identity of a finished piece of work, for the inputs of whatever is built on it."""
        record = self.record(work)
        return record["identity"] if record and self._outputs_exist(record) else None

    def is_current(self, work: str, inputs: dict) -> bool:
        """Whether `work` was finished from exactly these inputs and its outputs are still there."""
        record = self.record(work)
        return record is not None and record["inputs"] == _plain(inputs) and self._outputs_exist(record)

    def _outputs_exist(self, record: dict) -> bool:
        return all((self.path / name).exists() for name in record["outputs"])

    @contextmanager
    def held(self, work: str) -> Iterator[None]:
        """Hold `work`, so that no second command makes it at the same time, over the files of the first.

        The system lets go of the lock of a process that dies.

        Raises:
            ValueError: another process holds it; its pid and host are named.
        """
        folder = self.path / ".records"
        folder.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(folder / f"{work}.lock"), folder / f"{work}.holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
            raise ValueError(
                f"{work} of {self.path} is being made by {who}. Wait until it ends, or end it, and run again; or give "
                "this run a --name of its own."
            ) from None
        try:
            write_atomically(holder, f"process {os.getpid()} on host {socket.gethostname()}")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()  # its empty file stays: removing it would let two processes hold a lock each

    def start(self, work: str, inputs: dict) -> bool:
        """Note that `work` begins. True if it continues an interrupted attempt from the same inputs."""
        file = self._file(work, ".started")
        continues = file.is_file() and json.loads(file.read_text(encoding="utf-8")) == _plain(inputs)
        if not continues:
            write_atomically(file, json.dumps(_plain(inputs), indent=1))
        return continues

    def finish(self, work: str, inputs: dict, outputs: list[str], seconds: float) -> None:
        """Record that `work` is done.

        Args:
            outputs: paths relative to the run folder, all of which exist now.
        """
        missing = [name for name in outputs if not (self.path / name).exists()]
        assert not missing, f"{work} ended without writing {missing}"
        record = {
            "identity": uuid.uuid4().hex,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "outputs": outputs,
            "inputs": _plain(inputs),
        }
        write_atomically(self._file(work), json.dumps(record, indent=1))
        self._file(work, ".started").unlink(missing_ok=True)


def _plain(value):
    """`value` as it comes back from JSON, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))

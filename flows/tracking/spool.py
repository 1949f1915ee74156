"""What a server is to be told, kept on the disk until it was told: in order, across kills, and once.

A run's spool is a folder `.runs/spool/<id>/`: `journal.jsonl` holds one record a line, `delivered.json` how many bytes
of it arrived (and what the receiver wants to remember), `files/` copies of what records name. A record is written
before anyone delivers it and counted after; whoever is killed in between delivers it again, so receiving must be
idempotent. Its owner holds a lock on the journal: a journal without one is what a dead process left.
"""

import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from flows.workspace import files, paths
from flows.workspace.paths import MainCheckout
from tasks.errors import PipelineError
from tasks.frame import jsonl
from tasks.frame.stage import disk_full

Record = dict[str, Any]


class Held(PipelineError):
    """A living process owns this spool."""


class Spool:
    """One journal, owned by this process until `close`."""

    def __init__(self, main: MainCheckout, name: str, patience_s: float = 0.0) -> None:
        """Take up the journal of that name, or begin it.

        Raises:
            Held: a living process owns it, and goes on to.
        """
        self.folder = paths.spools(main) / name
        self._journal = _own(self.folder, time.monotonic() + patience_s)
        self._lock = threading.Lock()
        text = self._journal.read()
        whole = text.rfind(b"\n") + 1
        self._journal.truncate(whole)  # its writer was killed in the middle of a line
        self._written = whole
        state = self.folder / "delivered.json"
        known: dict[str, Any] = json.loads(state.read_bytes()) if state.exists() else {}
        self._delivered: int = known.get("bytes", 0)
        self.memory: dict[str, str] = known.get("memory", {})

    def add(self, **record: Any) -> None:
        """Keep one record.

        Raises:
            StageError: the disk is full.
        """
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            try:
                whole = self._journal.write(line) == len(line)
            except OSError:
                whole = False
            if not whole:
                self._journal.truncate(self._written)
                raise disk_full(self.folder)
            self._written += len(line)

    def keep(self, file: Path) -> str:
        """Copy a file, so that it can be delivered as it is now; returns what to name in a record.

        Raises:
            StageError: the disk is full.
        """
        place = self.folder / "files"
        try:
            place.mkdir(exist_ok=True)
            own = Path(tempfile.mkdtemp(dir=place))
            shutil.copyfile(file, own / file.name)
        except OSError as error:
            raise disk_full(self.folder) from error
        return str((own / file.name).relative_to(self.folder))

    def behind(self) -> bool:
        """Is there something that did not arrive yet?"""
        return self._delivered < self._written

    def records(self) -> Iterator[Record]:
        """All that was ever added."""
        yield from jsonl.read(self.folder / "journal.jsonl")

    def deliver(self, tell: Callable[[Record], None]) -> int:
        """Tell, in order, what did not arrive yet; returns how many records that were. What `tell` raises ends it,
        and the next call begins with that record.
        """
        count = 0
        with (self.folder / "journal.jsonl").open("rb") as journal:
            journal.seek(self._delivered)
            while self._delivered < self._written:
                line = journal.readline()
                tell(json.loads(line))
                self._count(len(line))
                count += 1
        return count

    def _count(self, arrived: int) -> None:
        self._delivered += arrived
        files.write(self.folder / "delivered.json", json.dumps({"bytes": self._delivered, "memory": self.memory}))

    def close(self) -> None:
        """Give it up; a journal that arrived whole is removed."""
        if not self.behind():
            shutil.rmtree(self.folder)
        self._journal.close()


def left(main: MainCheckout) -> list[str]:
    """Names of the journals whose owner is gone."""
    return [path.parent.name for path in sorted(paths.spools(main).glob("*/journal.jsonl")) if _ownerless(path)]


def _own(folder: Path, deadline: float) -> FileIO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        journal = (folder / "journal.jsonl").open("a+b", buffering=0)
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.close()
            if time.monotonic() > deadline:
                raise Held(f"another process delivers {folder} just now: try again in a minute") from None
            time.sleep(0.1)
            continue
        if os.fstat(journal.fileno()).st_nlink:
            journal.seek(0)
            return journal
        journal.close()  # its last owner removed it meanwhile


def _ownerless(path: Path) -> bool:
    try:
        with path.open("rb") as journal:
            fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return os.fstat(journal.fileno()).st_size > 0  # else its owner has only just made it
    except (BlockingIOError, FileNotFoundError):
        return False

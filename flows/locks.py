"""Who works where: one run at a time in a workspace, with its stages, and one at a time on a registered model.

Both are locks of the kernel's on files under `.runs/`, not concurrency limits of Prefect's: they are free the moment
their process is killed (a lease lasts on), hold while the server is away (a lease that could not be renewed three times
is given up for good), hold for runs without a server, and tell who has them.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from flows import versioning
from tasks.errors import PipelineError

MARK = "SLMOPS_RUN_PID"
ORPHAN_S = versioning.GRACE_S + 5.0  # in which the stage of a killed run ends


class Busy(PipelineError):
    """Another run works in this workspace, or on this model."""


@contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold the workspace for the run `name`; its stages join in (`joined`), and hold it should the run be killed.

    Raises:
        Busy: another run holds it; the message names that run.
    """
    path = root / ".runs" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + ORPHAN_S
    with path.open("a+") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if _holder_lives(path) or time.monotonic() > deadline:
                    raise Busy(_busy(path, root)) from None
            time.sleep(0.1)
        handle.seek(0)
        left = handle.read()
        if left:  # its run was killed, or it would have emptied the file
            _end_orphans(left)
        handle.truncate(0)
        holder = {"name": name, "pid": os.getpid(), "started": datetime.now().isoformat(" ", "seconds")}
        handle.write(json.dumps(holder))
        handle.flush()
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for its stages to join; no other run can take it
        except BlockingIOError:  # the moment between the two locks was another's
            raise Busy(_busy(path, root)) from None
        try:
            yield
        finally:
            handle.truncate(0)


@contextmanager
def joined(root: Path, stage: str) -> Iterator[tuple[int, int]]:
    """Hold the workspace with its run while one stage works, in whatever process and on whatever machine. Waits for
    what a killed worker left at work on this stage. Yields descriptors for dvc to keep open, as it may outlive us.
    """
    path = root / ".runs" / "logs" / f"{stage}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (root / ".runs" / "lock").open() as run, path.open("a") as own:
        fcntl.flock(run, fcntl.LOCK_SH)
        fcntl.flock(own, fcntl.LOCK_EX)
        yield run.fileno(), own.fileno()


@contextmanager
def one_at_a_time(main: Path, model: str, name: str) -> Iterator[None]:
    """Hold the registered model `model` for the run `name`.

    Raises:
        Busy: another run holds it; the message names that run.
    """
    path = main / ".runs" / "models" / model
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = f"run {path.read_text() or '(just starting)'} works on {model}"
            raise Busy(f"{holder}: wait for it, or give this run a model of its own (package.name)") from None
        handle.truncate(0)
        handle.write(name)
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def mark() -> None:
    """Let every process that this one starts carry its id, so that a later run can tell whose orphan it is."""
    os.environ[MARK] = str(os.getpid())


def _end_orphans(left: str) -> None:
    """End what a killed run left behind: Prefect's server, which would go on for ever. Its stage has ended: dvc, which
    holds the lock too, is ended with it (see versioning.py).
    """
    try:
        wanted = f"{MARK}={json.loads(left)['pid']}".encode()
    except (ValueError, KeyError):
        return  # killed in the middle of the line
    for entry in Path("/proc").glob("[0-9]*"):  # empty where there is no such thing
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGTERM)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # someone else's, or it ended meanwhile


def _holder_lives(path: Path) -> bool:
    try:
        return Path(f"/proc/{json.loads(path.read_text())['pid']}").exists() or not Path("/proc").exists()
    except ValueError:
        return False  # it is just writing that line, or someone looks whether the lock is held


def _busy(path: Path, root: Path) -> str:
    advice = "wait for it, or use `slmops run --worktree`"
    try:
        holder = json.loads(path.read_text())
    except ValueError:
        return f"another run works in {root}: {advice}"
    who = f"process {holder['pid']}" + ("" if _holder_lives(path) else " was killed, but its stage still works")
    return f"run {holder['name']} works in {root} since {holder['started']} ({who}): {advice}"


def held(root: Path) -> bool:
    """Does a run, or what is left of one, work in this workspace?"""
    path = root / ".runs" / "lock"
    if not path.exists():
        return False
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

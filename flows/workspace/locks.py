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
from contextlib import ExitStack, contextmanager
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any

from flows.workspace import paths, processes, versioning
from flows.workspace.paths import MainCheckout, Workspace
from tasks.errors import PipelineError, StageError

MARK = "SLMOPS_RUN_PID"  # for a person
MARK_EXACT = "SLMOPS_RUN"
ORPHAN_S = versioning.GRACE_S + 5.0  # in which the stage of a killed run ends


class Busy(PipelineError):
    """Another run works in this workspace, or on this model."""


@contextmanager
def locked(root: Workspace, name: str) -> Iterator[None]:
    """Hold the workspace for the run `name`; its stages join in (`joined`), and hold it should the run be killed.

    Raises:
        Busy: another run holds it; the message names that run.
    """
    path = paths.run_lock(root)
    deadline = time.monotonic() + ORPHAN_S
    with opened(path) as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holding = _holder(path)
                if (holding and _lives(holding)) or time.monotonic() > deadline:
                    raise Busy(_busy(path, root)) from None
            time.sleep(0.1)
        left = _holder(path)
        if left:  # its run was killed, or it would have emptied the file
            _end_orphans(left)
        started = datetime.now().isoformat(" ", "seconds")
        holder = {"name": name, "pid": os.getpid(), "started": started, "process": processes.identity(os.getpid())}
        _write(handle, path, json.dumps(holder))
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for its stages to join; no other run can take it
        except BlockingIOError:  # the moment between the two locks was another's
            raise Busy(_busy(path, root)) from None
        try:
            yield
        finally:
            handle.truncate(0)


@contextmanager
def joined(root: Workspace, stage: str) -> Iterator[tuple[int, int]]:
    """Hold the workspace with its run while one stage works, in whatever process and on whatever machine. Waits for
    what a killed worker left at work on this stage. Yields descriptors for dvc to keep open, as it may outlive us.
    """
    with opened(paths.run_lock(root)) as run, opened(paths.stage_lock(root, stage)) as own:
        fcntl.flock(run, fcntl.LOCK_SH)
        fcntl.flock(own, fcntl.LOCK_EX)
        yield run.fileno(), own.fileno()


@contextmanager
def one_at_a_time(main: MainCheckout, model: str, name: str) -> Iterator[None]:
    """Hold the registered model `model` for the run `name`.

    Raises:
        Busy: another run holds it; the message names that run.
    """
    path = paths.model_lock(main, model)
    with opened(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder_name = path.read_text(encoding="utf-8", errors="replace")[:200]
            holder = f"run {holder_name or '(just starting)'} works on {model}"
            raise Busy(f"{holder}: wait for it, or give this run a model of its own (package.name)") from None
        _write(handle, path, name)
        try:
            yield
        finally:
            handle.truncate(0)


@contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """A file to be locked, made where it is missing.

    Raises:
        StageError: it cannot be: the disk is full or read-only, or it belongs to someone else.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(path.open("a+b", buffering=0))
        except OSError as error:
            raise _unusable(path, error) from None
        yield handle


def _write(handle: FileIO, path: Path, text: str) -> None:
    """Say in a lock's file who holds it."""
    try:
        handle.truncate(0)
        handle.write(text.encode())
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> StageError:
    return StageError(
        f"the lock {path} cannot be taken ({error.strerror}): nothing was begun; see to the disk (`df {path.parent}`) and "
        "to who may write there, then run again"
    )


def mark() -> None:
    """Let every process that this one starts carry who it is, so that a later run can tell whose orphan it is."""
    os.environ[MARK], os.environ[MARK_EXACT] = str(os.getpid()), processes.identity(os.getpid())


def _end_orphans(left: dict[str, Any]) -> None:
    """End what a killed run left behind: Prefect's server, which would go on for ever. Its stage has ended: dvc, which
    holds the lock too, is ended with it (see versioning.py).
    """
    if left.get("process"):
        processes.signal_marked(f"{MARK_EXACT}={left['process']}", signal.SIGTERM)


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds a workspace, as its lock's file tells; None where it does not: it is empty, being written, or was damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= {"name", "pid", "started"} else None


def _lives(holder: dict[str, Any]) -> bool:
    return processes.lives(str(holder.get("process"))) or not processes.PROC.exists()


def _busy(path: Path, root: Workspace) -> str:
    advice = "wait for it, or use `slmops run --worktree`"
    holder = _holder(path)
    if holder is None:
        return f"another run works in {root}: {advice}"
    who = f"process {holder['pid']}" + ("" if _lives(holder) else " was killed, but its stage still works")
    return f"run {holder['name']} works in {root} since {holder['started']} ({who}): {advice}"


def held(root: Workspace) -> bool:
    """Does a run, or what is left of one, work in this workspace?"""
    path = paths.run_lock(root)
    if not path.exists():
        return False
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

"""The machine's cores: how many a process may use, and keeping them quiet while something is timed.

Variants are worked on in parallel, but a latency measured beside another variant's work is noise. Work
holds a lock of the workspace shared, a measurement holds it alone. Both pass through a turnstile first, so
that a waiting measurement keeps new work out and is never starved.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def available() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def threads() -> int:
    """Threads for ordinary work: OMP_NUM_THREADS, which a caller that runs several stages at once sets."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else available()


def others_work() -> str:
    """Says so, for a person, where other processes keep this machine busy: estimates made now are too long. Else empty."""
    load = os.getloadavg()[0]  # over the last minute
    return f"it is busy: load {load:.1f} on {available()} cores" if load > available() / 2 + 0.5 else ""


@contextmanager
def busy(folder: Path) -> Iterator[None]:
    """Work beside others, but not beside a measurement that locks the same folder."""
    with _lock(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Measure while nothing else that locks the same folder runs; waits until that is so."""
    with _lock(folder, fcntl.LOCK_EX):
        yield


@contextmanager
def _lock(folder: Path, kind: int) -> Iterator[None]:
    with (folder / ".quiet.turnstile").open("a") as turnstile, (folder / ".quiet.lock").open("a") as lock:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(lock, kind)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        yield

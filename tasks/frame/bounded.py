"""Work on files that anybody may have written, held to the time and memory that files of their size can need.

A template that loops, a normalizer that doubles its text, a card made to stall a parser: no check knows them all, and native
code listens to nobody. So the work goes on in a child, and its parent does nothing but look at it and end it.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tasks.errors import ArtifactError
from tasks.frame import events

_PROC = Path("/proc")
_EVERY_S, _ASK_S = 0.1, 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """What the work may use: seconds of a processor, bytes of memory."""

    cpu_s: float
    memory: float


def watch(limits: Callable[[], Limits], what: str) -> None:
    """Go on as a child of this process, which from here on only watches and ends as the child does.

    `limits` is asked again and again, for what is downloaded grows. Where the system does not tell what a process uses,
    nothing is watched.
    """
    if not (_PROC / "self" / "statm").is_file():
        return
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child is in our group, and tells what it was doing
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    allowed, asked = limits(), time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _end_as(status)
        if time.monotonic() - asked > _ASK_S:
            allowed, asked = limits(), time.monotonic()
        excess = _excess(child, allowed)
        if excess:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            text = (
                f"{what} was stopped: {excess}, far more than files of their size need: a chat template, a tokenizer, a card or "
                "the data makes work without end: take the model from another place, or the data in smaller parts"
            )
            events.error(ArtifactError.__name__, text)
            print(f"error: {text}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(_EVERY_S)


def _die_with(parent: int) -> None:
    """Let the system end this process with its parent, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def _end_as(status: int) -> None:
    """End this process as its child ended, by the same signal where it was one."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _excess(pid: int, limits: Limits) -> str | None:
    """By what a process is over its limits."""
    try:
        memory = int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):  # it is just ending
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    if memory > limits.memory:
        return f"it took {memory / 1e9:.1f} GB of memory"
    return f"it took {cpu_s:.0f} seconds of the processor" if cpu_s > limits.cpu_s else None


@contextmanager
def seconds(cpu_s: float, what: str) -> Iterator[None]:
    """End Python code of the main thread that takes longer; native code is left to `watch`.

    Raises:
        ArtifactError: it took longer.
    """

    def over(number: int, frame: FrameType | None) -> None:
        raise ArtifactError(f"{what} takes more than {cpu_s:g} seconds: take the model from another place")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

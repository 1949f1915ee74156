"""Which process a number means. Numbers come round again, after a reboot above all, so what is written down is boot, number
and start time together; and a signal goes to the process that was looked at, not to whoever has its number by then.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

PROC = Path("/proc")
WATCHED = """exec 3<&0 </dev/null
{{ read word <&3 || {{ kill -INT 0; sleep {grace}; kill -KILL 0; }}; }} &
exec "$@" 3<&-"""


def watched(command: Sequence[str], grace_s: int) -> list[str]:
    """The command, with a watcher in its process group. Start it in a session of its own, with a pipe as its input, which
    this process alone holds open: where that ends without a word, we were killed, and the group gets SIGINT, after `grace_s`
    SIGKILL. (In a shell's background SIGINT is ignored.) Once it has ended, a line sends the watcher home.
    """
    return ["/bin/sh", "-c", WATCHED.format(grace=grace_s), "sh", *command]


def identity(pid: int) -> str:
    """What tells a process apart from every other one, on this machine and for ever; "" where nobody can tell, or where there
    is no such process.
    """
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()  # a name may hold anything
        return f"{boot}:{pid}:{fields[19]}"  # ticks from boot to its start
    except (OSError, IndexError):
        return ""


def lives(written: str) -> bool:
    """Is the process of an `identity` still there?"""
    number = written.split(":")[1] if written.count(":") == 2 else ""
    return number.isdecimal() and identity(int(number)) == written


def signal_marked(mark: str, number: signal.Signals) -> list[int]:
    """Send a signal to every process but this one that carries `mark` (NAME=VALUE) in its environment; their numbers. None
    where there is no /proc.
    """
    pids = []
    for entry in PROC.glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            handle = os.pidfd_open(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(handle, number)
                pids.append(int(entry.name))
        except OSError:
            continue  # someone else's, or it ended meanwhile
        finally:
            os.close(handle)
    return pids

"""Keep servers alive: start each with a log of its own, wait until it is healthy, restart one that dies, end all.

Every server leads a process group and carries a mark in its environment, as does all that it starts. What has
left its group, or what a killed supervisor left behind, is found by the mark: process ids are used again, marks
are not.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from flows.workspace import processes
from tasks.errors import PipelineError

DEADLINE_S = 180.0  # for the first start on a slow disk, where a database is migrated too
GRACE_S = 10.0  # between asking a process to end and making it
RESTARTS, WINDOW_S = 3, 3600.0
# A server is asked so often, and may leave so many questions unanswered in a row. It is a count and a large one, since
# on a machine that trains a model all are slow, and whoever asks too.
PROBE_S, SILENT = 10.0, 12
TAIL = 15  # lines of a log that are told


class Died(PipelineError):
    """A server does not start, or ends again and again."""


@dataclass(frozen=True)
class Server:
    """One process. `healthy` is asked with a moment (epoch) since which there must be a sign of life; it may raise.
    While the server that it `needs` is silent, its own silence tells nothing.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    healthy: Callable[[float], bool]
    needs: str | None = None


class Supervisor:
    """Servers that live and end together. `mark`: NAME=VALUE in the environment of all of them."""

    def __init__(self, mark: str, folder: Path, tell: Callable[[str], None]) -> None:
        self._mark, self._folder, self._tell = mark, folder, tell
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._servers: dict[str, Server] = {}
        self._began: dict[str, float] = {}
        self._deaths: dict[str, list[float]] = {}
        self._asked: dict[str, float] = {}
        self._silent: dict[str, int] = {}  # questions in a row without an answer

    def start(self, server: Server) -> None:
        """Start a server and do not wait for it."""
        name, _, value = self._mark.partition("=")
        server.log.parent.mkdir(parents=True, exist_ok=True)
        if server.name not in self._servers and server.log.exists():
            server.log.replace(server.log.with_suffix(".old.log"))
        self._began[server.name] = time.time()
        with server.log.open("ab") as log:
            self._processes[server.name] = subprocess.Popen(
                server.command,
                cwd=self._folder,
                env={**server.env, name: value},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the supervisor alone, which ends them in order
            )
        self._servers[server.name] = server

    def wait(self, name: str) -> None:
        """Wait until a server is healthy.

        Raises:
            Died: it ended, or did not become healthy in time; with the last lines of its log.
        """
        server, deadline = self._servers[name], time.monotonic() + DEADLINE_S
        while not server.healthy(self._began[name]):
            code = self._processes[name].poll()
            if code is not None:
                raise Died(
                    f"{name} ended while it started ({_cause(code)}); the last lines of {server.log}:\n"
                    f"{tail(server.log)}\nmend what they say and run `slmops up` again"
                )
            if time.monotonic() > deadline:
                raise Died(
                    f"{name} did not become healthy in {DEADLINE_S:.0f} s; the last lines of {server.log}:\n"
                    f"{tail(server.log)}\nrun `slmops up` again when the machine is less busy"
                )
            time.sleep(0.2)
        self._asked[name], self._silent[name] = time.monotonic(), 0

    def watch(self, between: Callable[[], None] = lambda: None) -> NoReturn:
        """Restart what dies or hangs, until a server dies too often; call `between` again and again.

        What dies at work was most likely killed, by a person or for want of memory while a model was quantized,
        and comes back: stopping everything would lose the runs that go on. What dies as it starts has a cause
        that no restart mends, so that ends it all.

        Raises:
            Died: a server cannot be brought back.
        """
        while True:
            for name, process in list(self._processes.items()):
                if process.poll() is not None:
                    self._revive(name, process, f"ended ({_cause(process.returncode)})")
                elif self._hangs(name):
                    self._revive(name, process, f"gave no answer {SILENT} times in a row and was killed")
            between()
            time.sleep(0.5)

    def _hangs(self, name: str) -> bool:
        """Ask a server when it is time to; True when it was silent for too long, and may be restarted once more."""
        if time.monotonic() - self._asked[name] < PROBE_S:
            return False
        server = self._servers[name]
        unsure = server.needs is not None and self._silent[server.needs] > 0
        answers = unsure or server.healthy(time.time() - SILENT * PROBE_S)
        self._silent[name] = 0 if answers else self._silent[name] + 1
        self._asked[name] = time.monotonic()
        if self._silent[name] == SILENT and len(self._recent(name)) >= RESTARTS:
            self._tell(
                f"{name} gives no answer, but was started again {RESTARTS} times within an hour: it is left alone"
            )
            return False
        return self._silent[name] == SILENT

    def _recent(self, name: str) -> list[float]:
        return [at for at in self._deaths.get(name, []) if time.monotonic() - at < WINDOW_S]

    def _revive(self, name: str, process: "subprocess.Popen[bytes]", why: str) -> None:
        server = self._servers[name]
        self._deaths[name] = deaths = [*self._recent(name), time.monotonic()]
        cause = f"{name} {why}; the last lines of {server.log}:\n{tail(server.log)}"
        if len(deaths) > RESTARTS:
            raise Died(f"{cause}\nthat was {len(deaths)} times within an hour: mend it, then run `slmops up` again")
        self._tell(f"{cause}\n{name} is started again ({len(deaths)} of {RESTARTS} times an hour)")
        _signal_group(process.pid, signal.SIGKILL)  # a child of it may still hold the port
        process.wait()
        self.start(server)
        self.wait(name)
        self._tell(f"{name} is healthy again")

    def stop(self) -> None:
        """End all, the last started first, so that a worker can still say goodbye to its server."""
        for process in reversed(self._processes.values()):
            _signal_group(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
        end_marked(self._mark)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # all of it has ended


def marked(mark: str) -> list[int]:
    """The processes, but for this one, that carry NAME=VALUE in their environment."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):  # empty where there is no such thing
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # someone else's, or it ended meanwhile
    return [pid for pid in pids if pid != os.getpid()]


def end_marked(mark: str) -> int:
    """Ask every marked process to end, and make those that do not; how many there were."""
    pids = marked(mark)
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        deadline = time.monotonic() + seconds
        processes.signal_marked(mark, number)
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
    return len(pids)


def tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-TAIL:]) or "  (nothing)"


def _cause(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

"""Calls of dvc by a process that has it loaded, the host: to load DVC takes twice as long as most of what it is asked for.

The host is this very file, run as a script, so it knows the standard library and DVC alone. A call is a fork of it, in a session
of its own, with a folder, an environment and an output of its own. Should the caller go away, killed or by an exception, the
call gets SIGINT, and after GRACE_S seconds SIGKILL; the host ends with its last call.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

GRACE_S = 10  # from SIGINT to SIGKILL
# What `dvc repro` loads as it goes. Only time is lost where another version of DVC has no such module.
LATE = (
    "dvc.repo.reproduce", "dvc.repo.stage", "dvc.repo.params", "dvc.repo.metrics", "dvc.repo.plots", "dvc.repo.artifacts",
    "dvc.repo.datasets", "dvc.repo.open_repo", "dvc.dvcfile", "dvc.stage.run", "dvc.stage.cache", "dvc.cachemgr",
    "dvc.data_cloud", "dvc.lock", "dvc.rwlock", "dvc.fs", "dvc.scm", "dvc.utils.strictyaml", "dvc_http",
    "dvc_data.hashfile.db.local", "dvc_data.hashfile.status", "scmrepo.git", "dulwich.repo", "dulwich.client", "ruamel.yaml",
    "zc.lockfile", "psutil", "flatten_dict", "fsspec.implementations.memory", "configobj", "platformdirs", "pyparsing",
    "dulwich.ignore", "dulwich.worktree", "dulwich.trailers", "dvc.commands.status", "dvc.repo.status",
)  # fmt: skip
LOCK_S = 0.02  # from one look at DVC's lock to the next; its own 0.5 s is as long as all that is done while it is held


# --- the caller's side ------------------------------------------------------------------------------


class Call:
    """One call of dvc that was begun. `returncode` is None until `wait` saw its end, and negative for a signal."""

    def __init__(self, reply: int) -> None:
        self._reply = reply
        self.returncode: int | None = None
        self.pid = int(self._line() or 0)
        if not self.pid:
            os.close(reply)
            raise ChildProcessError("the process that calls dvc has died")

    def wait(self, seconds: float) -> bool:
        """Wait so long at most for its end; is that reached?"""
        if self.returncode is None and select.select([self._reply], [], [], seconds)[0]:
            if not (line := self._line()):  # the host was killed, and nobody else would end the call
                self._end()
            self.returncode = int(line or -signal.SIGKILL)
        return self.returncode is not None

    def close(self) -> None:
        """The caller wants no more of it: where it still works, it is ended."""
        os.close(self._reply)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(self.pid)
            os.killpg(self.pid, signal.SIGINT)
            if not select.select([ended], [], [], GRACE_S)[0]:
                os.killpg(self.pid, signal.SIGKILL)
            os.close(ended)

    def _line(self) -> bytes:
        text = b""
        while not text.endswith(b"\n") and (more := os.read(self._reply, 1)):
            text += more
        return text


class Host:
    """The host of this process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        command = [sys.executable, "-P", __file__]  # -P: it imports nothing of the folder that it lies in
        self.process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
        theirs.close()

    def call(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        env: Mapping[str, str],
        out: int,
        err: int,
        keep_open: Sequence[int],
    ) -> Call:
        """Begin `dvc ARGUMENTS` in a folder; what it prints goes to the descriptors `out` and `err`, and `keep_open` stay
        open in it.

        Raises:
            OSError: the host has died.
        """
        told, (reply, theirs) = os.memfd_create("call of dvc"), os.pipe()
        try:
            with open(told, "wb", closefd=False) as file:
                file.write(json.dumps({"arguments": list(arguments), "folder": str(folder), "env": dict(env)}).encode())
            with self._lock:
                socket.send_fds(self._control, [b"."], [told, theirs, out, err, *keep_open])
        except BaseException:
            os.close(reply)
            raise
        finally:
            os.close(told)
            os.close(theirs)
        return Call(reply)


_host: Host | None = None
_starting = threading.Lock()


def call(
    arguments: Sequence[str], *, folder: Path, env: Mapping[str, str], out: int, err: int, keep_open: Sequence[int] = ()
) -> Call:
    """`Host.call` by this process's own host, which is started where there is none or where it died."""
    global _host
    with _starting:
        if _host is None or _host.process.poll() is not None:
            _host = Host()
        host = _host
    return host.call(arguments, folder=folder, env=env, out=out, err=err, keep_open=keep_open)


# --- the host's side --------------------------------------------------------------------------------


@dataclass
class _Working:
    """A call at work: the process that it is, which leads a group; where its end is told; when it is to be killed."""

    pid: int
    pidfd: int
    reply: int
    kill_at: float = float("inf")

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def main() -> None:
    """Serve calls until the caller is gone and none works any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, caller_lives = os.dup(0), True
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    import dvc.logger
    from dvc.cli.parser import get_main_parser

    get_main_parser()
    with contextlib.suppress(AttributeError, TypeError):
        dvc.logger.setup(log_colors=False)  # it looked whether our standard error is a terminal; a call's is none
    for name in LATE:
        with contextlib.suppress(ImportError):
            import_module(name)
    for quicken in (_look_often, _save_one_stage):
        with contextlib.suppress(ImportError, AttributeError):
            quicken()
    working: list[_Working] = []
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while caller_lives or working:
        next_kill = min((each.kill_at for each in working), default=float("inf")) - time.monotonic()
        ready = {fd for fd, _ in poll.poll(None if next_kill == float("inf") else max(0.0, 1e3 * next_kill))}
        if caller_lives and control in ready:
            begun = _begin(control)
            if begun:
                working.append(begun)
                poll.register(begun.pidfd, select.POLLIN)
                poll.register(begun.reply, 0)  # tells when nobody can read it any more
            else:
                poll.unregister(control)
                caller_lives = False
        for each in list(working):
            if each.pidfd in ready:
                working.remove(each)
                for fd in (each.pidfd, each.reply):
                    with contextlib.suppress(KeyError):
                        poll.unregister(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(each.pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(each.reply, f"{code}\n".encode())
                os.close(each.pidfd)
                os.close(each.reply)
            elif each.reply in ready:
                poll.unregister(each.reply)
                each.signal(signal.SIGINT)
                each.kill_at = time.monotonic() + GRACE_S
            elif time.monotonic() >= each.kill_at:
                each.signal(signal.SIGKILL)
                each.kill_at = float("inf")


def _begin(control: int) -> _Working | None:
    """The call that is asked for, begun; None where the caller is gone."""
    with socket.socket(fileno=os.dup(control)) as asked:
        _, fds, _, _ = socket.recv_fds(asked, 1, 64)
    if not fds:
        return None
    told, reply, out, err, *keep = fds
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = _called(told, out, err, keep)
        except BaseException:  # noqa: BLE001 (nothing of a fork may go on as the host)
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    for fd in (told, out, err, *keep):
        os.close(fd)
    with contextlib.suppress(BrokenPipeError):
        os.write(reply, f"{pid}\n".encode())
    return _Working(pid, os.pidfd_open(pid), reply)


def _called(told: int, out: int, err: int, keep: Sequence[int]) -> int:
    """What a fork of the host does."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.lseek(told, 0, os.SEEK_SET)
    with open(told, "rb", closefd=False) as file:
        request = json.load(file)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) > 2 and int(entry) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(entry))
    for fd in keep:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    from dvc.cli import main as dvc

    sys.argv = ["dvc", *request["arguments"]]
    code: int = dvc(request["arguments"])
    return code


# --- what DVC does slowly ---------------------------------------------------------------------------
# Where another version of DVC lacks what is replaced here, it stays as slow.


def _look_often() -> None:
    """Have a call that waits for DVC's lock (`--wait-for-lock`) take it as soon as it is free."""
    from dvc.lock import Lock, LockError

    theirs = Lock.lock

    def lock(self: Lock) -> None:
        while self._wait:
            try:
                self._do_lock()
                return
            except LockError:
                time.sleep(LOCK_S)
        theirs(self)

    _ = Lock._do_lock  # or AttributeError
    Lock.lock = lock


def _save_one_stage() -> None:
    """Have a call replace its stage's part of dvc.lock, at once. DVC parses and writes all of it anew, half a second with
    thirty stages, and in place, so that who is killed in it leaves half a file. The bytes are the same.
    """
    from dvc.dvcfile import Lockfile, logger
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml

    theirs, head = Lockfile.dump_stages, "schema: '2.0'\nstages:\n"

    def dump_stages(self: Lockfile, stages: Sequence[Any], **options: Any) -> None:
        path = Path(self.path)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        parts = re.split(r"^  (?=\S)", text.removeprefix(head), flags=re.MULTILINE)
        known = {part.partition(":\n")[0]: part for part in parts[1:]}
        whole = text.startswith(head) and text.endswith("\n") and parts[0] == "" and len(known) == len(parts) - 1
        if (
            not whole
            or not all(re.fullmatch(r"[\w@.-]+", name) for name in known)
            or re.search(r"\n[^ ]", text[len(head) :])
        ):
            theirs(self, stages, **options)  # it is not of the form that DVC gives it
            return
        for stage in stages:
            made = dumps_yaml({"stages": to_lockfile(stage, **options)})
            known[stage.name] = made.removeprefix("stages:\n  ")
        if (new := head + "".join(f"  {part}" for part in known.values())) != text:
            logger.info("Updating lock file '%s'", self.relpath)
            beside = Path(self.repo.tmp_dir) / f"dvc.lock.{os.getpid()}"
            beside.write_text(new, encoding="utf-8")
            beside.replace(path)
            self.repo.scm_context.track_file(self.relpath)

    Lockfile.dump_stages = dump_stages


if __name__ == "__main__":
    main()

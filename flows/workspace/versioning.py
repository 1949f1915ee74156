"""Calls of dvc. DVC is the only content cache: what is done is not done again."""

import configparser
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from flows import environment
from flows.workspace import dvc_host, files, paths
from flows.workspace.paths import MainCheckout, Workspace
from tasks import errors
from tasks.errors import ArtifactError, ConfigError, PipelineError, StageError
from tasks.frame import crashes
from tasks.frame.manifest import sha256

Event = dict[str, Any]
POLL_S = 0.1
GRACE_S = dvc_host.GRACE_S

_children: dict[int, Path] = {}  # of this process, with the workspace of each, so that `interrupt` can reach them
_interrupted: set[int] = set()


class Stopped(PipelineError):
    """A person or the system asked the run to stop. Never retried."""


@dataclass(frozen=True)
class Outcome:
    """How DVC came to a stage's output. `stage_s`: the stage command's own seconds, 0 unless it ran."""

    how: Literal["ran", "restored", "unchanged"]
    stage_s: float
    total_s: float


def address(stage: str, *item: str) -> str:
    """DVC's name of a stage, of whose item it takes the words: `quantize@q4_0`."""
    return f"{stage}@{'-'.join(item)}" if item else stage


def stage_environment() -> dict[str, str]:
    """What a dvc process gets: no telemetry, and this very interpreter for the stage (see infra/python)."""
    return {**environment.NO_TELEMETRY, **os.environ, "SLMOPS_PYTHON": sys.executable}


def repro(
    root: Workspace,
    stage: str,
    *item: str,
    log: Path,
    events: Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    env: Mapping[str, str | None] | None = None,
    keep_open: tuple[int, ...] = (),
) -> Outcome:
    """Bring one stage up to date in the workspace `root`; its inputs must be so already.

    The output of dvc and of the stage goes to `log`, and what the stage tells (`tasks/frame/events.py`) is appended to the
    file `events`; `on_event` gets each of that within a fraction of a second, in the calling thread. `env`: what dvc gets
    beside our own environment, or not (None). Should this process be killed, dvc and the stage are ended too; the
    descriptors `keep_open` stay open in dvc, so that a lock outlives us for as long as that takes.

    Raises:
        PipelineError: of the stage's own family, with its own message.
        StageError: the stage died without a word; of its own family, where to run it again will not help.
        ArtifactError: DVC's own state is damaged.
    """
    name = address(stage, *item)
    log.parent.mkdir(parents=True, exist_ok=True)
    events = events or log.with_suffix(".jsonl")
    events.touch()
    events_seen: list[Event] = []
    started = time.monotonic()
    given = {**stage_environment(), **(env or {}), "SLMOPS_EVENTS": str(events.absolute())}
    with log.open("wb") as out, events.open(encoding="utf-8") as stream:
        stream.seek(0, os.SEEK_END)  # what earlier attempts told is not of this one
        call = dvc_host.call(  # in a session of its own: Ctrl-C reaches us alone, and `interrupt` the whole family
            ["--wait-for-lock", "repro", "--single-item", name],
            folder=root,
            env={name: value for name, value in given.items() if value is not None},
            out=out.fileno(),
            err=out.fileno(),
            keep_open=keep_open,
        )
        with _child(call, root):
            reader = appended(stream)
            ended = False
            while not ended:
                ended = call.wait(POLL_S)
                for event in reader():
                    events_seen.append(event) if event["event"] != "progress" else None
                    on_event(event)
    total = time.monotonic() - started
    text = log.read_text(encoding="utf-8", errors="replace")
    if call.returncode != 0 and call.pid in _interrupted:
        raise Stopped(f"{name} was stopped: run again, it takes up where it can")
    if call.returncode != 0:
        raise _failure(text, events_seen, name, log, root)
    if f"Running stage '{name}'" not in text:
        return Outcome("restored" if "is cached - skipping run" in text else "unchanged", 0.0, total)
    own = [event["seconds"] for event in events_seen if event["event"] == "finished"]
    return Outcome("ran", own[-1] if own else total, total)


def status(root: Workspace) -> dict[str, Any]:
    """What DVC finds changed, by stage; empty when the workspace is up to date.

    Raises:
        StageError: dvc cannot tell.
    """
    result: dict[str, Any] = json.loads(_dvc(root, "status", "--json"))
    return result


def changed_since(root: Workspace, lock: str) -> list[str]:
    """What DVC finds changed in the workspace `root` since `lock`, a dvc.lock, was written: data, params and code,
    each by its name. What the stages made is no part of it, so it need not be there.

    Raises:
        StageError: dvc cannot tell.
    """
    path = paths.dvc_lock(root)
    own = path.read_bytes() if path.exists() else None
    path.write_text(lock)
    try:
        stages = status(root)
    finally:
        path.write_bytes(own) if own is not None else path.unlink()
    changed: set[str] = set()
    for stage, notes in stages.items():
        for note in notes:
            if isinstance(note, str):  # "changed command"
                changed.add(f"the command of {stage}")
                continue
            for name, how in note.get("changed deps", {}).items():
                if not name.startswith("build/"):
                    changed |= set(how) if isinstance(how, dict) else {name}  # a dict: the keys of a params file
    return sorted(changed)


def lock_digest(root: Workspace) -> str:
    """sha256 of dvc.lock, or "none" before anything ran."""
    path = paths.dvc_lock(root)
    return sha256(path) if path.is_file() else "none"


def cache_folder(root: Workspace) -> Path:
    """The DVC cache of a workspace."""
    return (root / _dvc(root, "cache", "dir").strip()).resolve()


def share(root: Workspace, main: MainCheckout) -> None:
    """Give the worktree `root` the cache (its run cache included), the remotes and the local settings of the checkout
    `main`, for this machine only: neither an address nor a secret is part of a commit's meaning.
    """
    config = configparser.ConfigParser(interpolation=None)
    config.read([main / ".dvc" / "config", main / ".dvc" / "config.local"], encoding="utf-8")
    for section in config.values():
        url = section.get("url", "").strip("'\"")
        if url and "://" not in url:  # a folder, relative to .dvc
            section["url"] = str((main / ".dvc" / url).resolve())
    config.read_dict({"cache": {"dir": str(cache_folder(paths.own_workspace(main)))}})
    text = io.StringIO()
    config.write(text)
    files.write(root / ".dvc" / "config.local", text.getvalue(), private=True)


def checkout(root: Workspace, *targets: str) -> None:
    """Restore from the cache what .dvc files point to, or what stages made as dvc.lock has it.

    Raises:
        ConfigError: a stage made nothing yet.
        StageError: the cache lacks it.
    """
    stages = [target for target in targets if not target.endswith(".dvc")]
    lock = paths.dvc_lock(root)
    made = yaml.safe_load(lock.read_bytes())["stages"] if stages and lock.exists() else {}
    missing = [stage for stage in stages if stage not in made]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not made yet; what was: {', '.join(made) or 'nothing'}: choose among that, or run "
            "the pipeline"
        )
    _dvc(root, "checkout", *targets)


def restore(root: Workspace, *stages: str) -> str:
    """`checkout` for what stages made; what the cache lacks comes from the default remote. Returns what was brought
    from there, "" if nothing.

    Raises:
        ConfigError: a stage made nothing yet.
        ArtifactError: neither cache nor remote has it.
    """
    said = ""
    try:
        checkout(root, *stages)
    except StageError as missing:
        remote = _dvc(root, "config", "core.remote").strip()
        if not remote:
            raise ArtifactError(
                f"what {', '.join(stages)} made is not in the cache, and there is no default DVC remote to bring it from: "
                f"run that commit again ({missing})"
            ) from None
        try:
            said = f"pulled from the DVC remote {remote}: {_last_line(_dvc(root, 'pull', '--remote', remote, *stages))}"
        except StageError as error:
            raise ArtifactError(
                f"what {', '.join(stages)} made is neither in the cache nor could it be pulled from the DVC remote {remote} "
                f"({error}): `dvc push` where it was made, or run that commit again"
            ) from None
    return said


def push(root: Workspace, *targets: str) -> str:
    """Send what dvc.lock and the .dvc files name, or of it the targets alone, to the default remote; returns what came of
    it. A workspace without a default remote is in order.

    Raises:
        StageError: the remote cannot be reached or refuses; the cache here keeps everything.
    """
    remote = _dvc(root, "config", "core.remote").strip()
    if not remote:
        return "not pushed: no default DVC remote is set (`dvc remote add -d NAME URL` sets one)"
    try:
        said = _dvc(root, "push", "--remote", remote, *targets)
    except StageError as error:
        raise StageError(
            f"{error}: nothing is lost, the cache keeps it all: mend the address or the credentials of the remote "
            f"{remote} (environment or .dvc/config.local, never .dvc/config), then `dvc push`"
        ) from None
    return f"pushed to the DVC remote {remote}: {_last_line(said)}"


def collect(root: Workspace, beside: Sequence[Path], *, do: bool) -> str:
    """`dvc gc` that keeps what the workspace, all branches and tags, and the workspaces `beside` need; dry unless `do`. What
    it says of stages that were not run yet is left out.

    Raises:
        StageError: dvc refuses.
    """
    others = ("--projects", *map(str, beside)) if beside else ()
    how = "--force" if do else "--dry"
    said = _dvc(root, "gc", "--workspace", "--all-branches", "--all-tags", how, *others, stderr=True)
    return "\n".join(line for line in said.splitlines() if line.strip() and not line.startswith("WARNING: Output"))


def check_state(root: Workspace) -> None:
    """Hold DVC's own files against their form before work starts. Call it when no dvc runs here.

    Raises:
        ArtifactError: a killed process left one of them damaged.
        ConfigError: `root` is no workspace.
    """
    if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
        raise ConfigError(f"{root} is no workspace (dvc.yaml or .dvc is missing): run from a checkout of slmops")
    _check_rwlock(root)
    try:
        content = yaml.safe_load(paths.dvc_lock(root).read_bytes())
    except FileNotFoundError:
        return
    except (yaml.YAMLError, UnicodeDecodeError):
        raise _damaged_lock(root) from None
    if not isinstance(content, dict) or "schema" not in content:
        raise _damaged_lock(root)


def _check_rwlock(root: Workspace) -> None:
    """DVC holds a file locked for as long as a process of the writer's number lives, and numbers come round again."""
    path = root / ".dvc/tmp/rwlock"
    try:
        content = json.loads(path.read_bytes())
        writers = list(content.get("write", {}).values())
        readers = [each for several in content.get("read", {}).values() for each in several]
        holders = {int(each["pid"]) for each in writers + readers}
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _damaged_rwlock(root) from None
    for pid in sorted(holders):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it ended, which DVC sees, or this system does not tell
        if b"dvc" not in command:
            said = command.replace(b"\0", b" ").decode(errors="replace").strip()[:100]
            raise ArtifactError(
                f"{path} says that process {pid} uses this workspace, but that number is now another program's ({said}): a "
                "dvc was killed; delete the file, no work is lost"
            )


def interrupt(root: Workspace) -> None:
    """Stop every dvc that this process started in the workspace `root`, with its stage: SIGINT, after a while SIGKILL."""
    deadline = time.monotonic() + GRACE_S
    while _signal_all(root, signal.SIGINT) and time.monotonic() < deadline:
        time.sleep(0.5)
    _signal_all(root, signal.SIGKILL)


def _signal_all(root: Workspace, number: int) -> list[int]:
    pids = [pid for pid, place in list(_children.items()) if place == root]
    for pid in pids:
        _interrupted.add(pid)
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            continue  # it ended by itself
    return pids


@contextmanager
def _child(call: dvc_host.Call, root: Workspace) -> Iterator[None]:
    """Keep a call where `interrupt` finds it; should an exception carry us off, it is ended."""
    _children[call.pid] = root
    _interrupted.discard(call.pid)  # of an earlier process of that id
    try:
        yield
    finally:
        del _children[call.pid]
        call.close()


def appended(stream: IO[str]) -> Callable[[], Iterator[Event]]:
    """A reader of the events that were appended since it was last called; half a line is left for next time."""
    rest = ""

    def read() -> Iterator[Event]:
        nonlocal rest
        *whole, rest = (rest + stream.read()).split("\n")
        yield from map(json.loads, whole)

    return read


def _dvc(root: Workspace, *arguments: str, stderr: bool = False) -> str:
    # In memory, so that what a full disk forbids is told by DVC itself.
    with open(os.memfd_create("out"), "w+b") as out, open(os.memfd_create("err"), "w+b") as err:
        try:
            call = dvc_host.call(arguments, folder=root, env=stage_environment(), out=out.fileno(), err=err.fileno())
        except OSError as error:
            raise StageError(
                f"dvc {' '.join(arguments)} could not be started in {root} ({error}): run it again"
            ) from error
        with _child(call, root):
            while not call.wait(POLL_S):
                pass
        said, complaints = _content(out), _content(err)
    if call.returncode != 0:
        raise StageError(f"dvc {' '.join(arguments)} failed in {root}: {_dvc_error(complaints or said)}")
    return said + (complaints if stderr else "")


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _failure(text: str, events: list[Event], name: str, log: Path, root: Workspace) -> PipelineError:
    """The stage's own words if it had any, else what can be told from DVC's."""
    for event in events:
        if event["event"] == "error":
            family: type[PipelineError] = getattr(errors, event["family"])
            return family(f"{name}: {event['text']}")
    own = _own_error(text)
    if own:
        return StageError(f"{name}: {own}")
    if "RWLock-file" in text:
        return _damaged_rwlock(root)
    if "it is being blocked by" in text:
        holders = "; ".join(line.strip() for line in text.splitlines() if line.strip().startswith("(PID "))
        return StageError(
            f"{name}: another dvc works on its files here ({holders[:200]}): wait for it; if there is no such process, delete "
            f"{root / '.dvc/tmp/rwlock'}"
        )
    if "dvc.lock' is invalid" in text or "dvc.lock' validation failed" in text:
        return _damaged_lock(root)
    if "are missing from" in text or "dvc.yaml' is invalid" in text or "dvc.yaml' validation failed" in text:
        return ConfigError(f"{name}: {_dvc_error(text)}: params.yaml must hold each section that dvc.yaml names")
    if "Running stage" in text:
        code = re.findall(r"exited with (-?\d+)", text)
        return crashes.error_for(name, int(code[-1]) if code else 1, _stage_output(text), root, f": see {log}")
    return StageError(f"{name}: dvc failed: {_dvc_error(text)}: see {log}")


def _own_error(text: str) -> str:
    """The `error: ...` of `python -m tasks`, with the indented lines that belong to it."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("error: "):
            lines = [line.removeprefix("error: ")]
        elif lines and line.startswith("  "):
            lines.append(line)
    return "\n".join(lines)


def _dvc_error(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("ERROR: "):
            return line.removeprefix("ERROR: ")
    return _last_line(text)


def _stage_output(text: str) -> str:
    """All before DVC's own report."""
    return text.split("ERROR: failed to reproduce")[0]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _damaged_rwlock(root: Workspace) -> ArtifactError:
    path = root / ".dvc/tmp/rwlock"
    return ArtifactError(f"{path} is damaged (a process was killed while it wrote): delete it, no work is lost")


def _damaged_lock(root: Workspace) -> ArtifactError:
    path = paths.dvc_lock(root)
    return ArtifactError(
        f"{path} is damaged: `git checkout dvc.lock` or delete it, then run again: finished stages come from the cache"
    )

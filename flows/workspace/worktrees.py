"""Where a run works: the current checkout under a lock (see locks.py), or a git worktree of its own under `.runs/`.

A worktree run starts from a commit, has its effective params.yaml written into it, shares the DVC cache (so
what was done anywhere is restored, not redone) and ends as a commit on `runs/<name>` that holds params.yaml
and dvc.lock. The checkout it was started from, and its index, are never touched.
"""

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.workspace import files, locks, paths, versioning
from flows.workspace.paths import MainCheckout, Workspace
from tasks import params, stages
from tasks.acquire.params import Acquire
from tasks.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
COMMIT = re.compile(r"\w[\w./~^@{}-]*")  # nothing that git would take for an option
BEGIN = "and a run is told by its commit: `git init && git add -A && git commit -m start` there, then again"


@dataclass(frozen=True)
class Run:
    """One row of `slmops runs`."""

    name: str
    state: str  # running, waiting (for approval), finished or stopped
    folder: Workspace
    commit: str


def find(start: Path) -> Workspace:
    """The workspace that holds `start`: the nearest folder upwards with dvc.yaml and params.yaml.

    Raises:
        ConfigError: there is none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return Workspace(folder)
    raise ConfigError(f"{start.resolve()} lies in no workspace (a folder with dvc.yaml and params.yaml): go to one")


# The person's own settings are for the person's own work: none may stop a run at its last step, run a program of theirs,
# or change a byte of what runs start from.
OURS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.safecrlf": "false",
    "commit.gpgSign": "false",
    "commit.cleanup": "whitespace",  # a line of a table may begin with #
    "color.ui": "false",
}
PLAIN = {"core.autocrlf": "false", "core.eol": "lf"}  # where files are written: DVC compares their bytes
# Set where git itself calls us (a hook, `git rebase --exec`): they name another repository than the folder's.
STRAY = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_NAMESPACE",
)  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command in a folder, whatever the person's settings: without hooks and signatures, and with a
    committer even where none is configured.

    Raises:
        ConfigError: git refuses, with its own words, or is not installed.
    """
    settings = {**OURS, **(PLAIN if arguments[0] == "worktree" else {})}
    if arguments[0] == "commit" and not all(_asks(folder, name) for name in ("user.name", "user.email")):
        settings |= {"user.name": "slmops", "user.email": "slmops@localhost"}
    done = _call(folder, *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")), *arguments)
    if done.returncode != 0:
        raise ConfigError(f"git {' '.join(arguments[:2])} failed in {folder}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def _asks(folder: Path, setting: str) -> bool:
    return _call(folder, "config", setting).returncode == 0


def _call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in STRAY} | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(
            ["git", *words], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError:
        if not folder.is_dir():  # removed at this moment
            raise
        raise ConfigError(
            "git is not installed: `slmops doctor` tells how to get it and what else is missing"
        ) from None


def main_root(root: Workspace) -> MainCheckout:
    """The checkout that a worktree belongs to (itself for a plain checkout): registry and tracking lie there.

    Raises:
        ConfigError: `root` is not under git.
    """
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise ConfigError(f"{root} is under no version control, {BEGIN}")
    common = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    return MainCheckout(common.parent if common.name == ".git" else root)


def check_commit(root: Workspace) -> None:
    """See that there is a commit to work from.

    Raises:
        ConfigError: there is none.
    """
    if _call(root, "rev-parse", "--quiet", "--verify", "HEAD^{commit}").returncode != 0:
        raise ConfigError(f"{root} has no commit yet, {BEGIN}")


def fetch(main: MainCheckout, commit: str) -> None:
    """Where `commit` is a branch of a remote (`origin/main`), ask the remote what it is now.

    Raises:
        ConfigError: git cannot fetch.
    """
    remote, _, branch = commit.partition("/")
    if branch and remote in git(main, "remote").split():
        git(main, "fetch", "--quiet", remote)


def new_name() -> str:
    """A name for a run that the person did not name."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def check_name(name: str) -> None:
    """A run's name becomes a folder and a branch.

    Raises:
        ConfigError: it cannot.
    """
    if not NAME.fullmatch(name) or name in paths.RESERVED or name.endswith((".lock", ".")) or ".." in name:
        raise ConfigError(f"--name {name}: use up to 63 letters, digits, dots, dashes and underscores")


@dataclass(frozen=True)
class Effective:
    """The params of a run: the text of its params.yaml, comments kept, and the checked values."""

    text: str
    params: params.Params


def effective(source: bytes | None, where: str, overrides: Sequence[str]) -> Effective:
    """The content of a params file with the overrides written into it.

    Raises:
        ConfigError: lists every problem.
    """
    if source is None:
        raise ConfigError(f"{where} is not a file: name a readable one with --params")
    raw = params.parsed(source, where, overrides)
    checked = params.check(raw, params.shown(where, overrides))
    if missing := stages.unnamed(raw, checked):
        raise ConfigError(f"{where} must name {', '.join(missing)}: DVC watches each, and reads no defaults")
    text = source.decode()
    return Effective(_with_overrides(text, overrides) if overrides else text, checked)


def _with_overrides(text: str, overrides: Sequence[str]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    raw: Any = yaml.load(text)
    for override in overrides:
        params.put(raw, override, yaml.load)
    out = io.StringIO()
    yaml.dump(raw, out)
    return out.getvalue()


@contextmanager
def in_place(root: Workspace, name: str, file: Path | None, overrides: Sequence[str]) -> Iterator[params.Params]:
    """The current checkout for a run: locked, with the effective params in its params.yaml. Yields them.

    Raises:
        Busy: another run works here.
        ConfigError: the name or the params are wrong, or `file` would replace changes that are not committed.
    """
    check_name(name)
    with locks.locked(root, name):
        target = paths.params_file(root)
        source = file or target
        made = effective(source.read_bytes() if source.is_file() else None, str(source), overrides)
        replaces = source.resolve() != target.resolve()
        if replaces and git(root, "status", "--porcelain", "--", target.name):
            raise ConfigError(
                f"{target} has changes that are not committed, and --params {file} would replace them: "
                "commit them, or `git checkout params.yaml`, or use --worktree"
            )
        if replaces or overrides:
            files.write(target, made.text)
        yield made.params


@contextmanager
def worktree(main: MainCheckout, name: str, commit: str, planned: Effective) -> Iterator[Workspace]:
    """`.runs/<name>` for a run: at `commit`, locked, with the params that were `planned` and the shared DVC cache.

    A run that stopped before is taken up again, with the params that are given now. Yields the folder.
    Everything is checked before anything is made.

    Raises:
        Busy: the run of that name still works.
        ConfigError: the name is taken or malformed, or a local input is not part of the commit.
    """
    check_name(name)
    root, branch = paths.worktree(main, name), f"runs/{name}"
    if paths.finished(root).exists():
        raise ConfigError(f"run {name} is finished (branch {branch}): choose another --name")
    fresh = not root.exists()
    if fresh and git(main, "branch", "--list", branch):
        raise ConfigError(f"a run named {name} has ended as branch {branch}: choose another --name")
    pointer = _pointer(main, planned.params.acquire, commit)
    if fresh:
        git(main, "worktree", "prune")
        git(main, "worktree", "add", "-q", "-b", branch, str(root), commit)
    with locks.locked(root, name):
        files.write(paths.params_file(root), planned.text)
        versioning.share(root, main)
        if pointer:
            versioning.checkout(root, str(pointer))
        yield root


def planned(main: MainCheckout, name: str, commit: str, file: Path | None, overrides: Sequence[str]) -> Effective:
    """The params with which the worktree run `name` works.

    Raises:
        ConfigError: the commit is unknown, or the params are wrong.
    """
    if not COMMIT.fullmatch(commit):
        raise ConfigError(f"--commit {commit}: that names no commit, branch or tag")
    stopped = paths.params_file(paths.worktree(main, name))
    if file:
        source = file.read_bytes() if file.is_file() else None
    elif stopped.exists():
        source = stopped.read_bytes()
    else:
        source = git(main, "show", f"{commit}:params.yaml").encode() + b"\n"
    return effective(source, str(file or "params.yaml"), overrides)


def _pointer(main: MainCheckout, acquire: Acquire, commit: str) -> Path | None:
    """The .dvc file of the local inputs, where DVC tracks them; None where git does or the path is absolute.

    Raises:
        ConfigError: a local input is not part of the commit.
    """
    watch = acquire.watch
    if watch.is_absolute():
        return None
    if _holds(main, commit, watch):
        for path in acquire.local:
            if not _holds(main, commit, path) and not _holds(main, commit, path.with_name(f"{path.name}.dvc")):
                raise ConfigError(
                    f"{path} is not part of commit {commit}, and a run in a worktree sees nothing else: `git add` and commit "
                    "it, or run without --worktree"
                )
        return None
    pointer = watch.with_name(f"{watch.name}.dvc")
    if _holds(main, commit, pointer):
        return pointer
    raise ConfigError(
        f"acquire.watch ({watch}) is not part of commit {commit}: `git add` and commit it, "
        "`dvc add` it and commit the .dvc file, or write an absolute path"
    )


def _holds(main: MainCheckout, commit: str, path: Path) -> bool:
    return _call(main, "cat-file", "-e", f"{commit}:{path.as_posix()}").returncode == 0


def uncommitted(main: MainCheckout) -> list[str]:
    """Tracked files with changes, which a worktree run does not see."""
    return git(main, "diff", "--name-only", "HEAD").splitlines()


def new_files(main: MainCheckout) -> list[str]:
    """What a worktree run does not see either: files that git neither tracks nor ignores; of a new folder, its name."""
    return git(main, "ls-files", "--others", "--exclude-standard", "--directory", "--no-empty-directory").splitlines()


def finish(root: Workspace, name: str, message: str) -> str:
    """Commit params.yaml and dvc.lock on the run's branch and mark it finished; returns the commit."""
    git(root, "add", "-f", "params.yaml", "dvc.lock")
    git(root, "commit", "-q", "--allow-empty", "--no-verify", "-m", message)
    commit = git(root, "rev-parse", "HEAD")
    mark = paths.finished(root)
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(json.dumps({"name": name, "commit": commit}) + "\n")
    return commit


def finished(main: MainCheckout) -> list[str]:
    """The runs that came to their end with a bundle, newest first; their worktrees may be gone."""
    form = "--format=%(refname:lstrip=3) %(subject)"
    lines = git(main, "for-each-ref", "--sort=-committerdate", form, "refs/heads/runs/").splitlines()
    return [name for name, _, subject in (line.partition(" ") for line in lines) if subject == f"Run {name}"]


def runs(main: MainCheckout) -> list[Run]:
    """The worktrees under `.runs/`, oldest first."""
    dated = []
    for root in paths.worktrees(main):
        marks = {"waiting": paths.question(root), "finished": paths.finished(root)}
        ended = next((state for state, mark in marks.items() if mark.exists()), "stopped")
        state = "running" if locks.held(root) else ended
        try:
            commit = git(root, "rev-parse", "--short=12", "HEAD")
            dated.append((paths.params_file(root).stat().st_mtime, Run(root.name, state, root, commit)))
        except (ConfigError, FileNotFoundError):
            continue  # removed at this moment
    return [run for _, run in sorted(dated, key=lambda each: each[0])]


def prune(main: MainCheckout, names: Sequence[str] = ()) -> list[str]:
    """Remove the worktrees of finished runs, or of the named runs in any state but running and waiting.

    Branches, commits and the DVC cache stay: `git checkout runs/<name>` and `dvc checkout` bring all back.

    Raises:
        ConfigError: a name is unknown, or its run still works or waits for approval.
    """
    known = {run.name: run for run in runs(main)}
    for name in names:
        if name not in known:
            raise ConfigError(f"no run named {name}: `slmops runs` lists them")
        if known[name].state == "running":
            raise ConfigError(f"run {name} still works: stop it first")
        if known[name].state == "waiting":
            if _decided(known[name].folder):
                raise ConfigError(
                    f"what run {name} registered is decided on, and its flow run on Prefect's server still has to be told: "
                    "`slmops up` does that within seconds, then prune again"
                )
            raise ConfigError(f"run {name} waits for approval: approve or reject what it registered first")
    chosen = list(names) or [run.name for run in known.values() if run.state == "finished"]
    for name in chosen:
        discard(main, name, branch=known[name].state != "finished")
    return chosen


def collect(main: MainCheckout, *, do: bool) -> str:
    """Remove from the DVC cache what nothing needs any more, or only tell what that would be; DVC's own words.

    Kept is what the checkout's files, the tips of all branches (a finished run's is `runs/<name>`), all tags and the
    worktrees under `.runs/` name. Bundles of registered versions are files of their own.

    Raises:
        Busy: a run works in the checkout.
        ConfigError: a run works in a worktree.
        StageError: dvc refuses.
    """
    known = runs(main)
    working = [run.name for run in known if run.state == "running"]
    if working:
        raise ConfigError(f"run {', '.join(working)} works, and what it needs is not written down yet: wait for it")
    with locks.locked(paths.own_workspace(main), "gc"):
        return versioning.collect(paths.own_workspace(main), [run.folder for run in known], do=do)


def _decided(root: Workspace) -> bool:
    """Was the question of the run in `root` answered by command, and its flow run is still to be told?"""
    try:
        return "decided" in json.loads(paths.question(root).read_bytes())
    except (FileNotFoundError, ValueError):
        return False


def retire(main: MainCheckout, keep: int) -> list[str]:
    """Remove the worktrees of finished runs but for the `keep` newest, as `machine.keep_runs` tells, and as many of runs
    that stopped on the way, which could be taken up.

    None that works or waits for approval. The registry's bundles are links of their own, so they stay.
    """
    known, removed = runs(main), []
    for state in ("finished", "stopped"):
        for name in [run.name for run in known if run.state == state][:-keep]:
            discard(main, name, branch=state == "stopped")
            removed.append(name)
    return removed


def discard(main: MainCheckout, name: str, *, branch: bool) -> None:
    """Remove a worktree, and its branch where the run left no commit on it. One that is gone already is in order."""
    root = paths.worktree(main, name)
    with locks.opened(paths.prune_lock(main)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs may end at once
        if not root.exists():
            return
        git(main, "worktree", "remove", "--force", str(root))
        shutil.rmtree(root, ignore_errors=True)
        if branch:
            git(main, "branch", "-q", "-D", f"runs/{name}")

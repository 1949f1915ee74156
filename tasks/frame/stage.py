"""A stage and how one is run: inputs verified, an empty folder filled, manifest last, rename.

A killed stage leaves only a `.NAME.partial` folder (thrown away by the next run) and, where the stage asks
for one, a scratch folder of checkpoints tied to exactly these params and inputs (taken up by the next run).
"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, ConfigError, DiskFullError, StageError
from tasks.frame import events, items, manifest
from tasks.frame.bounded import Limits
from tasks.frame.items import Item
from tasks.params import Params


@dataclass(frozen=True)
class Stage:
    """One row of the pipeline.

    `function(params, *, <role>: Path, ..., out: Path[, <axis>: value][, scratch: Path][, root: Path])` returns the stage's
    metrics. `inputs` maps a role to a stage name; a role is the folder of that stage's item where both are done for each of
    the same, and the parent of all items' folders otherwise.
    """

    name: str
    function: Callable[..., Mapping[str, float]]
    sections: tuple[str, ...]  # of the params: `section` or `section.key`
    inputs: Mapping[str, str] = field(default_factory=dict)
    per: tuple[str, ...] = ()  # axes of its items; those that it shares with a stage it feeds come first
    scratch: bool = False  # wants a folder that survives a kill
    alone: bool = False  # takes a machine whole: beside anything, its threads would fight for the cores
    sources: bool = False  # reads files outside build/: gets the workspace root
    profile: tuple[str, ...] = ()  # keys of its item's device profile that it reads
    measured: tuple[str, ...] = ()  # files whose bytes differ from run to run
    limits: Callable[[Params, Path], Limits] | None = None  # what it may use, where its inputs are not trusted

    def items(self, params: Params) -> tuple[Item, ...]:
        """What the stage is done once for each of; the empty one alone where it is done once."""
        return items.every(self.per, params)

    def item(self, params: Params, words: Sequence[str]) -> Item:
        """The item that a command names.

        Raises:
            ConfigError: it names none, or not one of the params.
        """
        known = {each.words: each for each in self.items(params)}
        if tuple(words) in known:
            return known[tuple(words)]
        if self.per:
            names = ", ".join(" ".join(each) for each in known)
            raise ConfigError(f"{self.name} works on one {' and '.join(self.per)}: name one of {names}")
        raise ConfigError(f"{self.name} is done once, for no variant or seed, but was given {' '.join(words)!r}")

    def feeding(self, source: "Stage", item: Item, params: Params) -> tuple[Item, ...]:
        """The items of the stage `source` that this stage's `item` is made from: those that agree on the axes of both."""
        return tuple(each for each in source.items(params) if each.only(self.per) == item.only(source.per))


def folder(root: Path, stage: str, *item: str) -> Path:
    """Where a stage's output lies, or that of one of its items, of which it takes the words."""
    return root.joinpath("build", stage, *item)


def run(stage: Stage, stages: Mapping[str, Stage], params: Params, root: Path, *words: str) -> manifest.Manifest:
    """Run one stage in the workspace `root`, for the item that `words` name, and return its manifest.

    Raises:
        ConfigError: there is no such item.
        ArtifactError: an input is missing or does not match its manifest.
        StageError: another process runs this stage here, or the disk is full.
    """
    item = stage.item(params, words)
    events.doing("check inputs")
    paths: dict[str, Path] = {}
    digests: dict[str, str] = {}
    for role, source in stage.inputs.items():
        shared = item.only(stages[source].per).words
        paths[role] = folder(root, source, *shared)
        for each in stage.feeding(stages[source], item, params):
            rest = each.words[len(shared) :]
            one = paths[role].joinpath(*rest)
            manifest.verify(one)
            digests["/".join((role, *rest))] = manifest.digest(one)

    out = folder(root, stage.name, *item.words)
    partial = out.with_name(f".{out.name}.partial")
    with _only_one(out.with_name(f".{out.name}.lock"), " ".join((stage.name, *item.words)), root):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        extra: dict[str, object] = dict(item)
        identity = params.digest(stage.sections)
        scratch = out.with_name(f".{out.name}.scratch")
        if stage.scratch:
            extra["scratch"] = _scratch(scratch, identity, digests)
        if stage.sources:
            extra["root"] = root
        try:
            metrics = stage.function(params.only(stage.sections), **paths, **extra, out=partial)
            manifest.write(
                partial, stage=stage.name, params=identity, inputs=digests, measured=stage.measured, metrics=metrics
            )
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise disk_full(out) from error
            raise
        finally:
            if not (partial / manifest.NAME).exists():
                shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest.load(out)


def disk_full(path: Path, needed: int | None = None) -> DiskFullError:
    """The one wording of a full disk."""
    free = shutil.disk_usage(_existing(path)).free
    want = f", {needed / 1e6:.0f} MB are needed" if needed else ""
    return DiskFullError(
        f"the disk that holds {path} is full ({free / 1e6:.0f} MB free{want}): make room and run the stage again"
    )


def need_space(path: Path, needed: int) -> None:
    """Refuse to start work whose output of `needed` bytes cannot fit beside `path`.

    Raises:
        DiskFullError: too little is free.
    """
    if shutil.disk_usage(_existing(path)).free < needed:
        raise disk_full(path, needed)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _scratch(path: Path, identity: str, digests: Mapping[str, str]) -> Path:
    """An empty folder, or the one that a killed run with the same params and inputs left behind."""
    key = "\n".join([identity, *(f"{role} {value}" for role, value in sorted(digests.items()))])
    mark = path / "key"
    if not mark.is_file() or mark.read_text() != key:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        mark.write_text(key)
    return path


@contextmanager
def _only_one(lock: Path, what: str, root: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(
                f"{what} is already running in {root}: wait for it to end, or run in another workspace"
            ) from None
        yield


def place(source: Path, target: Path) -> None:
    """Hard-link one file, so that weights are on the disk once; copy where the file system cannot link.

    Raises:
        DiskFullError: too little is free for a copy.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        need_space(target.parent, source.stat().st_size)
        shutil.copyfile(source, target)


def require_file(path: Path, what: str) -> Path:
    """A file that an input folder must hold.

    Raises:
        ArtifactError: it is not there.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: {what}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object that a stage wrote.

    Raises:
        ArtifactError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}: run the stage that writes it again, or `dvc pull`") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object: run the stage that writes it again")
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted, and null for what is not a finite number: NaN is no JSON."""
    path.write_text(json.dumps(_finite(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

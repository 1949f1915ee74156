"""What a stage leaves behind, written down: `manifest.json`, last file in, proof of completion.

A manifest holds nothing volatile (no time, host or duration), so equal work gives equal bytes and its
own sha256 identifies the output. What is measured and differs from run to run (`measurements.json`, the
verdict that rests on it) lies beside it, listed by name under `measured` and not hashed.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.errors import ArtifactError

NAME = "manifest.json"


class Manifest(BaseModel):
    """One finished stage output: paths are posix and relative to the folder, digests sha256 hex."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stage: str
    params: str  # digest of the params sections that the stage reads
    inputs: dict[str, str]  # role -> digest of that input's manifest
    files: dict[str, str]  # posix path -> sha256
    measured: list[str]  # files whose bytes differ from run to run
    metrics: dict[str, float]


def sha256(path: Path) -> str:
    """Digest of one file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """Digest that identifies a stage's output: sha256 of its manifest's bytes."""
    return sha256(folder / NAME)


def _listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / NAME)


def write(
    folder: Path,
    *,
    stage: str,
    params: str,
    inputs: Mapping[str, str],
    measured: Iterable[str],
    metrics: Mapping[str, float],
) -> Manifest:
    """Hash what is in `folder` and write its manifest, sorted, as the last file."""
    loose = set(measured)
    made = Manifest(
        stage=stage,
        params=params,
        inputs=dict(sorted(inputs.items())),
        files={name: sha256(folder / name) for name in _listing(folder) if name not in loose},
        measured=sorted(loose),
        metrics=dict(sorted(metrics.items())),
    )
    text = json.dumps(made.model_dump(), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
    return made


def load(folder: Path) -> Manifest:
    """Read a manifest without checking the files.

    Raises:
        ArtifactError: it is missing or not a manifest.
    """
    path = folder / NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path} is missing: run that stage first, or `dvc pull`") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise ArtifactError(
            f"{path} is damaged ({where}: {problem['msg']}): delete {folder} and run the stage again"
        ) from None


def verify(folder: Path) -> Manifest:
    """Load a manifest and hold every file against it.

    Files that were hashed before are not hashed again while their size, time of change and inode are the same: several
    stages read what one has made. What was seen is kept beside the folder (`_stamp`).

    Raises:
        ArtifactError: names every missing, extra and changed file at once.
    """
    manifest = load(folder)
    present = set(_listing(folder))
    expected = set(manifest.files) | set(manifest.measured)
    problems = [f"missing {name}" for name in sorted(expected - present)]
    problems += [f"unexpected {name}" for name in sorted(present - expected)]
    began = time.time_ns()
    known = _seen(folder)
    seen: dict[str, list[Any]] = {}
    for name, want in manifest.files.items():
        if name not in present:
            continue
        state = _state(folder / name)
        if known.get(name) == [want, *state]:
            seen[name] = known[name]
        elif sha256(folder / name) != want:
            problems.append(f"changed {name}")
        elif state[1] < began - SETTLED_NS:  # else it may change once more and keep its time
            seen[name] = [want, *state]
    if problems:
        raise ArtifactError(
            f"{folder} does not match its manifest ({'; '.join(problems)}): delete it and run the stage again, or `dvc checkout --force`"
        )
    if seen != known:
        _remember(folder, seen)
    return manifest


SETTLED_NS = 2_000_000_000  # a file system's clock may be as coarse


def _stamp(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.verified")


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _seen(folder: Path) -> dict[str, list[Any]]:
    """The files that were hashed before: digest, size, time of change and inode."""
    try:
        stamp = json.loads(_stamp(folder).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _remember(folder: Path, seen: Mapping[str, list[Any]]) -> None:
    """Whole or not at all; where nothing can be written, files are hashed again next time."""
    with suppress(OSError), tempfile.NamedTemporaryFile("w", dir=folder.parent, delete=False) as file:
        try:
            json.dump(seen, file)
            file.flush()
            os.replace(file.name, _stamp(folder))
        except OSError:
            os.unlink(file.name)

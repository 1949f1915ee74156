"""`bundle.json`: what a bundle is, what it needs and where it comes from.

Nothing volatile is in it (no speed, time, host), so equal work gives equal bytes and its sha256 names the
bundle. `report.json` (what was measured) and the stage's `manifest.json` lie beside it and are not listed.
"""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tasks.errors import ArtifactError
from tasks.frame import manifest

NAME = "bundle.json"
NONE_YET = "nothing is packaged here yet: `slmops run` does it, or `dvc pull` brings what another machine made"
UNLISTED = (NAME, "report.json", manifest.NAME)


class Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(Value):
    sha256: str
    size: int  # bytes


class Target(Value):
    """One folder of the bundle."""

    variant: str
    runtime: str  # distribution whose version is under `runtimes`, or the program that serves this folder
    minimum_ram_bytes: int
    context_length: int
    conversations_checked: int  # prompts found equal between tokenizer and runtime
    notes: list[str]


class Evaluation(Value):
    """One variant's verdict, where it does best and by device profile, and the numbers that equal work reproduces."""

    verdict: str
    devices: dict[str, str] = {}
    metrics: dict[str, JsonValue]


class Licence(Value):
    model: str
    data: str


class Bundle(Value):
    """The manifest. Paths are posix and relative to the bundle's folder."""

    name: str
    chosen: str | None  # None: nothing passed its gates, and no weights are here
    reason: str
    variants: dict[str, list[str]]  # every variant -> targets that carry it
    devices: dict[str, str | None] = {}  # device profile -> the best variant for it; None: nothing passed there
    targets: dict[str, Target]
    files: dict[str, File]
    minimum_ram_bytes: int | None
    system: str | None = None  # the system prompt that all rows of the data share
    runtimes: dict[str, str]
    licence: Licence
    lineage: dict[str, JsonValue]
    evaluation: dict[str, Evaluation]
    created_from: dict[str, str]  # role of an input -> digest of its manifest


def listing(folder: Path) -> dict[str, File]:
    """Every file that a bundle's manifest lists, hashed."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: File(sha256=manifest.sha256(path), size=path.stat().st_size)
        for name, path in sorted(files.items())
        if name not in UNLISTED
    }


def write(folder: Path, bundle: Bundle) -> None:
    """Write the manifest, sorted."""
    text = json.dumps(bundle.model_dump(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> Bundle:
    """Read a bundle's manifest without checking the files.

    Raises:
        ArtifactError: it is missing or not a bundle's manifest.
    """
    path = folder / NAME
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path} is missing: {NONE_YET}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise ArtifactError(
            f"{path} is damaged ({where}: {problem['msg']}): get the bundle again, or `slmops run` again"
        ) from None


def verify(folder: Path) -> Bundle:
    """Load a bundle and hold every file against its manifest.

    Raises:
        ArtifactError: names every missing, unexpected and changed file at once.
    """
    bundle = load(folder)
    present = listing(folder)
    problems = [f"missing {name}" for name in bundle.files if name not in present]
    problems += [f"unexpected {name}" for name in present if name not in bundle.files]
    problems += [f"changed {name}" for name, want in bundle.files.items() if present.get(name, want) != want]
    if problems:
        raise ArtifactError(
            f"{folder} does not match its bundle.json ({'; '.join(problems)}): get the bundle again, or `slmops run` again"
        )
    return bundle


def bundle_digest(folder: Path) -> str:
    """What identifies a bundle: the sha256 of its manifest's bytes.

    Raises:
        ArtifactError: there is no manifest.
    """
    if not (folder / NAME).is_file():
        raise ArtifactError(f"{folder / NAME} is missing: {NONE_YET}")
    return manifest.sha256(folder / NAME)


def finite(value: Any) -> JsonValue:
    """JSON knows no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

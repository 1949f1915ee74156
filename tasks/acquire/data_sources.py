"""Where the data comes from: files on disk or a data set repository, both read and checked by `rows`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.acquire import hub, rows
from tasks.acquire.model_sources import card_licence
from tasks.errors import ConfigError
from tasks.params import HubData, LocalData

ALL = "all"  # the role of a single file that is split here


@dataclass(frozen=True)
class FoundData:
    """Files by role (a split, `unlabelled` or `all`), how messages name them, and where they come from."""

    files: Mapping[str, Path]
    shown: Mapping[str, str]
    identity: Mapping[str, str]
    licence: str | None = None
    text: Path | None = None


def local(source: LocalData, root: Path, scratch: Path) -> FoundData:
    """A JSONL file, or a folder with a file per split.

    Raises:
        ConfigError: the path does not exist, a split is missing, or the unlabelled prompts are given twice.
    """
    path = root / source.path
    if path.is_dir():
        found = _folder(path, source.path.as_posix())
    elif path.is_file():
        found = FoundData({ALL: path}, {ALL: source.path.as_posix()}, {})
    else:
        raise ConfigError(f"acquire.data.path: {source.path} does not exist: name a JSONL file or a folder of them")
    files, shown = dict(found.files), dict(found.shown)
    if source.unlabelled:
        if rows.UNLABELLED in files:
            raise ConfigError(
                f"acquire.data.unlabelled: {source.path} has its own {rows.UNLABELLED}.jsonl: remove one of the two"
            )
        files[rows.UNLABELLED], shown[rows.UNLABELLED] = root / source.unlabelled, source.unlabelled.as_posix()
    licence = source.licence or (card_licence(path) if path.is_dir() else None)
    text = root / source.text if source.text else None
    return FoundData(files, shown, {"path": source.path.as_posix()}, licence, text)


def from_hub(source: HubData, root: Path, scratch: Path) -> FoundData:
    """A data set repository that holds the same files as a local folder, at its top level."""
    repository = hub.describe(source.repo, source.revision, "dataset", hub.DATA_FILES)
    folder = scratch / "data"
    hub.download(repository, list(repository.files), folder)
    found = _folder(folder, str(repository))
    identity = {"repo": source.repo, "revision": source.revision}
    return FoundData(found.files, found.shown, identity, source.licence or card_licence(folder))


def _folder(path: Path, shown: str) -> FoundData:
    missing = [f"{name}.jsonl" for name in rows.SPLITS if not (path / f"{name}.jsonl").is_file()]
    if missing:
        raise ConfigError(
            f"{shown} has no {', '.join(missing)}: it needs train.jsonl, validation.jsonl and test.jsonl; name one file "
            "instead to have it split"
        )
    names = [name for name in (*rows.SPLITS, rows.UNLABELLED) if (path / f"{name}.jsonl").is_file()]
    return FoundData(
        {name: path / f"{name}.jsonl" for name in names}, {name: f"{shown}/{name}.jsonl" for name in names}, {}
    )


SOURCES: Mapping[str, Callable[[Any, Path, Path], FoundData]] = {"local": local, "hub": from_hub}

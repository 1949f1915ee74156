"""Where the data comes from: files on disk or a data set repository, both read and checked by `rows`."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.acquire import containers, hub, rows
from tasks.acquire.model_sources import card_licence
from tasks.acquire.params import HubData, LocalData
from tasks.errors import ConfigError
from tasks.frame import events

ALL = "all"  # the role of a single file that is split here
# As the `datasets` library names what it writes: data/train-00000-of-00001.parquet.
_SPLIT = re.compile(
    rf"(?:data/)?({'|'.join((*rows.SPLITS, rows.UNLABELLED))})(?:-\d{{5}}-of-\d{{5}})?"
    rf"(?:{'|'.join(map(re.escape, containers.ENDINGS))})"
)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "data/state.json", "data/dataset_info.json")  # no rows


@dataclass(frozen=True)
class FoundData:
    """Files by role (a split, `unlabelled` or `all`), how messages name them, and where they come from."""

    files: Mapping[str, Path]
    shown: Mapping[str, str]
    identity: Mapping[str, str]
    licence: str | None = None
    text: Path | None = None


def local(source: LocalData, root: Path, scratch: Path) -> FoundData:
    """A file of rows, or a folder with a file per split.

    Raises:
        ConfigError: the path does not exist, a split is missing, or the unlabelled prompts are given twice.
    """
    path = root / source.path
    if path.is_dir():
        data = _folder(path, source.path.as_posix())
    elif path.is_file():
        data = FoundData({ALL: path}, {ALL: source.path.as_posix()}, {})
    else:
        raise ConfigError(f"acquire.data.path: {source.path} does not exist: name a file of rows or a folder of them")
    files, shown = dict(data.files), dict(data.shown)
    if source.unlabelled:
        if rows.UNLABELLED in files:
            raise ConfigError(
                f"acquire.data.unlabelled: {source.path} has its own {files[rows.UNLABELLED].name}: remove one of the two"
            )
        if not (root / source.unlabelled).is_file():
            raise ConfigError(f"acquire.data.unlabelled: {source.unlabelled} is no file: name a file of prompts")
        files[rows.UNLABELLED], shown[rows.UNLABELLED] = root / source.unlabelled, source.unlabelled.as_posix()
    licence = source.licence or (card_licence(path) if path.is_dir() else None)
    text = root / source.text if source.text else None
    return FoundData(files, shown, {"path": source.path.as_posix()}, licence, text)


def from_hub(source: HubData, root: Path, scratch: Path) -> FoundData:
    """A data set repository that holds the same files as a local folder, at its top level or in `data/`."""
    repository = hub.describe(source.repo, source.revision, "dataset", hub.DATA_FILES)
    advice = "download it, bring its files into this form, and use `source: local`"
    roles = _roles(repository.files, str(repository), advice)
    for name in roles.values():
        if (size := repository.files[name].size) > containers.MAX_FILE:
            raise ConfigError(
                f"{repository}: {name} has {size / 1e9:.1f} GB, at most {containers.MAX_FILE / 1e9:.1f} GB are read: take a "
                "part of it, and use `source: local`"
            )
    about = [name for name in repository.files if name == "README.md" or name.startswith("LICENSE")]
    folder = scratch / "data"
    hub.download(repository, [*roles.values(), *about], folder)
    identity = {"repo": source.repo, "revision": source.revision}
    data = _found(folder, str(repository), roles)
    return FoundData(data.files, data.shown, identity, source.licence or card_licence(folder))


def _folder(path: Path, shown: str) -> FoundData:
    places = [place for place in (path, path / "data") if place.is_dir()]
    names = [file.relative_to(path).as_posix() for place in places for file in place.iterdir() if file.is_file()]
    return _found(path, shown, _roles(names, shown, "name one file instead to have it split"))


def _found(folder: Path, shown: str, roles: Mapping[str, str]) -> FoundData:
    files = {role: folder / name for role, name in roles.items()}
    return FoundData(files, {role: f"{shown}/{name}" for role, name in roles.items()}, {})


def _roles(names: Iterable[str], shown: str, advice: str) -> dict[str, str]:
    """Which file of a folder holds which split. Where one file of rows is all there is, it is to be split.

    Raises:
        ConfigError: a split is missing, or there are several files of one.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    others = []
    for name in sorted(names):
        if match := _SPLIT.fullmatch(name):
            found[match[1]].append(name)
        elif name.endswith(containers.ENDINGS) and name not in _ABOUT:
            others.append(name)
    if several := [each for each in found.values() if len(each) > 1]:
        raise ConfigError(
            f"{shown} has {' and '.join(several[0][:3])}: a split is one file, so join them, or remove all but one"
        )
    given = set(found) & set(rows.SPLITS)
    if given == {"train"} or (not given and len(others) == 1):
        alone = found.pop("train", others)[0]
        events.note(f"{shown} holds one file of labelled rows, {alone}: it is split into train, validation and test")
        return {ALL: alone, **{role: each[0] for role, each in found.items()}}
    if missing := [name for name in rows.SPLITS if name not in given]:
        raise ConfigError(
            f"{shown} has no {', '.join(f'{name}.jsonl' for name in missing)}: it needs train, validation and test "
            f"({', '.join(containers.ENDINGS)}); {advice}"
        )
    return {role: found[role][0] for role in (*rows.SPLITS, rows.UNLABELLED) if role in found}

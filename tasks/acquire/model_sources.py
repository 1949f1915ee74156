"""Where a model comes from: one function a source. The table is in `params`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tasks.acquire import cards, hub, safe_weights
from tasks.acquire.params import GgufModel, HubModel, LocalModel, PackageModel
from tasks.errors import ArtifactError, ConfigError
from tasks.frame import events, manifest
from tasks.models import sizes

MAX_LICENCE = 2**20  # bytes


@dataclass(frozen=True)
class Found:
    """A model before its weights were looked into.

    `path` is a GGUF file or a Hugging Face folder; `identity` says where it comes from, for the lineage.
    `licence` is the person's word or the card's; `package_licence`, of the distribution around the model, counts
    when nothing says more. `finish` fetches what is large, once licence and size were accepted.
    """

    path: Path
    identity: Mapping[str, str]
    licence: str | None = None
    package_licence: str | None = None
    licence_text: Path | None = None
    finish: Callable[[], None] = lambda: None


def package(source: PackageModel, root: Path, scratch: Path) -> Found:
    """A GGUF file inside an installed Python distribution.

    Raises:
        ConfigError: the distribution is not installed, or not exactly one of its files matches.
    """
    from importlib import metadata

    name = source.distribution
    try:
        installed = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"acquire.model.distribution: {name} is not installed: run `pip install {name}`, or choose another source"
        ) from None
    # A path in RECORD is not trusted to exist: files can be deleted from an environment.
    files = [(file, Path(str(file.locate()))) for file in installed.files or []]
    matches = [path for file, path in files if fnmatchcase(file.name, source.file) and path.is_file()]
    if len(matches) != 1:
        names = ", ".join(sorted(path.name for path in matches)) or "none"
        raise ConfigError(
            f"acquire.model.file: {source.file!r} must match one file of {name} {installed.version}, but matches {names}: "
            "write the file's name, or install the distribution again"
        )
    metadata_fields = {
        field: installed.metadata[field] for field in ("License-Expression", "License") if field in installed.metadata
    }
    around = metadata_fields.get("License-Expression") or metadata_fields.get("License")
    texts = [path for file, path in files if file.name.upper().startswith("LICENSE") and path.is_file()]
    return Found(
        matches[0],
        {"distribution": name, "version": installed.version, "file": matches[0].name},
        source.licence,
        package_licence=around if around and "\n" not in around else None,
        licence_text=texts[0] if texts else None,
    )


def gguf(source: GgufModel, root: Path, scratch: Path) -> Found:
    """A GGUF file on disk.

    Raises:
        ConfigError: it is not there.
        ArtifactError: its sha256 is not the one in params.yaml.
    """
    path = root / source.path
    if not path.is_file():
        raise ConfigError(f"acquire.model.path: {source.path} is no file: name a GGUF file")
    if source.sha256 and (actual := manifest.sha256(path)) != source.sha256:
        raise ArtifactError(
            f"{source.path} has sha256 {actual}, acquire.model.sha256 says {source.sha256}: fetch the file again, or "
            "correct the parameter"
        )
    return Found(path, {"path": source.path.as_posix()}, source.licence)


def local(source: LocalModel, root: Path, scratch: Path) -> Found:
    """A Hugging Face model folder on disk.

    Raises:
        ConfigError: it is not there, or a file.
    """
    folder = root / source.path
    if folder.is_file():
        raise ConfigError(
            f"acquire.model.path: {source.path} is a file: name the folder of a Hugging Face model, or write `source: gguf`"
        )
    if not folder.is_dir():
        raise ConfigError(f"acquire.model.path: {source.path} does not exist: name the folder of a Hugging Face model")
    licence = source.licence or card_licence(folder)
    return Found(folder, {"path": source.path.as_posix()}, licence, licence_text=licence_text(folder))


def from_hub(source: HubModel, root: Path, scratch: Path) -> Found:
    """A model repository: its small files now, its weights in `finish`."""
    repository = hub.describe(source.repo, source.revision, "model", hub.MODEL_FILES)
    folder = scratch / "model"
    hub.download(repository, [name for name in repository.files if not name.endswith(".safetensors")], folder)
    # Code is never fetched; what transformers has itself does without it (Phi's repositories hold some).
    if safe_weights.check_architecture(folder).get("model_type") not in sizes.DENSE:
        safe_weights.check_names(str(repository), list(repository.names))
    return Found(
        folder,
        {"repo": source.repo, "revision": source.revision},
        source.licence or card_licence(folder),
        licence_text=licence_text(folder),
        finish=lambda: hub.download(repository, safe_weights.weight_names(folder), folder),
    )


def card_licence(folder: Path) -> str | None:
    """The `license` of a model or data set card."""
    licence = cards.entry(folder, "license")
    return licence if isinstance(licence, str) else None


def licence_text(folder: Path) -> Path | None:
    """The folder's licence file, if it has one.

    Raises:
        ArtifactError: it is a link to a file elsewhere, which would be given to everybody with the bundle.
    """
    files = sorted(path for path in folder.glob("LICENSE*") if path.is_file()) if folder.is_dir() else []
    if not files:
        return None
    # A download cache keeps the files of a snapshot in the folder `blobs` of the same repository.
    homes = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(files[0].resolve().is_relative_to(home.resolve()) for home in homes):
        raise ArtifactError(f"{files[0]} is a link to a file outside {folder}: put a copy of the licence in its place")
    return files[0]


def read_licence(path: Path) -> str:
    """The text of a licence file, which later becomes part of UTF-8 files.

    Raises:
        ArtifactError: it is no text, or too long for one.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_LICENCE + 1)
    if len(raw) > MAX_LICENCE or b"\0" in raw:
        raise ArtifactError(f"{path} is not the text of a licence: replace it by one in UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        events.note(f"{path} is not UTF-8: it was read as Latin-1")
        return raw.decode("latin-1")


def check_licence(licence: str | None, allowed: tuple[str, ...], what: str, required: bool) -> None:
    """Hold a licence against `acquire.licences`, case aside; with none listed everything may be used.

    Raises:
        ConfigError: it is known and not listed, or `required` and unknown.
    """
    if not allowed or (licence is None and not required):
        return
    listed = ", ".join(allowed)
    if licence is None:
        raise ConfigError(
            f"the licence of {what} is unknown, and acquire.licences allows only {listed}: find it out, and give it "
            "as the source's `licence`, or empty the list"
        )
    if licence.casefold() not in {each.casefold() for each in allowed}:
        raise ConfigError(
            f"{what} has the licence {licence}, and acquire.licences allows only {listed}: choose another, or add it to "
            "the list if you may use it"
        )

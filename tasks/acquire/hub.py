"""Files of a Hugging Face Hub repository at one commit, each held against the digest that the commit names.

huggingface_hub does the talking, so `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and the proxy variables mean
here what they mean everywhere. All its errors become ours in `_told`.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from tasks.acquire import containers
from tasks.errors import ArtifactError, ConfigError, StageError, brief
from tasks.frame import events
from tasks.frame.stage import need_space

TIMEOUT = 10.0  # seconds to the first answer; an unreachable hub must not hold a person up
MODEL_FILES = (
    "*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.*", "*.jinja", "LICENSE*", "README.md",
)  # fmt: skip
DATA_FILES = (
    *(f"{folder}*{ending}" for folder in ("", "data/") for ending in containers.ENDINGS), "LICENSE*", "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """What the commit says of a file: bytes, and the sha256 of an LFS file or the git blob id of another."""

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: all its names, and the files of it that may be fetched."""

    repo: str
    revision: str
    kind: Literal["model", "dataset"]
    names: tuple[str, ...]
    files: Mapping[str, RemoteFile]

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:8]}"


def describe(repo: str, revision: str, kind: Literal["model", "dataset"], patterns: Iterable[str]) -> Repository:
    """Ask the hub what a commit holds; only names that match a pattern, in the pattern's own folder, may be fetched.

    Raises:
        ConfigError: repository or commit do not exist, or access is not granted.
        ArtifactError: the hub answers with another commit.
        StageError: the hub cannot be reached or does not answer as one.
    """
    from huggingface_hub import HfApi, errors

    with _told(repo, revision, kind):
        try:
            info = HfApi().repo_info(repo, repo_type=kind, revision=revision, files_metadata=True, timeout=TIMEOUT)
            names = tuple(sorted(each.rfilename for each in info.siblings or []))
            files = {
                each.rfilename: RemoteFile(int(each.size), each.lfs.sha256 if each.lfs else None, str(each.blob_id))
                for each in info.siblings or []
                if any(_allowed(each.rfilename, pattern) for pattern in patterns)
            }
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise  # some of them are ValueErrors too; `_told` knows them
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StageError(
                f"{_endpoint()} does not answer like a Hugging Face Hub about {repo} ({error}): check HF_ENDPOINT"
            ) from None
    if info.sha != revision:
        raise ArtifactError(f"{_endpoint()} gave commit {info.sha} of {repo} instead of {revision}: check HF_ENDPOINT")
    if odd := [name for name in names if not _is_name(name)]:
        raise ArtifactError(
            f"{repo} lists {brief(repr(odd[0]))}, which is no name of a file: choose another repository, or check HF_ENDPOINT"
        )
    return Repository(repo, revision, kind, names, files)


def _allowed(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _is_name(name: str) -> bool:
    """Whether a file system takes a name: no control characters, no half characters, no part above 255 bytes."""
    raw = name.encode("utf-8", "replace")
    whole = name.isprintable() and raw.decode() == name
    return whole and all(part not in (b"", b".", b"..") and len(part) <= 255 for part in raw.split(b"/"))


def download(repository: Repository, names: Iterable[str], folder: Path) -> None:
    """Fetch files into `folder`, taking up what an earlier call left there, and check each one's digest.

    Raises:
        ArtifactError: a file is not in the commit, or what came is not what the commit names.
        StageError: the connection failed for good; what has come so far stays for the next run.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in repository.files]
    if missing:
        raise ArtifactError(f"{repository} has no {', '.join(missing)}: choose a repository that holds these files")
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(repository.files[name].size for name in wanted)
    here = sum(path.stat().st_size for name in wanted for path in _places(folder, name) if path.is_file())
    need_space(folder, total - here)
    with events.progress(f"download {repository}", total / 1e6, "MB") as advance:
        for name in wanted:
            _fetch(repository, name, folder, advance)


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, folder / f"{name}.part"


def _fetch(repository: Repository, name: str, folder: Path, advance: Callable[..., None]) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    remote = repository.files[name]
    target, part = _places(folder, name)
    target.parent.mkdir(exist_ok=True)
    if target.is_file():
        advance(remote.size / 1e6)
    else:
        if part.is_file() and part.stat().st_size > remote.size:
            part.unlink()
        # hf_hub_download throws a part away when its process dies; appending to our own survives a kill.
        with _Growing(part, advance) as file, _told(repository.repo, repository.revision, repository.kind):
            done = file.tell()
            advance(done / 1e6)
            if done < remote.size:
                url = hf_hub_url(repository.repo, name, repo_type=repository.kind, revision=repository.revision)
                # Compressed bytes cannot be taken up in the middle.
                headers = {**build_hf_headers(), "accept-encoding": "identity"}
                http_get(url, file, resume_size=done, headers=headers, displayed_filename=name)
        part.rename(target)
    actual = _digest(target, remote)
    expected = remote.sha256 or remote.blob_id
    if actual != expected:
        target.unlink()
        raise ArtifactError(
            f"{name} of {repository} from {_endpoint()} has the wrong content: expected "
            f"{'sha256' if remote.sha256 else 'git blob'} {expected}, got {actual}: it was deleted, run the stage again; "
            "if that does not help, the hub or a proxy on the way serves a changed file"
        )


def _digest(path: Path, remote: RemoteFile) -> str:
    """sha256 of an LFS file, else git's object id: sha1 of a short head and the content."""
    if remote.sha256:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class _Growing(io.FileIO):
    """A file that is appended to, unbuffered so that a kill loses little, and tells what it was given."""

    def __init__(self, path: Path, advance: Callable[..., None]) -> None:
        super().__init__(path, "ab")
        self._advance = advance
        self.seek(0, io.SEEK_END)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view, written = memoryview(data), 0
        while written < len(view):
            written += super().write(view[written:])
        self._advance(written / 1e6)
        return written


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def _told(repo: str, revision: str, kind: str) -> Iterator[None]:
    """The one place where huggingface_hub's errors become ours."""
    from huggingface_hub import errors

    page = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} is no repository name: {error}: write it as owner/name") from None
    except errors.OfflineModeIsEnabled:
        raise StageError(
            f"{page} is needed, but HF_HUB_OFFLINE is set: unset it, or use source: local with a downloaded copy"
        ) from None
    except errors.GatedRepoError:
        raise ConfigError(
            f"{page} is gated: accept its conditions on that page, then set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(f"{page} does not exist, or is private: correct the name, or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{page} has no commit {revision}: copy the full hash from its list of commits") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(f"{page} refuses access ({status}): HF_TOKEN is not valid for it, set another") from None
        if status in (404, 410):
            raise ArtifactError(f"{page}: a file that the commit lists is not there ({status}): try another") from None
        raise StageError(f"{page} answers with an error ({status}): run the stage again later") from None
    except errors.HTTPError as error:  # the HTTP library's own root: no connection, time-out, broken off
        raise StageError(
            f"{page} cannot be reached ({type(error).__name__}: {error}): check the network and HF_ENDPOINT, and run the "
            "stage again: it takes up what has arrived"
        ) from None

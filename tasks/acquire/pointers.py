"""Git LFS pointers: the small text files that a clone without git-lfs leaves in place of the content."""

from pathlib import Path

from tasks.errors import ArtifactError

_HEAD = b"version https://git-lfs.github.com/spec/"
ADVICE = "a Git LFS pointer, not the content: run `git lfs pull` where it was cloned, or download the file itself"


def is_pointer(head: bytes) -> bool:
    """Is this the beginning of a pointer?"""
    return head.startswith(_HEAD)


def refuse(path: Path) -> None:
    """Refuse a file whose content was not fetched.

    Raises:
        ArtifactError: it is a pointer.
    """
    with path.open("rb") as file:
        if is_pointer(file.read(len(_HEAD))):
            raise ArtifactError(f"{path} is {ADVICE}")

"""JSON lines: the one reader and the one writer of files with a JSON value a line.

Lines end at `\\n` alone, on bytes. `str.splitlines` also ends them at U+2028, U+2029, U+0085 and others, which JSON
may hold inside a text.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError

BOM = b"\xef\xbb\xbf"


def lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line that is not blank; a byte order mark is no part of the first."""
    for number, line in enumerate(io.BytesIO(content.removeprefix(BOM)), 1):
        if line.strip():
            yield number, line.removesuffix(b"\n")


def read(path: Path) -> list[Any]:
    """The values of a file that our own code wrote.

    Raises:
        ArtifactError: a line is no JSON.
    """
    rows = []
    for number, line in lines(path.read_bytes()):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ArtifactError(f"{path}:{number} is damaged ({error}): make the file again") from None
    return rows


def write(path: Path, values: Iterable[Any]) -> None:
    """Write each value as a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")

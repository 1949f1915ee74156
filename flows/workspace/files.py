"""Small files, written whole or not at all."""

import os
from pathlib import Path


def write(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file; whoever reads it meanwhile sees the old one. `private`: for this user alone."""
    part = path.with_name(f".{path.name}.new")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb") as handle:
        handle.write(text.encode())
    part.replace(path)

"""Whether DVC sees all that acquire reads: it looks for changes under `acquire.watch`, and not behind every link."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tasks.acquire.params import Acquire
from tasks.errors import ConfigError

SHOWN = 5


def check(acquire: Acquire, root: Path) -> None:
    """Refuse what DVC would miss or hang at. It follows links to files, but not those to folders.

    Raises:
        ConfigError: a local input lies behind a linked folder, or the watched folder holds a pipe, a device or a broken link.
    """
    inputs = [root / path for path in acquire.local]
    problems = []
    watch = root / acquire.watch
    for path in _entries(watch):
        shown = acquire.watch / path.relative_to(watch)  # which may lie outside the workspace
        if path.is_symlink() and path.is_dir():
            if any(path.is_relative_to(each) or each.is_relative_to(path) for each in inputs):
                problems.append(
                    f"{shown} is a link to the folder {path.resolve()}, behind which DVC sees no change: put the folder itself "
                    "there (`cp -r`, `mv` or a bind mount), or links to its files"
                )
        elif path.is_symlink() and not path.exists():
            problems.append(f"{shown} is a link to nothing: remove it, or bring back {os.readlink(path)}")
        elif not stat.S_ISREG(path.stat().st_mode):
            problems.append(f"{shown} is a pipe, a socket or a device: remove it, DVC would wait for it for ever")
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ConfigError("\n  ".join([*problems[:SHOWN], *more]))


def _entries(watch: Path) -> Iterator[Path]:
    """All files under a folder, and the links to folders, which are not followed."""
    for place, folders, files in os.walk(watch):
        for name in sorted([*files, *(each for each in folders if os.path.islink(os.path.join(place, each)))]):
            yield Path(place, name)

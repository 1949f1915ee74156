"""A value of a model or data set card: YAML between `---` lines at the head of README.md.

A card is written by anybody, and YAML has dates, merge keys and depth enough to fail or to stall on. So the one entry
that is wanted is cut out by its lines, and only that is read, as text.
"""

import re
from pathlib import Path

import yaml

MAX_HEAD = 4 * 2**20  # characters; cards of data sets list their columns here
MAX_ENTRY = 1000


def entry(folder: Path, key: str) -> str | list[str] | None:
    """The text or list of texts under a top-level key; None where the card has none that can be read."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = file.read(MAX_HEAD)
    header = re.match(r"---[ \t]*\n(.*?)^---", head, re.DOTALL | re.MULTILINE)
    lines = header[1].split("\n") if header else []
    starts = [i for i, line in enumerate(lines) if re.match(rf"{re.escape(key)}[ \t]*:(\s|$)", line)]
    if len(starts) != 1:
        return None
    end = next((i for i in range(starts[0] + 1, len(lines)) if re.match(r"[^\s#-]", lines[i])), len(lines))
    text = "\n".join(lines[starts[0] : end])
    if len(text) > MAX_ENTRY:
        return None
    try:
        value = yaml.load(text, yaml.BaseLoader)[key]
    except (yaml.YAMLError, RecursionError, KeyError, TypeError):
        return None
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    return value if isinstance(value, str) and value else None

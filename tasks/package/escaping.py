"""Texts of strangers (names, labels, prompts, answers) in Markdown, where they must stay text: no HTML, no link, no table."""

import re

SPECIAL = re.compile(r"([\\`*\[\]|#~!])|(?<![^\W_])(_)|(_)(?![^\W_])")
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def inline(text: str) -> str:
    """A text inside a line or a cell of a table."""
    line = " ".join(text.split())
    escaped = SPECIAL.sub(lambda found: f"\\{found[0]}", line)
    return "".join(HTML.get(letter, letter) for letter in escaped)


def code(text: str) -> str:
    """A text as code inside a line; line breaks are blanks there."""
    line = " ".join(text.split())
    ticks = "`" * (_longest(line) + 1)
    pad = " " if line[:1] in ("", "`") or line[-1:] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def block(text: str) -> str:
    """A text of several lines, as it is."""
    ticks = "`" * max(4, _longest(text) + 1)
    return f"{ticks}\n{text}\n{ticks}"


def _longest(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)

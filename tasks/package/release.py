"""What every target is given, and the few steps they share."""

from dataclasses import dataclass
from pathlib import Path

from tasks.frame.stage import place
from tasks.models.chat import Messages
from tasks.package.prompt_format import PromptFormat


@dataclass(frozen=True)
class Release:
    """One variant on its way into a target's folder."""

    name: str
    variant: str
    weights: Path  # the file or folder that the runtime loads
    runtime_version: str
    conversations_checked: int  # prompts found equal between tokenizer and runtime
    adds_bos: bool  # the runtime would put the bos token before a rendered prompt
    needs_composed: bool  # the runtime reads letters apart from their accents otherwise than the tokenizer
    prompt_format: PromptFormat | None  # None: only Jinja can render this model's chat template
    dated: bool  # the chat template writes the day
    bos: str
    stops: tuple[str, ...]  # texts of the end-of-turn tokens
    system: str | None  # the system prompt that all rows of the data share
    example: Messages  # a conversation of the data that waits for its answer
    answer: str  # the reference answer to it
    context_length: int  # tokens
    minimum_ram_bytes: int
    licence: str  # text


def place_folder(source: Path, target: Path) -> None:
    """`place` for every file under `source`."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place(path, target / path.relative_to(source))


def write(path: Path, text: str, *, executable: bool = False) -> None:
    """Write one text file of a bundle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    path.chmod(0o755 if executable else 0o644)

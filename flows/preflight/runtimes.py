"""`slmops runtimes`: what can run files here, and the environments of those that need one of their own."""

import textwrap
from dataclasses import dataclass

from tasks import selftest
from tasks.errors import ConfigError, PipelineError
from tasks.runtimes import environments
from tasks.variants import RUNTIMES, VARIANTS


@dataclass(frozen=True)
class State:
    """One runtime. `version`: None where it is not installed; `tested`: whether it has proved itself in this environment."""

    name: str
    label: str
    version: str | None
    tested: bool
    variants: list[str]
    place: str  # its own environment; "" where it is installed with slmops


def states() -> list[State]:
    """All runtimes."""
    return [_state(name) for name in RUNTIMES]


def _state(name: str) -> State:
    runtime = RUNTIMES[name]
    try:
        version, tested = environments.version(runtime), runtime.native and selftest.record(runtime).exists()
    except ConfigError:
        version, tested = None, False
    variants = [each.name for each in VARIANTS.values() if each.runtime is runtime]
    place = str(environments.folder(runtime)) if runtime.isolated else ""
    return State(name, runtime.label, version, tested, variants, place)


def lines(found: list[State]) -> list[str]:
    """For a person."""
    rows = [("name", "runtime", "version", "held against torch")]
    for each in found:
        absent = f"not installed: slmops runtimes install {each.name}" if each.place else "not installed: make setup"
        tested = "yes" if each.tested else "before its first use" if each.version else ""
        rows.append((each.name, each.label, each.version or absent, tested))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for line, each in zip(range(len(text) - 1, 0, -1), reversed(found), strict=True):
        indent = " " * (widths[0] + 2)
        text[line + 1 : line + 1] = textwrap.wrap(
            ", ".join(each.variants), 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return text


def install(name: str) -> str:
    """Install a runtime, and hold it against torch; returns a sentence.

    Raises:
        ConfigError: it has no environment of its own.
        PipelineError: its packages cannot be had, or it computes wrongly here.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"there is no runtime {name}: choose one of {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]
    place = environments.install(runtime)
    try:
        made = selftest.check(runtime)
    except PipelineError as error:
        raise type(error)(f"{runtime.label} is installed in {place}, but does not hold: {error}") from None
    version = environments.version(runtime)
    return f"{runtime.label} {version} is installed in {place}; off from torch by {made['distance']:.1%} at most, by rounding"

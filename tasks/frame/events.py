"""Progress for whoever is watching: a bar on a terminal, JSON lines for a caller.

`tasks/__main__.py` calls `open_sink` once; library code only calls `progress`, `doing` and `metric`. A line is
one of `{"event": "progress", "label", "done", "total", "unit"}`, `{"event": "doing", "label"}`, `{"event": "metric", "name",
"value", "step"}`, `{"event": "note", "text"}`, `{"event": "finished", "seconds"}` and `{"event": "error", "family", "text"}`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

_sink: IO[str] | None = None


def open_sink(path: str | None) -> None:
    """Append events to the file at `path` from now on; None switches them off."""
    global _sink
    if _sink is not None:
        _sink.close()
    _sink = open(path, "a", encoding="utf-8", buffering=1) if path else None  # noqa: SIM115 (open for the process)


def _send(event: str, **fields: Any) -> None:
    if _sink is not None:
        _sink.write(json.dumps({"event": event, **fields}) + "\n")


def error(family: str, text: str) -> None:
    """Tell the error that ends a stage: the name of its class in `tasks/errors.py` and its message."""
    _send("error", family=family, text=text)


def finished(seconds: float) -> None:
    """Tell that the stage is done, and how long it worked."""
    _send("finished", seconds=seconds)


def metric(name: str, value: float, step: int) -> None:
    """Tell one point of a curve, such as the training loss at a step."""
    _send("metric", name=name, value=value, step=step)


def note(text: str) -> None:
    """Tell one line of plain text; on a terminal or in a log it goes to standard error."""
    _send("note", text=text)
    print(text, file=sys.stderr, flush=True)


def doing(label: str) -> None:
    """Tell what begins now where nothing can be counted (imports, loading, another program's work), so that whoever waits
    knows for what.
    """
    _send("doing", label=label)
    if sys.stderr.isatty():
        print(f"{label} ...", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: float, unit: str = "steps") -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, note="")`. Draws a Rich bar when standard error is a terminal."""
    done, last_sent = 0.0, 0.0
    bar = task = None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True),
        )  # fmt: skip
        bar.start()
        task = bar.add_task(label, total=total, note="")

    def advance(n: float = 1, note: str = "") -> None:
        nonlocal done, last_sent
        done += n
        if bar is not None and task is not None:
            bar.update(task, completed=done, note=note)
        if time.monotonic() - last_sent > 0.5 or done >= total:
            last_sent = time.monotonic()
            _send("progress", label=label, done=done, total=total, unit=unit)

    try:
        advance(0)
        yield advance
    finally:
        if bar is not None:
            bar.stop()

"""What the person at the terminal sees of a run: a bar per stage while it works, one line when it is done."""

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flows.results import Row
from flows.versioning import Event, Outcome

HOW = {"ran": "done", "restored": "restored from the cache", "unchanged": "up to date"}


class Display:
    """Bars on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        if not self._console.is_terminal:
            self._console.width = 120  # a log file has no width to fit
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.fields[stage]:<20}"), BarColumn(30), TextColumn("{task.description}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._shown: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False)

    def begin(self, name: str) -> None:
        """A stage starts."""
        with self._lock:
            if name not in self._shown:
                self._shown[name] = self._bars.add_task("", total=None, stage=name)

    def event(self, name: str, event: Event) -> None:
        """Something that the stage tells (see tasks/events.py)."""
        if event["event"] == "progress":
            text = f"{event['label']} {event['done']:.0f}/{event['total']:.0f} {event['unit']}"
            self._bars.update(self._shown[name], description=text, completed=event["done"], total=event["total"])
        elif event["event"] == "note":
            self.say(f"{name}: {event['text']}")

    def end(self, name: str, outcome: Outcome) -> None:
        """A stage is done."""
        self._hide(name)
        self.say(f"{name:<20} {HOW[outcome.how]:<24} {outcome.total_s:7.1f} s")

    def fail(self, name: str, text: str) -> None:
        """A stage failed; it may be tried again."""
        self._hide(name)
        self.say(f"{name:<20} failed: {text}")

    def _hide(self, name: str) -> None:
        with self._lock:
            self._bars.remove_task(self._shown.pop(name))

    def table(self, rows: list[Row]) -> None:
        """The result of the run."""
        from rich.table import Table

        table = Table(title="Variants", title_justify="left")
        for heading in ("variant", "verdict", "accuracy", "retention", "KLD", "MB", "tokens/s", "shipped"):
            table.add_column(heading, justify="left" if heading in ("variant", "verdict") else "right")
        for row in rows:
            table.add_row(*row.cells())
        self._console.print(table)

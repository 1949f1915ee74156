"""What the person at the terminal sees of a run: a bar per stage while it works, one line when it is done."""

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flows.report.results import HEADINGS, Row
from flows.workspace.versioning import Event, Outcome
from tasks.frame import cores

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
        self._labels: dict[str, str] = {}  # what each stage was last heard to do
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
                self._shown[name] = self._bars.add_task("start", total=None, stage=name)

    def event(self, name: str, event: Event) -> None:
        """Something that the stage tells (see tasks/frame/events.py)."""
        if event["event"] == "progress":
            self._begins(name, event["label"])
            text = f"{event['label']} {event['done']:.0f}/{event['total']:.0f} {event['unit']}"
            self._bars.update(self._shown[name], description=text, completed=event["done"], total=event["total"])
        elif event["event"] == "doing":
            self._begins(name, event["label"])
        elif event["event"] == "note":
            self.say(f"{name}: {event['text']}")

    def _begins(self, name: str, label: str) -> None:
        """A step of a stage: its bar begins anew and moves without an end until one is known; a log has a line instead."""
        if self._labels.get(name) == label:
            return
        self._labels[name] = label
        (bar,) = (task for task in self._bars.tasks if task.id == self._shown[name])
        bar.description, bar.completed, bar.total, bar.finished_time = label, 0, None, None
        if not self._console.is_terminal:
            self.say(f"{name:<20} {label}")

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
            self._labels.pop(name, None)

    def expect(self, minutes: Mapping[str, float]) -> None:
        """What each stage that is to be done is expected to take, and all of them."""
        from rich.table import Table

        self._console.print("Expected on this machine" + (f" ({busy})" if (busy := cores.others_work()) else ""))
        table = Table("stage")
        table.add_column("minutes", justify="right")
        for stage, expected in minutes.items():
            table.add_row(stage, f"{expected:.1f}")
        table.add_row("total", f"{sum(minutes.values()):.1f}")
        self._console.print(table)

    def table(self, rows: list[Row]) -> None:
        """The result of the run."""
        from rich.table import Table

        table = Table(title="Variants", title_justify="left")
        for at, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if at < 2 else "right")
        for row in rows:
            table.add_row(*row.cells())
        self._console.print(table)
        for row in rows:
            if row.misses:
                self.say(f"{row.variant} {row.verdict}: {row.misses}")

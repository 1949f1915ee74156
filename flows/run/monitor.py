"""What a run's stages tell, read from their event files where they work, and shown on the terminal and in MLflow."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from flows.run.graph import Key
from flows.run.stage_task import StageRun
from flows.run.terminal import Display
from flows.tracking.mlflow_runs import Tracker
from flows.workspace import versioning
from flows.workspace.paths import Workspace
from tasks.frame.stage import folder
from tasks.stages import STAGES

LOOK_S = 0.1  # from one look at the event files to the next


class Monitor:
    """Follows the stages of one run. Events are read by a thread of its own while the block is open."""

    def __init__(self, root: Workspace, display: Display, tracker: Tracker) -> None:
        self.root, self.display, self.tracker = root, display, tracker
        self.done: dict[Key, versioning.Outcome] = {}
        self.spans: list[tuple[float, float]] = []  # when stages' own commands ran
        self._began: dict[Key, float] = {}  # of what is not yet done
        self._files = ExitStack()
        self._appended: dict[Key, tuple[StageRun, Callable[[], Iterator[versioning.Event]]]] = {}
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)

    def __enter__(self) -> Self:
        self.display.__enter__()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join()
        self._files.close()
        self.display.__exit__(kind, error, at)

    def watch(self, works: Sequence[StageRun]) -> None:
        """Read what these stages tell from now on."""
        with self._lock:
            for work in works:
                work.events.parent.mkdir(parents=True, exist_ok=True)
                work.events.touch()
                stream = self._files.enter_context(work.events.open(encoding="utf-8"))
                stream.seek(0, 2)  # what an earlier attempt of this run told was told then
                self._appended[work.key] = work, versioning.appended(stream)

    def end(self, work: StageRun, outcome: versioning.Outcome) -> None:
        """A stage is up to date."""
        with self._lock:
            self._read(work.key)
            if work.key not in self._began:
                self._begin(work)
            began = self._began.pop(work.key)
            if outcome.how == "ran":
                self.spans.append((began, began + outcome.stage_s))
            self.done[work.key] = outcome
            self.display.end(work.name, outcome)
            made = folder(self.root, work.stage, *work.item.words)
            self.tracker.end(STAGES[work.stage], work.item, made, outcome)

    def fail(self, work: StageRun, text: str, status: str = "FAILED") -> None:
        """A stage failed, or was stopped (KILLED), without a word of its own."""
        with self._lock:
            self._read(work.key)
            if work.key in self._began:
                self._fail(work, text, status)

    def fail_all(self, text: str) -> None:
        """The run is stopped: so are all stages at work."""
        for work, _ in list(self._appended.values()):
            self.fail(work, text, "KILLED")

    def _follow(self) -> None:
        while not self._closing.wait(LOOK_S):
            with self._lock:
                for key in self._appended:
                    self._read(key)

    def _read(self, key: Key) -> None:
        """Tell what was appended to an event file."""
        work, events = self._appended[key]
        for event in events():
            self._take(work, event)

    def _take(self, work: StageRun, event: versioning.Event) -> None:
        kind = event["event"]
        if kind == "begin":
            if work.key not in self._began:
                self._begin(work)
        elif work.key not in self._began:
            return  # what was still on its way when the stage was given up
        elif kind == "fail":
            self._fail(work, event["text"], "FAILED")
        elif kind == "metric":
            self.tracker.point(STAGES[work.stage], work.item, event["name"], event["value"], event["step"])
        else:
            self.display.event(work.name, event)

    def _begin(self, work: StageRun) -> None:
        self._began[work.key] = time.monotonic()
        self.tracker.begin(STAGES[work.stage], work.item)
        self.display.begin(work.name)

    def _fail(self, work: StageRun, text: str, status: str) -> None:
        """It may be tried again."""
        del self._began[work.key]
        self.display.fail(work.name, text)
        self.tracker.fail(STAGES[work.stage], work.item, text, status)

"""A run as MLflow shows it: one parent per pipeline run, a nested child per stage. The one place that logs to it.

Importing MLflow and opening its store take seconds, and a server may be away for minutes, so a run writes what is to
be told into a spool on the disk, and a thread of its own delivers it while stages work.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from flows.tracking import mlflow_store, spool
from flows.workspace.paths import MainCheckout, Workspace
from flows.workspace.versioning import Outcome, address
from tasks.errors import StageError
from tasks.frame import manifest
from tasks.frame.items import Item
from tasks.frame.stage import Stage
from tasks.frame.stage import folder as stage_folder
from tasks.params import Params
from tasks.stages import STAGES

FLUSH_S = 2.0
VIEW = "workflowType=machine_learning"  # in addresses: else MLflow's pages open on traces, which are not ours
SECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for stage in STAGES.values() for name in stage.sections))
ARTIFACTS = ("history.json", "models.json", "pruning.json", "students.json", "metrics.json", "measurements.json", "intervals.json",
             "verdict.json", "lineage.json", "bundle.json", "report.json", "MODEL_CARD.md")  # fmt: skip
RETRY_S = 2.0  # between two attempts to reach an MLflow that is away
PATIENCE_S = 10.0  # for one that is away at the end of a run
DEADLINE_S = 120.0  # for one that answers, but slowly


class Tracker:
    """The MLflow side of one pipeline run. Methods may be called from any thread and return at once: what they tell goes
    into a spool (see spool.py), and from there to MLflow in the background, now or when it is back.
    """

    def __init__(
        self,
        main: MainCheckout,
        name: str,
        params: Params,
        tags: Mapping[str, str],
        say: Callable[[str], None] = print,
        recover: Callable[[MainCheckout, Callable[[str], None]], None] = mlflow_store.deliver_left,
    ) -> None:
        """Start the parent run, and deliver what killed runs left behind.

        `tags` must hold `slmops.flow_run`: with it a retry finds its runs again. `say` tells a person that MLflow went
        away or came back; `recover(main, say)` closes what killed runs left open, in the background.

        Raises:
            StageError: the disk is full.
        """
        self._main, self._params, self._tags, self._say = main, params, dict(tags), say
        self._recover = recover
        self._where = mlflow_store.uri(main)
        self._points: dict[str, list[tuple[str, float, int, int]]] = {}
        self._flushed: dict[str, float] = {}
        self._away = ""  # why MLflow does not answer now
        self._closing = threading.Event()
        self._spool = spool.Spool(main, self._tags["slmops.flow_run"], patience_s=PATIENCE_S)
        self._start("run", name, {})
        self._write("run", params=self._section_params(SECTIONS))
        self._store = mlflow_store.Store(main, self._spool)
        # A daemon: a process that ends by a bug before `close` must not wait for it. The next one closes its runs.
        self._deliverer = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._deliverer.start()

    def begin(self, stage: Stage, item: Item) -> None:
        """Open the child run of a stage, or open it again on a retry."""
        name = address(stage.name, *item.words)
        self._points[name], self._flushed[name] = [], time.monotonic()
        self._start(name, name, {f"slmops.{axis}": str(value) for axis, value in item.items()})
        self._write(name, params=self._section_params(stage.sections))

    def point(self, stage: Stage, item: Item, metric: str, value: float, step: int) -> None:
        """One point of a curve; sent in batches."""
        name = address(stage.name, *item.words)
        self._points[name].append((metric, value, step, mlflow_store.now()))
        if time.monotonic() - self._flushed[name] > FLUSH_S:
            self._flush(name)

    def end(self, stage: Stage, item: Item, folder: Path, outcome: Outcome) -> None:
        """Close the child run of a finished stage with its metrics and small files.

        Raises:
            StageError: MLflow refused something that this run told it.
        """
        name = address(stage.name, *item.words)
        self._flush(name)
        made = manifest.load(folder)
        self._write(
            name,
            metrics={**made.metrics, **_numbers(folder), "seconds": outcome.stage_s},
            tags={"slmops.cached": str(outcome.how != "ran").lower(), "slmops.manifest": manifest.digest(folder)},
        )
        self._files(name, (folder / file for file in ARTIFACTS))
        if stage.name == "acquire":
            self._spool.add(do="data", run=name, sets=_datasets(folder))
        self._spool.add(do="end", run=name, status="FINISHED", at=mlflow_store.now())
        self._raise_refusal()

    def fail(self, stage: Stage, item: Item, text: str, status: str) -> None:
        """Close the child run of a stage that failed (FAILED) or was stopped (KILLED)."""
        name = address(stage.name, *item.words)
        self._flush(name)
        self._write(name, tags={"slmops.error": text[:5000]})
        self._spool.add(do="end", run=name, status=status, at=mlflow_store.now())

    def settle(self, seconds: float) -> None:
        """Give MLflow that long to take all that was told so far: what comes next needs it."""
        deadline = time.monotonic() + seconds
        while self._spool.behind() and self._deliverer.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self, status: str, tags: Mapping[str, str], metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """End the parent run as FINISHED, FAILED or KILLED. Where MLflow is away for longer, `deliver_left` delivers it.

        Raises:
            StageError: MLflow refused something that this run told it, or the disk is full.
        """
        try:
            self._write("run", metrics=metrics, tags=tags)
            self._files("run", files)
            self._spool.add(do="end", run="run", status=status, at=mlflow_store.now())
            deadline = time.monotonic() + DEADLINE_S
            while self._spool.behind() and self._deliverer.is_alive() and time.monotonic() < deadline:
                if self._away:
                    deadline = min(deadline, time.monotonic() + PATIENCE_S)
                time.sleep(0.02)
        finally:
            died = not self._deliverer.is_alive()
            self._closing.set()
            self._deliverer.join()
            left = self._spool.behind()
            self._spool.close()
        waits = mlflow_store.WAITS.format(folder=self._spool.folder)
        if died:
            raise StageError(f"telling MLflow ended with a bug, see its traceback; {waits}")
        if left:
            self._say(f"warning: {mlflow_store.down(self._where, self._away)}; {waits}")
        self._raise_refusal()

    def _deliver(self) -> None:
        """The background thread: deliver until `close`, try again while MLflow is away."""
        try:
            self._recover(self._main, self._say)
        except StageError as error:
            self._say(f"warning: {error}")
        while not self._closing.wait(RETRY_S if self._away else 0.05):
            try:
                count = self._spool.deliver(self._store)
            except mlflow_store.Down as error:
                if not self._away:
                    self._say(
                        f"warning: {mlflow_store.down(self._where, error)}; the run goes on and tells it when it is back"
                    )
                self._away = str(error)
            else:
                if self._away:
                    self._say(f"MLflow answers again: delivered what had waited ({count} records)")
                self._away = ""

    def _raise_refusal(self) -> None:
        if self._store.refused:
            raise StageError(f"MLflow at {self._where} refused a record of this run: {self._store.refused}")

    def _start(self, run: str, name: str, extra: Mapping[str, str]) -> None:
        self._spool.add(
            do="start", run=run, name=name, tags={**self._tags, **extra, "slmops.stage": run}, at=mlflow_store.now()
        )

    def _files(self, run: str, files: Iterable[Path]) -> None:
        for file in files:
            if file.is_file():
                self._spool.add(do="file", run=run, file=self._spool.keep(file))

    def _section_params(self, sections: Iterable[str]) -> dict[str, str]:
        values = self._params.model_dump(mode="json", by_alias=True)
        return {
            name: text
            for section in sections
            for name, text in _flat(section, reduce(lambda node, key: node[key], section.split("."), values)).items()
        }

    def _flush(self, name: str) -> None:
        points, self._points[name] = self._points[name], []
        self._flushed[name] = time.monotonic()
        for start in range(0, len(points), 1000):  # MLflow takes no more at once
            self._spool.add(do="write", run=name, metrics=points[start : start + 1000], params={}, tags={})

    def _write(
        self,
        run: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        points = [(name, value, 0, mlflow_store.now()) for name, value in (metrics or {}).items()]
        self._spool.add(do="write", run=run, metrics=points, params=dict(params or {}), tags=dict(tags or {}))


def pages(main: MainCheckout, root: Workspace) -> tuple[str, str] | None:
    """Addresses of MLflow's pages of the newest run in the workspace `root` and of its report; None where no server
    shows them. Where browsers reach MLflow by another address than this process, SLMOPS_MLFLOW_UI_URL tells it.
    """
    where = (os.environ.get("SLMOPS_MLFLOW_UI_URL") or mlflow_store.uri(main)).rstrip("/")
    if not where.startswith(("http://", "https://")):
        return None
    with _answering(main):
        run = _newest(mlflow_store.client(main), main, root)
    if not run:
        return None
    page = f"{where}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"{page}?{VIEW}", f"{page}/artifacts/report.html?{VIEW}"


def tell_model(main: MainCheckout, root: Workspace, name: str, version: str, numbers: Mapping[str, Any]) -> None:
    """Tie the newest run in the workspace `root` to the version that it registered; both get the numbers of its file."""
    from mlflow.entities import LoggedModelOutput, Metric

    with _answering(main):
        store = mlflow_store.client(main)
        run = _newest(store, main, root)
        model = store.get_model_version(name, version).source.removeprefix("models:/")  # its model_id is empty
        metrics = [
            Metric(key, value, mlflow_store.now(), 0, model_id=model)
            for key, value in _flat_numbers("", numbers).items()
        ]
        store.log_batch(run.info.run_id, metrics=metrics)
        store.log_inputs(
            run.info.run_id, [mlflow_store.dataset(each) for each in _datasets(stage_folder(root, "acquire"))]
        )
        store.log_outputs(run.info.run_id, [LoggedModelOutput(model, 0)])


@contextmanager
def _answering(main: MainCheckout) -> Iterator[None]:
    """Ask MLflow something that cannot wait for it."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException  # type: ignore[import-untyped]

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise mlflow_store.down(mlflow_store.uri(main), str(error).splitlines()[0]) from error


def _newest(store: Any, main: MainCheckout, root: Workspace) -> Any:
    """The newest pipeline run in a workspace."""
    query = f"tags.`slmops.workspace` = '{root}' and tags.`slmops.stage` = 'run'"
    runs = store.search_runs(
        [mlflow_store.experiment(store, main)], query, max_results=1, order_by=["attributes.start_time DESC"]
    )
    return runs[0] if runs else None


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested parameters as dotted names; a list stays one value."""
    if isinstance(value, dict):
        return {name: text for key, item in value.items() for name, text in _flat(f"{prefix}.{key}", item).items()}
    return {prefix: json.dumps(value) if isinstance(value, list) else str(value)}


def _datasets(folder: Path) -> list[dict[str, str]]:
    """The data that `acquire` took, one MLflow data set a file."""
    data = json.loads((folder / "lineage.json").read_bytes()).get("data", {})
    return [
        {
            "name": Path(file).stem,
            "digest": digest[:32],
            "source_type": "local",
            "source": json.dumps({"uri": str(data.get("source"))}),
            "profile": json.dumps({"rows": data.get("rows", {}).get(Path(file).stem)}),
        }
        for file, digest in data.get("sha256", {}).items()
    ]


def _numbers(folder: Path) -> dict[str, float]:
    """The numbers of what validate and measure wrote, nested ones (`reference`) with a dotted name."""
    numbers: dict[str, float] = {}
    for name in ("metrics.json", "measurements.json"):
        path = folder / name
        if path.is_file():
            numbers |= _flat_numbers("", json.loads(path.read_bytes()))
    return numbers


def _flat_numbers(prefix: str, value: Any) -> dict[str, float]:
    if isinstance(value, dict):
        return {
            name: number
            for key, item in value.items()
            if key != "machine"  # its facts are in the file
            for name, number in _flat_numbers(f"{prefix}.{key}" if prefix else str(key), item).items()
        }
    return {prefix: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}

"""A run as MLflow shows it: one parent per pipeline run, a nested child per stage. The one place that logs to it.

Importing MLflow and opening its store take seconds, so everything is done in one thread of its own while the
first stage already works; what goes wrong there is raised where a stage begins or ends.
"""

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from flows.versioning import Outcome, address
from tasks import manifest
from tasks.errors import StageError
from tasks.params import Params
from tasks.stage import Stage

EXPERIMENT = "slmops"
FLUSH_S = 2.0
SECTIONS = ("acquire", "task", "finetune", "distill", "quantize", "validate", "package")
ARTIFACTS = ("history.json", "models.json", "pruning.json", "metrics.json", "measurements.json", "verdict.json",
             "lineage.json", "bundle.json", "report.json", "MODEL_CARD.md")  # fmt: skip
T = TypeVar("T")


def uri(main: Path) -> str:
    """The server that MLFLOW_TRACKING_URI names, else the database beside the main checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main / 'mlflow.db'}"


def check_server(where: str) -> None:
    """Ask a tracking server for its health, before any work starts.

    Raises:
        StageError: it does not answer within seconds.
    """
    if not where.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{where.rstrip('/')}/health", timeout=5) as answer:
            answer.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _down(where, getattr(error, "reason", error)) from None


def _down(where: str, why: object) -> StageError:
    return StageError(
        f"the MLflow server at {where} does not answer ({why}): start it, or unset MLFLOW_TRACKING_URI to use the "
        "embedded database; finished stages are kept"
    )


def client(main: Path) -> Any:
    """An MLflow client of the store that `uri` names."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri(main), registry_uri=uri(main))


class Tracker:
    """The MLflow side of one pipeline run. Methods may be called from any thread and return at once, but for
    `end` and `close`, which wait until all is written and raise what went wrong before.
    """

    def __init__(self, main: Path, name: str, params: Params, tags: Mapping[str, str]) -> None:
        """Open the store, close what a killed run left open and start the parent run, in the background.

        `tags` must hold `slmops.flow_run`: with it a retry finds its runs again.
        """
        self._main, self._name, self._params, self._tags = main, name, params, dict(tags)
        self._opened: tuple[Any, str, str] | None = None  # client, experiment id, parent run id
        self._runs: dict[str, str] = {}  # stage's address -> run id
        self._points: dict[str, list[tuple[str, float, int]]] = {}
        self._flushed: dict[str, float] = {}
        self._pending: dict[str, list[Future[None]]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._worker.submit(self._open)  # tried again, and its error raised, by whoever needs it

    def begin(self, stage: Stage, variant: str | None) -> None:
        """Open the child run of a stage, or open it again on a retry."""
        name = address(stage.name, variant)

        def work() -> None:
            store, place, parent = self._open()
            nested = {"mlflow.parentRunId": parent, "slmops.variant": variant or ""}
            self._runs[name] = self._find_or_start(store, place, name, name, nested)
            self._points[name], self._flushed[name] = [], time.monotonic()
            self._write(self._runs[name], params=self._section_params(stage.sections))

        self._pending[name] = [self._worker.submit(self._guard, work)]

    def point(self, stage: Stage, variant: str | None, metric: str, value: float, step: int) -> None:
        """One point of a curve; sent in batches."""
        name = address(stage.name, variant)

        def work() -> None:
            self._points[name].append((metric, value, step))
            if time.monotonic() - self._flushed[name] > FLUSH_S:
                self._flush(name)

        self._pending[name].append(self._worker.submit(self._guard, work))

    def end(self, stage: Stage, variant: str | None, folder: Path, outcome: Outcome) -> None:
        """Close the child run of a finished stage with its metrics and small files.

        Raises:
            StageError: the server stopped answering.
        """
        name = address(stage.name, variant)

        def work() -> None:
            store, run_id = self._open()[0], self._runs[name]
            self._flush(name)
            made = manifest.load(folder)
            self._write(
                run_id,
                metrics={**made.metrics, **_numbers(folder), "seconds": outcome.stage_s},
                tags={"slmops.cached": str(outcome.how != "ran").lower(), "slmops.manifest": manifest.digest(folder)},
            )
            for file in ARTIFACTS:
                if (folder / file).is_file():
                    store.log_artifact(run_id, str(folder / file))
            if stage.name == "acquire":
                store.log_inputs(run_id, _datasets(folder))
            store.set_terminated(run_id, "FINISHED")

        for future in self._pending.pop(name):
            future.result()
        self._worker.submit(self._guard, work).result()

    def fail(self, stage: Stage, variant: str | None, error: object, status: str) -> None:
        """Close the child run of a stage that failed (FAILED) or was stopped (KILLED).

        Does not wait and does not raise: the stage's own error is the one to tell.
        """
        name = address(stage.name, variant)

        def work() -> None:
            store, run_id = self._open()[0], self._runs[name]
            self._flush(name)
            self._write(run_id, tags={"slmops.error": str(error)[:5000]})
            store.set_terminated(run_id, status)

        self._worker.submit(self._guard, work)

    def close(self, status: str, tags: Mapping[str, str], metrics: Mapping[str, float], files: Sequence[Path]) -> str:
        """End the parent run as FINISHED, FAILED or KILLED and return its id.

        Raises:
            StageError: the server stopped answering.
        """

        def work() -> str:
            store, _, parent = self._open()
            self._write(parent, metrics=metrics, tags=tags)
            for file in files:
                store.log_artifact(parent, str(file))
            store.set_terminated(parent, status)
            return parent

        try:
            return self._worker.submit(self._guard, work).result()
        finally:
            self._worker.shutdown(wait=True)

    def _open(self) -> tuple[Any, str, str]:
        if self._opened is None:
            store = client(self._main)
            place = experiment(store, self._main)
            _close_dead(store, place)
            parent = self._find_or_start(store, place, "run", self._name, {})
            self._opened = store, place, parent
            self._write(parent, params=self._section_params(SECTIONS))
        return self._opened

    def _guard(self, work: Callable[[], T]) -> T:
        from mlflow.exceptions import MlflowException
        from requests import RequestException  # type: ignore[import-untyped]

        try:
            return work()
        except (MlflowException, RequestException) as error:
            raise _down(uri(self._main), str(error).splitlines()[0]) from error

    def _find_or_start(self, store: Any, place: str, key: str, name: str, extra: Mapping[str, str]) -> str:
        flow_run = self._tags["slmops.flow_run"]
        query = f"tags.`slmops.flow_run` = '{flow_run}' and tags.`slmops.stage` = '{key}'"
        known = store.search_runs([place], query, max_results=1)
        if known:
            store.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        tags = {
            **self._tags,
            **extra,
            "slmops.stage": key,
            "slmops.pid": str(os.getpid()),
            "slmops.host": socket.gethostname(),
        }
        return str(store.create_run(place, run_name=name, tags=tags).info.run_id)

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
        for start in range(0, len(points), 1000):  # the store takes no more at once
            self._write(self._runs[name], points=points[start : start + 1000])

    def _write(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        points: Iterable[tuple[str, float, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        assert self._opened is not None
        self._opened[0].log_batch(
            run_id,
            metrics=[
                *(Metric(name, value, now, 0) for name, value in (metrics or {}).items()),
                *(Metric(name, value, now, step) for name, value, step in points),
            ],
            params=[Param(name, value) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )


def experiment(client: Any, main: Path) -> str:
    """Id of the one experiment; made when it is missing."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return str(found.experiment_id)
    # A server keeps artifacts where it was told to; the embedded store keeps them beside its database.
    place = (main / "mlruns").as_uri() if uri(main).startswith("sqlite:") else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


def _close_dead(store: Any, place: str) -> None:
    """Mark as killed the runs of processes of this machine that are no more."""
    query = f"attributes.status = 'RUNNING' and tags.`slmops.host` = '{socket.gethostname()}'"
    for run in store.search_runs([place], query):
        if not _alive(int(run.data.tags["slmops.pid"])):
            store.set_terminated(run.info.run_id, "KILLED")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested parameters as dotted names; a list stays one value."""
    if isinstance(value, dict):
        return {name: text for key, item in value.items() for name, text in _flat(f"{prefix}.{key}", item).items()}
    return {prefix: json.dumps(value) if isinstance(value, list) else str(value)}


def _datasets(folder: Path) -> list[Any]:
    """The data that `acquire` took, one MLflow data set input a file."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = json.loads((folder / "lineage.json").read_bytes()).get("data", {})
    found = []
    for file, digest in data.get("sha256", {}).items():
        name = Path(file).stem
        found.append(
            DatasetInput(
                Dataset(
                    name=name,
                    digest=digest[:32],
                    source_type="local",
                    source=json.dumps({"uri": str(data.get("source"))}),
                    profile=json.dumps({"rows": data.get("rows", {}).get(name)}),
                ),
                tags=[InputTag("mlflow.data.context", name)],
            )
        )
    return found


def _numbers(folder: Path) -> dict[str, float]:
    """The numbers of validate's two files, nested ones (`ttft_s`) with a dotted name."""
    found: dict[str, float] = {}
    for name in ("metrics.json", "measurements.json"):
        path = folder / name
        if path.is_file():
            found |= _flat_numbers("", json.loads(path.read_bytes()))
    return found


def _flat_numbers(prefix: str, value: Any) -> dict[str, float]:
    if isinstance(value, dict):
        return {
            name: number
            for key, item in value.items()
            for name, number in _flat_numbers(f"{prefix}.{key}" if prefix else str(key), item).items()
        }
    return {prefix: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}

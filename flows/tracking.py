"""A run as MLflow shows it: one parent per pipeline run, a nested child per stage. The one place that logs to it.

Importing MLflow and opening its store take seconds, and a server may be away for minutes, so a run writes what is to
be told into a spool on the disk, and a thread of its own delivers it while stages work.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from flows import spool
from flows.versioning import Outcome, address
from tasks import manifest
from tasks.errors import StageError
from tasks.params import Params
from tasks.stage import Stage
from tasks.stage import folder as stage_folder

EXPERIMENT = "slmops"
FLUSH_S = 2.0
VIEW = "workflowType=machine_learning"  # in addresses: else MLflow's pages open on traces, which are not ours
SECTIONS = ("acquire", "task", "finetune", "distill", "quantize", "validate", "package")
ARTIFACTS = ("history.json", "models.json", "pruning.json", "metrics.json", "measurements.json", "verdict.json",
             "lineage.json", "bundle.json", "report.json", "MODEL_CARD.md")  # fmt: skip
RETRY_S = 2.0  # between two attempts to reach an MLflow that is away
PATIENCE_S = 10.0  # for one that is away at the end of a run
WAITS = "what it is to be told waits in {folder} for the next `slmops run` or `slmops up`"
DEADLINE_S = 120.0  # for one that answers, but slowly


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


class Down(Exception):
    """MLflow does not answer, or cannot do its work now."""


class Tracker:
    """The MLflow side of one pipeline run. Methods may be called from any thread and return at once: what they tell goes
    into a spool (see spool.py), and from there to MLflow in the background, now or when it is back.
    """

    def __init__(
        self, main: Path, name: str, params: Params, tags: Mapping[str, str], say: Callable[[str], None] = print
    ) -> None:
        """Start the parent run, and deliver what killed runs left behind.

        `tags` must hold `slmops.flow_run`: with it a retry finds its runs again. `say` tells a person that MLflow went
        away or came back.

        Raises:
            StageError: the disk is full.
        """
        self._main, self._params, self._tags, self._say = main, params, dict(tags), say
        self._points: dict[str, list[tuple[str, float, int, int]]] = {}
        self._flushed: dict[str, float] = {}
        self._away = ""  # why MLflow does not answer now
        self._closing = threading.Event()
        self._spool = spool.Spool(main, self._tags["slmops.flow_run"], patience_s=PATIENCE_S)
        self._start("run", name, {})
        self._write("run", params=self._section_params(SECTIONS))
        self._store = _Store(main, self._spool)
        # A daemon: a process that ends by a bug before `close` must not wait for it. The next one closes its runs.
        self._deliverer = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._deliverer.start()

    def begin(self, stage: Stage, variant: str | None) -> None:
        """Open the child run of a stage, or open it again on a retry."""
        name = address(stage.name, variant)
        self._points[name], self._flushed[name] = [], time.monotonic()
        self._start(name, name, {"slmops.variant": variant or ""})
        self._write(name, params=self._section_params(stage.sections))

    def point(self, stage: Stage, variant: str | None, metric: str, value: float, step: int) -> None:
        """One point of a curve; sent in batches."""
        name = address(stage.name, variant)
        self._points[name].append((metric, value, step, _now()))
        if time.monotonic() - self._flushed[name] > FLUSH_S:
            self._flush(name)

    def end(self, stage: Stage, variant: str | None, folder: Path, outcome: Outcome) -> None:
        """Close the child run of a finished stage with its metrics and small files.

        Raises:
            StageError: MLflow refused something that this run told it.
        """
        name = address(stage.name, variant)
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
        self._spool.add(do="end", run=name, status="FINISHED", at=_now())
        self._raise_refusal()

    def fail(self, stage: Stage, variant: str | None, error: object, status: str) -> None:
        """Close the child run of a stage that failed (FAILED) or was stopped (KILLED)."""
        name = address(stage.name, variant)
        self._flush(name)
        self._write(name, tags={"slmops.error": str(error)[:5000]})
        self._spool.add(do="end", run=name, status=status, at=_now())

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
            self._spool.add(do="end", run="run", status=status, at=_now())
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
        if died:
            raise StageError(
                f"telling MLflow ended with a bug, see its traceback; {WAITS.format(folder=self._spool.folder)}"
            )
        if left:
            self._say(f"warning: {_down(uri(self._main), self._away)}; {WAITS.format(folder=self._spool.folder)}")
        self._raise_refusal()

    def _deliver(self) -> None:
        """The background thread: deliver until `close`, try again while MLflow is away."""
        try:
            deliver_left(self._main, self._say)
        except StageError as error:
            self._say(f"warning: {error}")
        while not self._closing.wait(RETRY_S if self._away else 0.05):
            try:
                count = self._spool.deliver(self._store)
            except Down as error:
                if not self._away:
                    self._say(f"warning: {_down(uri(self._main), error)}; the run goes on and tells it when it is back")
                self._away = str(error)
            else:
                if self._away:
                    self._say(f"MLflow answers again: delivered what had waited ({count} records)")
                self._away = ""

    def _raise_refusal(self) -> None:
        if self._store.refused:
            raise StageError(f"MLflow at {uri(self._main)} refused a record of this run: {self._store.refused}")

    def _start(self, run: str, name: str, extra: Mapping[str, str]) -> None:
        self._spool.add(do="start", run=run, name=name, tags={**self._tags, **extra, "slmops.stage": run}, at=_now())

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
        points = [(name, value, 0, _now()) for name, value in (metrics or {}).items()]
        self._spool.add(do="write", run=run, metrics=points, params=dict(params or {}), tags=dict(tags or {}))


class _Store:
    """Tells MLflow the records of one spool. Told twice, each has the effect of once: a point is its name, step, time
    and value to MLflow, and a run is found again by its flow run and stage.
    """

    def __init__(self, main: Path, spool: spool.Spool) -> None:
        self._main, self._spool = main, spool
        self._client: Any = None
        self.refused = ""  # the first record that MLflow will never take

    def __call__(self, record: spool.Record) -> None:
        """Raises:
        Down: try again later.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client = self._client or client(self._main)
            self._tell(record)
        except MlflowException as error:
            said = str(error).splitlines()[0]
            if error.get_http_status_code() in range(400, 500) and error.get_http_status_code() != 429:
                self.refused = self.refused or said
            else:
                raise Down(said) from error
        except OSError as error:  # requests' errors among them
            raise Down(str(error)) from error

    def _tell(self, record: spool.Record) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if record["do"] == "start":
            self._spool.memory[record["run"]] = self._start(record)
            return
        run_id = self._spool.memory.get(record["run"])
        if run_id is None:
            return  # MLflow refused to start it, which is told
        if record["do"] == "write":
            self._client.log_batch(
                run_id,
                metrics=[Metric(name, value, at, step) for name, value, step, at in record["metrics"]],
                params=[Param(name, value) for name, value in record["params"].items()],
                tags=[RunTag(name, value) for name, value in record["tags"].items()],
            )
        elif record["do"] == "file":
            self._client.log_artifact(run_id, str(self._spool.folder / record["file"]))
        elif record["do"] == "data":
            self._client.log_inputs(run_id, [_dataset(each) for each in record["sets"]])
        else:
            self._client.set_terminated(run_id, record["status"], record["at"])

    def knows(self) -> bool:
        """Does this MLflow hold the run of the spool, as far as it was told of it? Else it is another MLflow's."""
        from mlflow.exceptions import MlflowException

        try:
            return "run" not in self._spool.memory or bool(client(self._main).get_run(self._spool.memory["run"]))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise Down(str(error).splitlines()[0]) from error

    def _start(self, record: spool.Record) -> str:
        place, tags = experiment(self._client, self._main), record["tags"]
        query = f"tags.`slmops.flow_run` = '{tags['slmops.flow_run']}' and tags.`slmops.stage` = '{record['run']}'"
        known = self._client.search_runs([place], query, max_results=1)
        if known:
            self._client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        if record["run"] != "run":
            tags = {**tags, "mlflow.parentRunId": self._spool.memory["run"]}
        made = self._client.create_run(place, record["at"], tags, record["name"])
        return str(made.info.run_id)


def deliver_left(main: Path, say: Callable[[str], None]) -> None:
    """Deliver what runs left that were killed or could not reach MLflow; those still open are closed as killed.

    Raises:
        StageError: MLflow does not answer; what is left waits on.
    """
    for name in spool.left(main):
        try:
            found = spool.Spool(main, name)
        except spool.Held:
            continue  # its run was taken up again
        ends: dict[str, bool] = {}
        names: dict[str, str] = {}
        for record in found.records():
            if record["do"] == "start":
                ends[record["run"]], names[record["run"]] = False, record["name"]
            elif record["do"] == "end":
                ends[record["run"]] = True
        for run in [run for run, ended in reversed(ends.items()) if not ended]:
            found.add(do="end", run=run, status="KILLED", at=_now())
        store = _Store(main, found)
        try:
            if not store.knows():
                say(f"note: {found.folder} is for another MLflow than {uri(main)}: use that, or delete the folder")
                continue
            count = found.deliver(store)
        except Down as error:
            raise StageError(f"{_down(uri(main), error)}; {WAITS.format(folder=found.folder)}") from None
        finally:
            found.close()
        say(f"MLflow was told what run {names['run']} left when it ended ({count} records)")
        if store.refused:
            say(f"warning: MLflow refused some of it: {store.refused}")


def _now() -> int:
    return int(time.time() * 1000)


def page(main: Path, root: Path, part: str = "") -> str:
    """Address of MLflow's page of the newest run in the workspace `root`, or of a part of it; "" where no server shows it."""
    where, run = uri(main).rstrip("/"), None
    if where.startswith(("http://", "https://")):
        with _answering(main):
            run = _newest(client(main), main, root)
    return f"{where}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{part}?{VIEW}" if run else ""


def tell_model(main: Path, root: Path, name: str, version: str, folder: Path) -> None:
    """Tie the newest run in the workspace `root` to the version that it registered; both get the numbers in `folder`."""
    from mlflow.entities import LoggedModelOutput, Metric

    with _answering(main):
        store = client(main)
        run = _newest(store, main, root)
        model = store.get_model_version(name, version).source.removeprefix("models:/")  # its model_id is empty
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, 0, model_id=model) for key, value in _numbers(folder).items()]
        store.log_batch(run.info.run_id, metrics=metrics)
        store.log_inputs(run.info.run_id, [_dataset(each) for each in _datasets(stage_folder(root, "acquire"))])
        store.log_outputs(run.info.run_id, [LoggedModelOutput(model, 0)])


@contextmanager
def _answering(main: Path) -> Iterator[None]:
    """Ask MLflow something that cannot wait for it."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException  # type: ignore[import-untyped]

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise _down(uri(main), str(error).splitlines()[0]) from error


def _newest(store: Any, main: Path, root: Path) -> Any:
    """The newest pipeline run in a workspace."""
    query = f"tags.`slmops.workspace` = '{root}' and tags.`slmops.stage` = 'run'"
    found = store.search_runs([experiment(store, main)], query, max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None


def experiment(client: Any, main: Path) -> str:
    """Id of the one experiment; made when it is missing."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return str(found.experiment_id)
    # A server keeps artifacts where it was told to; the embedded store keeps them beside its database.
    place = (main / "mlruns").as_uri() if uri(main).startswith("sqlite:") else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


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


def _dataset(fields: dict[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(Dataset(**fields), tags=[InputTag("mlflow.data.context", fields["name"])])


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

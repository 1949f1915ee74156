"""Where MLflow is, and what delivers to it what spools hold: idempotent, so that a record told twice counts once."""

import http.client
import os
import socket
import sqlite3
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flows.tracking import spool
from flows.workspace import paths
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError, ConfigError, StageError

EXPERIMENT = "slmops"
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PASSING = {401, 403, 408, 429}  # a password, a host's name, a moment: nothing that the record itself is refused for
WAITS = "what it is to be told waits in {folder} for the next `slmops run` or `slmops up`"


def uri(main: MainCheckout) -> str:
    """The server that MLFLOW_TRACKING_URI names, else the database beside the main checkout.

    Raises:
        ConfigError: that address is malformed, or holds a password, which would be shown wherever it is told.
    """
    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.mlflow_database(main)}"
    try:
        parts = urlsplit(where)
        right = parts.password is None and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise ConfigError(
            "MLFLOW_TRACKING_URI is malformed or holds a password: write http://host:port, and the user and password "
            "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return where


def check_server(where: str) -> None:
    """Ask what `uri` names (`where`) whether it will take a run's record, before any work starts. Of an SQLite file only the
    head is read: for MLflow to open it takes seconds, and the background does that.

    Raises:
        ArtifactError: the database is damaged.
        ConfigError: it is nothing that MLflow keeps records in, or wants a password.
        StageError: it does not answer within seconds.
    """
    if where.startswith("sqlite:"):
        return _check_file(Path(where.removeprefix("sqlite:///")))
    guarded = False
    scheme, _, _ = where.partition(":")
    try:
        if scheme in ("http", "https"):
            with urllib.request.urlopen(f"{where.rstrip('/')}/health", timeout=5) as answer:
                answer.read()
            return
        kind = scheme.partition("+")[0]
        if kind in PORTS:  # of a database that is away MLflow would tell after two minutes
            place = urlsplit(where)
            socket.create_connection((place.hostname or "localhost", place.port or PORTS[kind]), timeout=5).close()
    except urllib.error.HTTPError as error:  # hosted ones have no such page, and proxies answer nobody without a token
        guarded = error.code in (401, 403)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # which MLflow's client may be told to take
            raise down(where, error.reason) from None
    except (OSError, http.client.HTTPException) as error:
        raise down(where, error) from None
    _check_store(where, guarded)


def _check_file(path: Path) -> None:
    if not path.is_file():
        return  # MLflow makes it
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=5)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        return  # busy, or it needs to be recovered first, which a reader may not
    except sqlite3.DatabaseError as error:
        raise ArtifactError(
            f"{path}, MLflow's record of all runs and the registry, is damaged ({error}): put back a copy of it, or "
            "move it away to begin anew (what a registry holds is in it alone)"
        ) from None


def _check_store(where: str, guarded: bool) -> None:
    """Ask the interface itself, as the runs do: with the person's credentials, certificates and plug-ins."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException  # type: ignore[import-untyped]
    from sqlalchemy.exc import SQLAlchemyError

    try:
        MlflowClient(tracking_uri=where, registry_uri=where).search_experiments(max_results=1)
    except MlflowException as error:
        said = str(error).splitlines()[0][:200]
        if guarded or error.get_http_status_code() in (401, 403):
            raise ConfigError(
                f"MLflow at {where} refuses this user ({said}): set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        if where.startswith(("http://", "https://")):
            raise down(where, said) from None
        raise _no_store(where, said) from None
    except (SQLAlchemyError, ModuleNotFoundError) as error:  # the database refuses, or its driver is missing
        raise _no_store(where, str(error).splitlines()[0][:200]) from None
    except RequestException as error:
        raise down(where, str(error)[:200]) from None


def _no_store(where: str, why: str) -> ConfigError:
    return ConfigError(
        f"MLFLOW_TRACKING_URI is {where}, and MLflow cannot keep a record there ({why}): name a server or a database "
        "(sqlite:////folder/mlflow.db), or unset it to use the embedded one"
    )


def down(where: str, why: object) -> StageError:
    """The error for a server that does not answer."""
    return StageError(
        f"the MLflow server at {where} does not answer ({why}): start it, or unset MLFLOW_TRACKING_URI to use the "
        "embedded database; finished stages are kept"
    )


def client(main: MainCheckout) -> Any:
    """An MLflow client of the store that `uri` names."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri(main), registry_uri=uri(main))


class Down(Exception):
    """MLflow does not answer, or cannot do its work now."""


class Store:
    """Tells MLflow the records of one spool. Told twice, each has the effect of once: a point is its name, step, time
    and value to MLflow, and a run is found again by its flow run and stage.
    """

    def __init__(self, main: MainCheckout, spool: spool.Spool) -> None:
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
            status = error.get_http_status_code()
            passing = (
                status >= 500 or status in PASSING or error.error_code == "ENDPOINT_NOT_FOUND"
            )  # that is no MLflow
            if passing:
                raise Down(said) from error
            self.refused = self.refused or said
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
            self._client.log_inputs(run_id, [dataset(each) for each in record["sets"]])
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


def deliver_left(main: MainCheckout, say: Callable[[str], None]) -> None:
    """Deliver what runs left that were killed or could not reach MLflow; those still open are closed as killed.

    Raises:
        StageError: MLflow does not answer; what is left waits on.
    """
    for name in spool.left(main):
        try:
            journal = spool.Spool(main, name)
        except spool.Held:
            continue  # its run was taken up again
        ends: dict[str, bool] = {}
        names: dict[str, str] = {}
        for record in journal.records():
            if record["do"] == "start":
                ends[record["run"]], names[record["run"]] = False, record["name"]
            elif record["do"] == "end":
                ends[record["run"]] = True
        for run in [run for run, ended in reversed(ends.items()) if not ended]:
            journal.add(do="end", run=run, status="KILLED", at=now())
        store = Store(main, journal)
        try:
            if not store.knows():
                say(f"note: {journal.folder} is for another MLflow than {uri(main)}: use that, or delete the folder")
                continue
            count = journal.deliver(store)
        except Down as error:
            raise StageError(f"{down(uri(main), error)}; {WAITS.format(folder=journal.folder)}") from None
        finally:
            journal.close()
        say(f"MLflow was told what run {names['run']} left when it ended ({count} records)")
        if store.refused:
            say(f"warning: MLflow refused some of it: {store.refused}")


def experiment(client: Any, main: MainCheckout) -> str:
    """Id of the one experiment; made when it is missing."""
    known = client.get_experiment_by_name(EXPERIMENT)
    if known:
        return str(known.experiment_id)
    # A server keeps artifacts where it was told to; the embedded store keeps them beside its database.
    place = paths.mlflow_artifacts(main).as_uri() if uri(main).startswith("sqlite:") else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


def dataset(fields: dict[str, str]) -> Any:
    """MLflow's form of one file of the data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(Dataset(**fields), tags=[InputTag("mlflow.data.context", fields["name"])])


def now() -> int:
    """Milliseconds of the epoch, as MLflow counts."""
    return int(time.time() * 1000)

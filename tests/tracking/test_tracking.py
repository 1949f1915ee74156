"""What MLflow is told of a run, on a real store and, for the server, a port where none answers."""

import contextlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkout import DEFAULTS, empty_store

from flows.tracking import mlflow_runs, mlflow_store, spool
from flows.workspace import paths
from flows.workspace.versioning import Outcome
from tasks import params
from tasks.errors import ArtifactError, ConfigError, StageError
from tasks.frame import manifest
from tasks.frame.items import Item
from tasks.stages import STAGES

PARAMS = params.load(DEFAULTS)
RAN = Outcome("ran", 1.5, 2.0)


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    return tmp_path


def output(root: Path, **metrics: float) -> Path:
    """A finished stage's folder."""
    folder = root / "out"
    folder.mkdir(exist_ok=True)
    (folder / "verdict.json").write_text(json.dumps({"verdict": "pass"}))
    (folder / "measurements.json").write_text(json.dumps({"ttft_p95_s": 0.25, "load_s": 1, "quiet": True}))
    manifest.write(folder, stage="x", params="p", inputs={}, measured=["measurements.json"], metrics=metrics)
    return folder


def found(main: Path) -> dict[str, Any]:
    store = mlflow_store.client(main)
    return {run.data.tags["mlflow.runName"]: run for run in store.search_runs([mlflow_store.experiment(store, main)])}


def test_a_run_is_a_parent_with_a_nested_child_a_stage(main: Path) -> None:
    tracker = mlflow_runs.Tracker(main, "first", PARAMS, {"slmops.flow_run": "f1", "slmops.git_commit": "abc"})
    tracker.begin(STAGES["quantize"], Item(variant="q4_0"))
    for step in range(2500):
        tracker.point(STAGES["quantize"], Item(variant="q4_0"), "loss", 1 / (step + 1), step)
    tracker.end(STAGES["quantize"], Item(variant="q4_0"), output(main, accuracy=0.5, odd=float("nan")), RAN)
    tracker.close("FINISHED", {"slmops.dvc_lock": "d"}, {"wall_s": 3.0}, (main / "out" / "verdict.json",))

    runs = found(main)
    parent, child = runs["first"], runs["quantize@q4_0"]
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["slmops.git_commit"] == "abc"
    assert parent.data.params["validate.gates"].startswith('[{"name": "accuracy_retention"')
    assert child.data.params["quantize.options.model_builder.block_size"] == "32"
    assert child.data.metrics["accuracy"] == 0.5
    assert child.data.metrics["ttft_p95_s"] == 0.25
    assert "quiet" not in child.data.metrics
    store = mlflow_store.client(main)
    assert len(store.get_metric_history(child.info.run_id, "loss")) == 2500
    assert {file.path for file in store.list_artifacts(child.info.run_id)} == {"measurements.json", "verdict.json"}
    assert [file.path for file in store.list_artifacts(parent.info.run_id)] == ["verdict.json"]
    assert (main / "mlruns").is_dir()


def test_a_retry_opens_its_run_again(main: Path) -> None:
    stage = STAGES["convert"]
    tracker = mlflow_runs.Tracker(main, "r", PARAMS, {"slmops.flow_run": "f1"})
    tracker.begin(stage, Item())
    tracker.fail(stage, Item(), "the disk is full", "FAILED")
    tracker.begin(stage, Item())
    tracker.end(stage, Item(), output(main, answer=1.0), Outcome("restored", 0.0, 1.0))
    tracker.close("FINISHED", {}, {}, ())
    child = found(main)["convert"]
    assert (len(found(main)), child.info.status) == (2, "FINISHED")
    assert child.data.tags["slmops.cached"] == "true"
    assert child.data.tags["slmops.error"] == "the disk is full"


KILLED = """
import os, signal, sys
from pathlib import Path
from flows.tracking import mlflow_store, spool, mlflow_runs
from tasks import params
from tasks.frame.items import Item
from tasks.stages import STAGES
tracker = mlflow_runs.Tracker(Path(sys.argv[1]), "dead", params.load(Path(sys.argv[2])), {"slmops.flow_run": "f1"})
tracker.begin(STAGES["distill"], Item(seed=17))
if sys.argv[3] == "told":
    tracker.settle(300)
tracker.point(STAGES["distill"], Item(seed=17), "loss", 0.5, 1)
tracker._flush("distill@17")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_never_closed_its_run_ends_all_the_same(main: Path) -> None:
    params_yaml = str(DEFAULTS)
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise TypeError('a bug')")
    done = subprocess.run([sys.executable, "-c", code, str(main), params_yaml, "told"], timeout=300)
    assert done.returncode == 1
    assert spool.left(main) == ["f1"]


def kill_a_run(main: Path, told: str) -> None:
    arguments = [str(main), str(DEFAULTS), told]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -9


@pytest.mark.parametrize("told", ["told", "never told"])
def test_what_a_killed_run_left_is_told_and_closed_by_the_next(main: Path, told: str) -> None:
    kill_a_run(main, told)
    assert spool.left(main) == ["f1"]
    said: list[str] = []
    mlflow_runs.Tracker(main, "next", PARAMS, {"slmops.flow_run": "f2"}, said.append).close("FINISHED", {}, {}, ())
    runs = found(main)
    assert {name: run.info.status for name, run in runs.items()} == {
        "dead": "KILLED", "distill@17": "KILLED", "next": "FINISHED",
    }  # fmt: skip
    assert runs["distill@17"].data.metrics == {"loss": 0.5}
    assert ["MLflow was told what run dead left" in text for text in said] == [True]
    assert spool.left(main) == []
    assert list(paths.spools(main).iterdir()) == []


def test_a_killed_run_that_is_taken_up_again_is_not_closed(main: Path) -> None:
    kill_a_run(main, "told")
    tracker = mlflow_runs.Tracker(main, "dead", PARAMS, {"slmops.flow_run": "f1"})
    tracker.begin(STAGES["distill"], Item(seed=17))
    tracker.end(STAGES["distill"], Item(seed=17), output(main, answer=1.0), RAN)
    tracker.close("FINISHED", {}, {}, ())
    runs = found(main)
    assert {name: run.info.status for name, run in runs.items()} == {"dead": "FINISHED", "distill@17": "FINISHED"}
    assert runs["distill@17"].data.metrics["loss"] == 0.5


def test_what_another_mlflow_was_told_is_not_told_to_this_one(main: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_a_run(main, "told")
    (main / "mlflow.db").unlink()
    shutil.copy(empty_store(), main / "mlflow.db")
    said: list[str] = []
    mlflow_store.deliver_left(main, said.append)
    assert str(paths.spools(main) / "f1") in said[0]
    assert mlflow_store.uri(main) in said[0]
    assert spool.left(main) == ["f1"]


def test_told_twice_counts_once(main: Path) -> None:
    journal = spool.Spool(main, "f1")
    tags = {"slmops.flow_run": "f1", "slmops.stage": "run"}
    journal.add(do="start", run="run", name="r", tags=tags, at=1)
    journal.add(do="write", run="run", metrics=[["loss", 0.5, 1, 5], ["loss", float("nan"), 2, 5]], params={"a": "b"}, tags={})  # fmt: skip
    sets = [{"name": "train", "digest": "d", "source_type": "local", "source": "{}", "profile": "{}"}]
    journal.add(do="data", run="run", sets=sets)
    journal.add(do="end", run="run", status="FINISHED", at=9)
    tell = mlflow_store.Store(main, journal)
    for record in [*journal.records(), *journal.records()]:
        tell(record)
    (run,) = found(main).values()
    store = mlflow_store.client(main)
    assert [point.step for point in store.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert len(run.inputs.dataset_inputs) == 1
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1, 9)


def test_a_server_that_does_not_answer_is_told_before_any_work() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StageError, match=rf"{where} .*MLFLOW_TRACKING_URI"):
            mlflow_store.check_server(where)
    mlflow_store.check_server("sqlite:///no/server/to/ask.db")


@pytest.fixture
def hosted(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an MLflow without a public /health, which the parameter says how it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = "Authorization" in self.headers
            missing = request.param == 404 and "/api/" not in self.path
            self.send_response(404 if missing else 401 if request.param == 401 and not allowed else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("hosted", [404, 401], indirect=True)
def test_an_mlflow_without_a_public_page_is_asked_as_this_user(hosted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    mlflow_store.check_server(hosted)


@pytest.mark.parametrize("hosted", [401], indirect=True)
def test_an_mlflow_that_wants_a_password_says_so(hosted: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_TOKEN"):
        mlflow_store.check_server(hosted)


@pytest.mark.parametrize("where", ["file:///tmp/mlruns", "mlruns", "nothing://here"])
def test_what_mlflow_keeps_no_record_in_is_told_before_any_work(where: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        mlflow_store.check_server(where)


def test_a_database_that_is_away_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{taken.getsockname()[1]}/runs"
        with pytest.raises(StageError, match=f"{place} .*MLFLOW_TRACKING_URI"):
            mlflow_store.check_server(f"postgresql+psycopg2://me@{place}")


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mlflow db?.db"
    mlflow_store.check_server(f"sqlite:///{path}")  # not made yet
    path.write_bytes(b"no database\n" * 100)
    with pytest.raises(ArtifactError, match=r"mlflow db\?\.db"):
        mlflow_store.check_server(f"sqlite:///{path}")
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE t (a)").connection.close()
    mlflow_store.check_server(f"sqlite:///{path}")


def test_a_run_goes_on_without_mlflow_and_tells_it_later(main: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(mlflow_runs, "PATIENCE_S", 0.1)
    said: list[str] = []
    tracker = mlflow_runs.Tracker(main, "r", PARAMS, {"slmops.flow_run": "f1"}, said.append)
    tracker.begin(STAGES["convert"], Item())
    tracker.point(STAGES["convert"], Item(), "loss", 0.5, 1)
    tracker.end(STAGES["convert"], Item(), output(main), RAN)
    (main / "out" / "verdict.json").unlink()  # what was told is kept as it was
    tracker.close("FINISHED", {}, {}, ())
    assert [text.split(":")[0] for text in said] == ["warning", "warning"]
    assert "http://127.0.0.1:9 " in said[0]
    assert str(paths.spools(main) / "f1") in said[1]
    with pytest.raises(StageError, match=f"http://127.0.0.1:9 .*{paths.spools(main) / 'f1'}"):
        mlflow_store.deliver_left(main, said.append)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow_store.deliver_left(main, said.append)
    assert said[-1].startswith("MLflow was told what run r left when it ended (")
    runs = found(main)
    assert {name: run.info.status for name, run in runs.items()} == {"r": "FINISHED", "convert": "FINISHED"}
    assert runs["convert"].data.metrics["loss"] == 0.5
    files = mlflow_store.client(main).list_artifacts(runs["convert"].info.run_id)
    assert {file.path for file in files} == {"measurements.json", "verdict.json"}


def test_what_mlflow_refuses_fails_the_run(main: Path) -> None:
    tracker = mlflow_runs.Tracker(main, "r", PARAMS, {"slmops.flow_run": "f1"})
    tracker.begin(STAGES["convert"], Item())
    tracker.point(STAGES["convert"], Item(), "no/such//name", 0.5, 1)
    tracker.end(STAGES["convert"], Item(), output(main), RAN)
    with pytest.raises(StageError, match="no/such//name"):
        tracker.close("FINISHED", {}, {}, ())
    assert found(main)["convert"].info.status == "FINISHED"


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("PERMISSION_DENIED", True),
        ("UNAUTHENTICATED", True),
        ("ENDPOINT_NOT_FOUND", True),
        ("INVALID_PARAMETER_VALUE", False),
    ],
)
def test_what_mlflow_turns_away_for_a_password_or_an_address_is_kept(
    main: Path, monkeypatch: pytest.MonkeyPatch, code: str, kept: bool
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    def refuse(*given: Any, **more: Any) -> None:
        raise MlflowException("turned away", getattr(databricks_pb2, code))

    kill_a_run(main, "told")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", refuse)
        with pytest.raises(StageError, match="turned away") if kept else contextlib.nullcontext():
            mlflow_store.deliver_left(main, print)
    assert bool(spool.left(main)) == kept


def test_a_journal_that_was_cut_off_is_taken_up(tmp_path: Path) -> None:
    first = spool.Spool(tmp_path, "s")
    first.add(number=1)
    first.add(number=2)
    with pytest.raises(spool.Held, match=str(first.folder)):
        spool.Spool(tmp_path, "s")
    told: list[int] = []

    def tell(record: dict[str, int]) -> None:
        if record["number"] == 2:
            raise mlflow_store.Down("away")
        told.append(record["number"])

    with pytest.raises(mlflow_store.Down):
        first.deliver(tell)
    first._journal.write(b'{"numb')  # and killed
    first.close()

    second = spool.Spool(tmp_path, "s")
    second.add(number=3)
    assert second.deliver(lambda record: told.append(record["number"])) == 2
    assert told == [1, 2, 3]
    second.close()
    assert not second.folder.exists()


@pytest.mark.parametrize(
    "where", ["http://ada:planted@127.0.0.1:5000", "http://ada:planted@host:many", "http://planted:x"]
)
def test_an_address_with_a_password_is_refused_and_not_repeated(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI .*MLFLOW_TRACKING_USERNAME") as caught:
        mlflow_store.uri(tmp_path)
    assert "planted" not in str(caught.value)

"""What MLflow is told of a run, on a real store and, for the server, a port where none answers."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import empty_store

from flows import tracking
from flows.versioning import Outcome
from tasks import manifest, params
from tasks.errors import StageError
from tasks.stages import STAGES

PARAMS = params.load(Path(__file__).parent.parent / "params.yaml")
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
    (folder / "measurements.json").write_text(json.dumps({"ttft_s": {"p95": 0.25}, "load_s": 1, "quiet": True}))
    manifest.write(folder, stage="x", params="p", inputs={}, measured=["measurements.json"], metrics=metrics)
    return folder


def found(main: Path) -> dict[str, Any]:
    store = tracking.client(main)
    return {run.data.tags["mlflow.runName"]: run for run in store.search_runs([tracking.experiment(store, main)])}


def test_a_run_is_a_parent_with_a_nested_child_a_stage(main: Path) -> None:
    tracker = tracking.Tracker(main, "first", PARAMS, {"slmops.flow_run": "f1", "slmops.git_commit": "abc"})
    tracker.begin(STAGES["quantize"], "q4_0")
    for step in range(2500):
        tracker.point(STAGES["quantize"], "q4_0", "loss", 1 / (step + 1), step)
    tracker.end(STAGES["quantize"], "q4_0", output(main, accuracy=0.5, odd=float("nan")), RAN)
    tracker.close("FINISHED", {"slmops.dvc_lock": "d"}, {"wall_s": 3.0}, (main / "out" / "verdict.json",))

    runs = found(main)
    parent, child = runs["first"], runs["quantize@q4_0"]
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["slmops.git_commit"] == "abc"
    assert parent.data.params["validate.gates"].startswith('[{"name": "accuracy_retention"')
    assert child.data.params["quantize.onnx.block_size"] == "32"
    assert child.data.metrics["accuracy"] == 0.5
    assert child.data.metrics["ttft_s.p95"] == 0.25
    assert "quiet" not in child.data.metrics
    store = tracking.client(main)
    assert len(store.get_metric_history(child.info.run_id, "loss")) == 2500
    assert {file.path for file in store.list_artifacts(child.info.run_id)} == {"measurements.json", "verdict.json"}
    assert [file.path for file in store.list_artifacts(parent.info.run_id)] == ["verdict.json"]
    assert (main / "mlruns").is_dir()


def test_a_retry_opens_its_run_again(main: Path) -> None:
    stage = STAGES["convert"]
    tracker = tracking.Tracker(main, "r", PARAMS, {"slmops.flow_run": "f1"})
    tracker.begin(stage, None)
    tracker.fail(stage, None, StageError("the disk is full"), "FAILED")
    tracker.begin(stage, None)
    tracker.end(stage, None, output(main, answer=1.0), Outcome("restored", 0.0, 1.0))
    tracker.close("FINISHED", {}, {}, ())
    child = found(main)["convert"]
    assert (len(found(main)), child.info.status) == (2, "FINISHED")
    assert child.data.tags["slmops.cached"] == "true"
    assert child.data.tags["slmops.error"] == "the disk is full"


def test_runs_that_a_killed_process_left_open_are_closed_by_the_next(main: Path) -> None:
    store = tracking.client(main)
    place = tracking.experiment(store, main)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    tags = {"slmops.host": socket.gethostname(), "slmops.stage": "distill"}
    store.create_run(place, run_name="dead", tags={**tags, "slmops.pid": str(dead.pid)})
    store.create_run(place, run_name="alive", tags={**tags, "slmops.pid": str(os.getpid())})
    store.create_run(place, run_name="elsewhere", tags={**tags, "slmops.pid": str(dead.pid), "slmops.host": "other"})
    tracking.Tracker(main, "next", PARAMS, {"slmops.flow_run": "f2"}).close("FINISHED", {}, {}, ())
    assert {name: run.info.status for name, run in found(main).items()} == {
        "dead": "KILLED", "alive": "RUNNING", "elsewhere": "RUNNING", "next": "FINISHED",
    }  # fmt: skip


def test_a_server_that_does_not_answer_is_told_before_any_work() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StageError, match=rf"{where} does not answer .*start it, or unset MLFLOW_TRACKING_URI"):
            tracking.check_server(where)
    tracking.check_server("sqlite:///no/server/to/ask.db")


def test_a_server_that_dies_during_a_run_fails_the_stage_with_its_own_error(
    main: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = tracking.Tracker(main, "r", PARAMS, {"slmops.flow_run": "f1"})
    tracker.begin(STAGES["convert"], None)
    with pytest.raises(StageError, match=r"does not answer .* finished stages are kept"):
        tracker.end(STAGES["convert"], None, output(main), RAN)
    with pytest.raises(StageError, match="does not answer"):
        tracker.close("FAILED", {}, {}, ())

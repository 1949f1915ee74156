"""Runs whose worker, server, tracking server or database is killed or hangs: a true end, and nothing lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import (
    SLMOPS,
    answers,
    ask,
    commit,
    environment,
    free_ports,
    make_toy,
    prefect_server,
    slmops,
    started,
    wait_for,
)  # fmt: skip
from running import DEADLINE_S, Servers, Up, left, start, stop

from flows.servers import supervise
from flows.tracking import mlflow_store, spool
from flows.workspace import paths, worktrees

pytestmark = pytest.mark.slow
TRUE_WITHIN_S = 120.0
ONE = {"variants": ["q4_0"]}


def processes(up: Up, words: str) -> list[int]:
    """Ids of the processes of `up` whose command holds these words."""
    found = []
    for pid in left(up.root):
        try:
            if words in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def flow_runs(servers: Servers) -> set[str]:
    """States of the pipeline's runs."""
    ours = {"flows": {"name": {"any_": ["train-and-release", "slmops"]}}}
    return {run["state_type"] for run in ask(f"{servers.prefect}/flow_runs/filter", ours)}


def tracked(root: Path) -> list[Any]:
    """The MLflow runs, oldest first, read from the database of this checkout."""
    store = mlflow_store.client(root)
    return list(store.search_runs([mlflow_store.experiment(store, root)], order_by=["attributes.start_time ASC"]))


def statuses(root: Path, name: str) -> list[str]:
    return [run.info.status for run in tracked(root) if run.data.tags["mlflow.runName"] == name]


def curve(root: Path, name: str) -> list[tuple[int, float]]:
    (run,) = [each for each in tracked(root) if each.data.tags["mlflow.runName"] == name]
    history = mlflow_store.client(root).get_metric_history(run.info.run_id, "loss")
    return [(point.step, point.value) for point in history]


WHOLE = [(0, 1.0), (1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return auto(make_toy(tmp_path))


def auto(root: Path) -> Path:
    """Have the checkout's own commit say that the policy may release: no form may."""
    file = root / "params.yaml"
    file.write_text(file.read_text().replace("approval: manual", "approval: auto"))
    commit(root)
    return root


def begin(root: Path, seconds: float, *more: str, **extra: str) -> Up:
    """Servers whose runs are in `distill` for that long."""
    (root / "toy.wait").write_text(json.dumps({"distill-17": seconds}))
    return start(root, *more, TOY_LOG=str(root / "toy.log"), TOY_WAIT_FILE=str(root / "toy.wait"), **extra)


@pytest.fixture
def up(toy: Path) -> Iterator[Up]:
    running = begin(toy, 600)
    yield running
    stop(running)


def test_a_killed_run_ends_truly_within_two_minutes_and_a_retry_takes_it_up(up: Up) -> None:
    servers = Servers(up)
    run = servers.run("train-and-release", ONE)
    wait_for(lambda: "distill-17" in started(up.root))
    name = ask(f"{servers.prefect}/flow_runs/{run}")["name"]
    time.sleep(1)  # a first sign of life is on its way
    killed = time.monotonic()
    for pid in [*processes(up, "prefect worker start"), *processes(up, "prefect.engine")]:
        os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: flow_runs(servers) == {"CRASHED"} and statuses(up.root, name) == ["KILLED"], seconds=4 * TRUE_WITHIN_S
    )
    assert time.monotonic() - killed < TRUE_WITHIN_S
    assert "75 seconds" in ask(f"{servers.prefect}/flow_runs/{run}")["state"]["message"]
    assert statuses(up.root, "distill@17") == ["KILLED"]
    tasks = {each["name"]: each["state_type"] for each in ask(f"{servers.prefect}/task_runs/filter", {})}
    assert (tasks["finetune"], tasks["distill-17"], "RUNNING" in tasks.values()) == ("COMPLETED", "CRASHED", False)
    assert re.search("Prefect .*: distill-17", up.text())
    assert not processes(up, "-m tasks")
    assert [each.state for each in worktrees.runs(up.root)] == ["stopped"]
    assert f"MLflow was told what run {name} left" in up.text()

    (up.root / "toy.wait").write_text("{}")
    ask(f"{servers.prefect}/flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}})
    wait_for(lambda: ask(f"{servers.prefect}/flow_runs/{run}")["state_type"] == "COMPLETED")
    assert started(up.root).count("finetune") == 1
    assert statuses(up.root, name) == ["KILLED", "FINISHED"]


def test_a_run_goes_on_when_its_worker_and_its_servers_are_killed(toy: Path) -> None:
    up = begin(toy, 60)
    try:
        servers = Servers(up)
        run = servers.run("train-and-release", ONE)
        wait_for(lambda: "distill-17" in started(up.root))
        for words in ("prefect worker start", "flows.servers.prefect_server", "mlflow server"):
            for pid in processes(up, words):
                os.kill(pid, signal.SIGKILL)
        for name in ("prefect", "mlflow", "worker"):
            wait_for(lambda name=name: f"{name} is healthy again" in up.text())
        wait_for(lambda: ask(f"{servers.prefect}/flow_runs/{run}")["state_type"] == "COMPLETED")
        wait_for(lambda: {each.info.status for each in tracked(up.root)} == {"FINISHED"})
        assert curve(up.root, "distill@17") == WHOLE
        assert flow_runs(servers) == {"COMPLETED"}
        assert len(started(up.root)) == 11
    finally:
        stop(up)


def test_a_server_that_hangs_is_restarted(up: Up) -> None:
    (server,) = processes(up, "mlflow server")
    os.killpg(server, signal.SIGSTOP)
    wait_for(lambda: "mlflow is healthy again" in up.text(), up.text, 3 * supervise.SILENT * (supervise.PROBE_S + 5))
    assert f"mlflow gave no answer {supervise.SILENT} times in a row and was killed" in up.text()
    assert servers_answer(Servers(up))


def servers_answer(servers: Servers) -> bool:
    return "experiments" in ask(f"{servers.mlflow}/experiments/search?max_results=1")


def test_a_database_that_restarts_loses_no_run(toy: Path, database: tuple[str, Callable[[], None]]) -> None:
    url, restart = database
    up = begin(toy, 60, "--database", url)
    try:
        servers = Servers(up)
        run = servers.run("train-and-release", ONE)
        wait_for(lambda: "distill-17" in started(up.root))
        restart()
        wait_for(lambda: ask(f"{servers.prefect}/flow_runs/{run}")["state_type"] == "COMPLETED")
        assert flow_runs(servers) == {"COMPLETED"}
        experiment = ask(f"{servers.mlflow}/experiments/get-by-name?experiment_name=slmops")["experiment"]
        found = ask(f"{servers.mlflow}/runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
        assert len(found) == 10  # the run and its nine stages
        assert {each["info"]["status"] for each in found} == {"FINISHED"}
    finally:
        stop(up)


# --- a tracking server of one's own, which nobody restarts -------------------------------------------


def mlflow_server(root: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    where = ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--default-artifact-root", str(root / "mlruns")]
    log = (root / "mlflow.log").open("ab")
    process = subprocess.Popen(
        [*command, *where], env=environment(root), stdout=log, stderr=log, start_new_session=True
    )
    wait_for(lambda: answers(f"http://127.0.0.1:{port}/health") or process.poll() is not None)
    assert process.poll() is None
    return process


def kill(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_that_tells(root: Path, port: int, name: str, distill_s: float) -> "subprocess.Popen[str]":
    """A run that tells the tracking server at that port, and is in `distill` for that long."""
    env = environment(
        root, PREFECT_API_URL=prefect_server(), MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}",
        TOY_WAIT=json.dumps({"distill-17": distill_s}),
    )  # fmt: skip
    return subprocess.Popen([SLMOPS, "run", "--name", name], cwd=root, env=env, stderr=subprocess.PIPE, text=True)


def test_mlflow_away_during_a_run_is_told_and_gets_everything_once(toy: Path) -> None:
    port = free_ports()[0]
    server = mlflow_server(toy, port)
    with run_that_tells(toy, port, "away", 40) as run:
        try:
            wait_for(lambda: "distill-17" in started(toy))
            kill(server)
            wait_for(lambda: "convert" in started(toy) or run.poll() is not None)  # distill has ended without MLflow
            server = mlflow_server(toy, port)
            said = run.communicate(timeout=DEADLINE_S)[1]
        finally:
            kill(server)
    assert run.returncode == 0, said
    assert said.count(f"warning: the MLflow server at http://127.0.0.1:{port} does not answer") == 1
    assert said.count("MLflow answers again: delivered what had waited (") == 1
    assert {each.info.status for each in tracked(toy)} == {"FINISHED"}
    assert curve(toy, "distill@17") == WHOLE
    assert list(paths.spools(toy).iterdir()) == []


def test_mlflow_that_stays_away_stops_the_registration_and_is_told_by_the_next_run(toy: Path) -> None:
    port = free_ports()[0]
    server = mlflow_server(toy, port)
    with run_that_tells(toy, port, "gone", 20) as run:
        wait_for(lambda: "distill-17" in started(toy))
        kill(server)
        said = run.communicate(timeout=2 * DEADLINE_S)[1]
    assert run.returncode == 1
    assert re.match(f"error: .*http://127.0.0.1:{port} ", said.splitlines()[-1]), said
    assert str(paths.spools(toy)) in said
    assert len(spool.left(toy)) == 1

    again = slmops(toy, "run", "--name", "next", PREFECT_API_URL=prefect_server())
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("MLflow was told what run gone left") == 1
    assert "version 1 registered" in again.stdout
    assert (statuses(toy, "gone"), statuses(toy, "next")) == (["FAILED"], ["FINISHED"])
    assert len(started(toy)) == 14
    assert spool.left(toy) == []

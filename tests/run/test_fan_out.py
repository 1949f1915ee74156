"""The stages on Dask's workers: the same bytes as from threads, and a true end whatever is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkout import (
    SLMOPS,
    ask,
    digests,
    environment,
    make_toy,
    prefect_server,
    read,
    run_toy,
    runs,
    slmops,
    started,
    wait_for,
)
from running import DEADLINE_S, start, stop

from flows.servers import stack
from flows.tracking import mlflow_store

pytest.importorskip("prefect_dask", reason="prefect-dask is not installed: pip install 'slmops[dask]'")

DASK = ["--set", "machine.runner=dask"]
ALONE = {"OMP_NUM_THREADS": ""}  # not set: training takes all cores, and its bytes depend on how many those are
CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=int(sys.argv[1]), threads_per_worker=2, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    return make_toy(tmp_path / "toy")


def parent(pid: int) -> int:
    lines = read(Path(f"/proc/{pid}/status")).decode().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("PPid:")), 0)


def is_host(pid: int) -> bool:
    """Is it the process that has DVC loaded, or a call of it?"""
    return b"dvc_host.py" in read(Path(f"/proc/{pid}/cmdline"))


def stages(root: Path) -> set[int]:
    """Processes of a stage at this moment."""
    mark = f"SLMOPS_EVENTS={root}/".encode()
    found = (int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in read(entry / "environ"))
    return {pid for pid in found if not is_host(pid)}


def workers(root: Path) -> set[int]:
    """The processes that had a stage's dvc called at this moment."""
    at_work, found = stages(root), set()
    for pid in at_work:
        while pid > 1 and (pid in at_work or is_host(pid)):
            pid = parent(pid)
        found.add(pid)
    return {pid for pid in found if pid > 1 and read(Path(f"/proc/{pid}/cmdline"))}


def left_at_work(root: Path) -> list[int]:
    """What a killed worker left: calls of dvc, and stages."""
    every = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [*stages(root), *(pid for pid in every if is_host(pid) and is_host(parent(pid)))]


def during(root: Path, look: Callable[[subprocess.Popen[str]], bool], *arguments: str, **extra: str) -> tuple[int, str]:
    """A run on Dask, with `look` called again and again until it says yes; exit code and standard error."""
    env = environment(root, **{"PREFECT_API_URL": extra.get("PREFECT_API_URL") or prefect_server(), **extra})
    command = [SLMOPS, "run", *DASK, *arguments]
    with subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:  # fmt: skip
        wait_for(lambda: look(run) or run.poll() is not None)
        said = run.communicate(timeout=DEADLINE_S)[1]
    return run.returncode, said


def kill(root: Path, stage: str, number: int = signal.SIGKILL) -> Callable[[subprocess.Popen[str]], bool]:
    """End the Dask worker that works on a stage."""

    def look(run: subprocess.Popen[str]) -> bool:
        found = workers(root) if stage in started(root) else set()
        for pid in found:
            assert pid != run.pid
            os.kill(pid, number)
        return bool(found)

    return look


@pytest.mark.slow
def test_two_worker_processes_give_the_same_digests_as_threads(toy: Path, tmp_path: Path) -> None:
    on_dask = tmp_path / "dask"
    shutil.copytree(toy, on_dask)
    done = run_toy(toy, **ALONE)
    assert done.returncode == 0, done.stderr

    seen: set[int] = set()

    def look(run: subprocess.Popen[str]) -> bool:
        seen.update(workers(on_dask) - {run.pid})
        return False

    waits = json.dumps({f"quantize-{variant}": 2 for variant in ("q8_0", "q4_0")})
    code, said = during(on_dask, look, "--name", "one", TOY_WAIT=waits, **ALONE)
    assert code == 0, said
    assert len(seen) == 2
    assert digests(on_dask) == digests(toy)
    assert sorted(started(on_dask)) == sorted(started(toy))
    assert "quantize-q4_0        done" in said
    assert set(dict(runs(on_dask)).values()) == {"FINISHED"}
    store = mlflow_store.client(on_dask)
    (found,) = store.search_runs([mlflow_store.experiment(store, on_dask)], "tags.mlflow.runName = 'distill@17'")
    assert [point.value for point in store.get_metric_history(found.info.run_id, "loss")] == [1, 1 / 2, 1 / 3, 1 / 4]


def test_dask_without_a_prefect_server_is_refused(toy: Path) -> None:
    done = slmops(toy, "run", *DASK)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: machine.runner is dask")
    assert started(toy) == []


@pytest.mark.slow
def test_a_stage_that_fails_on_a_worker_fails_as_ours(toy: Path) -> None:
    done = run_toy(
        toy, *DASK, TOY_FAIL=json.dumps({"quantize-q4_0": ["ArtifactError", 9], "acquire": ["StageError", 1]})
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: quantize@q4_0: told to fail: do not tell it"
    assert "Traceback" not in done.stderr
    assert started(toy).count("acquire") == 2  # tried again, as it was the work that failed
    assert "validate-q8_0" in started(toy)
    assert not {"validate-q4_0", "package"} & set(started(toy))
    assert dict(runs(toy))["quantize@q4_0"] == "FAILED"


@pytest.mark.slow
def test_the_work_of_a_killed_worker_is_done_by_another(toy: Path) -> None:
    code, said = during(toy, kill(toy, "distill-17"), "--name", "one", TOY_WAIT=json.dumps({"distill-17": 10}))
    assert code == 0, said
    assert set(dict(runs(toy)).values()) == {"FINISHED"}
    assert started(toy)[-1] == "package"


@pytest.mark.slow
def test_where_every_worker_is_killed_the_run_fails_truly(toy: Path) -> None:
    up = start(toy)
    try:
        api = f"{stack.running(toy).prefect}/api"
        where = {"PREFECT_API_URL": api, "PREFECT_HOME": str(toy / "prefect"), "MLFLOW_TRACKING_URI": ""}
        arguments = ["--name", "one", "--set", "machine.retries=0"]
        code, said = during(toy, kill(toy, "distill-17"), *arguments, TOY_WAIT=json.dumps({"distill-17": 10}), **where)
        assert code == 1
        assert re.match("error: distill-17: .*Dask worker", said.splitlines()[-1])
        states = {run["name"]: run["state_type"] for run in ask(f"{api}/task_runs/filter", {})}
        assert states == {
            **dict.fromkeys(("acquire", "finetune", "teach", "prune"), "COMPLETED"),
            "distill-17": "CRASHED",
        }
    finally:
        stop(up)
    assert dict(runs(toy)) == {
        "one": "FAILED",
        **dict.fromkeys(("acquire", "finetune", "teach", "prune"), "FINISHED"),
        "distill@17": "FAILED",
    }
    wait_for(lambda: not left_at_work(toy))
    again = run_toy(toy, "--set", "machine.runner=threads")
    assert again.returncode == 0, again.stderr
    assert started(toy).count("finetune") == 1


@contextmanager
def cluster(root: Path, count: int, **extra: str) -> Iterator[str]:
    """The address of a cluster that was there before the run and stays, with so many worker processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(count)], cwd=root, env=environment(root, **extra),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(DEADLINE_S)


@pytest.mark.slow
def test_students_of_two_seeds_train_at_once_on_two_workers_and_one_after_another_here(
    toy: Path, tmp_path: Path
) -> None:
    on_dask = tmp_path / "dask"
    shutil.copytree(toy, on_dask)
    seeds = ["--set", "select.seeds=[1, 2]"]
    waits = {"TOY_WAIT": json.dumps({"distill-1": 4, "distill-2": 4}), **ALONE}
    done = run_toy(toy, *seeds, **waits)
    assert done.returncode == 0, done.stderr
    most: list[int] = []

    def look(run: subprocess.Popen[str]) -> bool:
        most.append(len(workers(on_dask) - {run.pid}) if "convert" not in started(on_dask) else 0)
        return False

    with cluster(on_dask, 2, **waits) as address:
        code, said = during(on_dask, look, *seeds, DASK_SCHEDULER_ADDRESS=address, **ALONE)
    assert code == 0, said
    assert max(most) == 2
    assert digests(on_dask) == digests(toy)  # the number of threads among them, on which real training's bytes depend
    assert {"distill/1/history.json", "distill/2/history.json", "select/history.json"} <= digests(toy).keys()
    ends = {name: run for name, run in spans(toy).items() if name.startswith("distill")}
    first, second = sorted(ends.values())
    assert first[1] <= second[0]


def spans(root: Path) -> dict[str, tuple[int, int]]:
    """When each stage began and ended, as MLflow has it."""
    store = mlflow_store.client(root)
    found = store.search_runs([mlflow_store.experiment(store, root)])
    return {run.data.tags["mlflow.runName"]: (run.info.start_time, run.info.end_time) for run in found}


@pytest.mark.slow
def test_a_run_that_is_stopped_stops_its_stage_on_a_cluster_that_stays(toy: Path) -> None:
    def look(run: subprocess.Popen[str]) -> bool:
        if "distill-17" in started(toy):
            run.send_signal(signal.SIGTERM)
        return "distill-17" in started(toy)

    with cluster(toy, 1, TOY_WAIT=json.dumps({"distill-17": 8})) as address:
        code, said = during(toy, look, "--name", "stopped", DASK_SCHEDULER_ADDRESS=address)
        assert code == 143, said
        assert workers(toy) == set()
        assert dict(runs(toy)) == {
            "stopped": "KILLED", **dict.fromkeys(("acquire", "finetune", "teach", "prune"), "FINISHED"),
            "distill@17": "KILLED",
        }  # fmt: skip
        code, said = during(toy, lambda run: False, DASK_SCHEDULER_ADDRESS=address)
        assert code == 0, said
    assert started(toy).count("finetune") == 1

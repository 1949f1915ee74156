"""Servers that run: `slmops up` on a toy checkout, and what a stranger asks them over HTTP."""

import base64
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import ASK_S, ROOT, SLMOPS, ask, environment, free_ports, slmops, wait_for

from flows.servers import stack, supervise

DEADLINE_S = 300


@dataclass(frozen=True)
class Up:
    """A running `slmops up`."""

    root: Path
    process: subprocess.Popen[str]
    output: Path

    def text(self) -> str:
        return self.output.read_text()


def own(root: Path, **extra: str) -> dict[str, str]:
    """An environment with this checkout's code and a Prefect home that no other server uses."""
    path = os.pathsep.join((str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")))
    return environment(root, **{"PREFECT_HOME": str(root / "prefect"), "PYTHONPATH": path, **extra})


def options(*more: str) -> list[str]:
    prefect, mlflow = free_ports()
    return [str(SLMOPS), "up", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow), *more]


def start(root: Path, *more: str, **extra: str) -> Up:
    """Start `up` and wait until all is healthy."""
    output = root / "up.txt"
    with output.open("w") as out:
        process = subprocess.Popen(
            options(*more), cwd=root, env=own(root, **extra), stdout=out, stderr=subprocess.STDOUT, text=True
        )
    up = Up(root, process, output)
    try:
        wait_for(lambda: "all healthy" in up.text() or process.poll() is not None, up.text)
        assert process.poll() is None, up.text()
    except BaseException:
        stop(up)
        raise
    return up


def stop(up: Up) -> None:
    if up.process.poll() is None:
        up.process.send_signal(signal.SIGTERM)
        up.process.wait(DEADLINE_S)


def left(root: Path) -> list[int]:
    return supervise.marked(f"{stack.MARK}={root}")


def code_of(url: str, credentials: str | None = None, body: dict | None = None) -> int:
    """Of the answer to a GET, or to a POST of `body`."""
    request = urllib.request.Request(
        url, json.dumps(body).encode() if body is not None else None, {"Content-Type": "application/json"}
    )
    if credentials:
        request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


class Servers:
    """A toy checkout with its servers running."""

    def __init__(self, up: Up) -> None:
        self.root = up.root
        state = json.loads((up.root / ".runs/servers.json").read_text())
        self.prefect, self.mlflow = f"{state['prefect']}/api", f"{state['mlflow']}/api/2.0/mlflow"

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = ask(f"{self.prefect}/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return dict(found)

    def run(self, deployment: str, parameters: dict[str, Any], **more: str) -> str:
        where = f"{self.prefect}/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return str(ask(where, {"parameters": parameters, "state": {"type": "SCHEDULED"}, **more})["id"])

    def wait(self, run: str, *states: str) -> dict[str, Any]:
        def there() -> Any:
            found = ask(f"{self.prefect}/flow_runs/{run}")
            ended = found["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            assert found["state_name"] in states or not ended, found["state"]
            return found["state_name"] in states and found

        found = dict(wait_for(there, f"run {run} to be {' or '.join(states)}", ASK_S))
        if found["state_name"] == "Suspended":  # a moment before the form is there
            wait_for(lambda: self.question(run), f"the form of run {run}", ASK_S)
        return found

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """Oldest first."""
        body = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(ask(f"{self.prefect}/flow_runs/filter", body))

    def artifact(self, run: str, key: str) -> str:
        body = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": [key]}}}
        (found,) = ask(f"{self.prefect}/artifacts/filter", body)
        return str(found["data"])

    def question(self, run: str) -> str:
        """What the approval form of a suspended run says; "" where it is not suspended."""
        details = ask(f"{self.prefect}/flow_runs/{run}")["state"]["state_details"]
        keys = details.get("run_input_keyset")
        try:
            return str(ask(f"{self.prefect}/flow_runs/{run}/input/{keys['description']}")) if keys else ""
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return ""

    def log(self, run: str, words: str) -> str:
        """A run's log as soon as it holds these words."""
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"}

        def there() -> str:
            text = "\n".join(each["message"] for each in ask(f"{self.prefect}/logs/filter", body))
            return text if words in text else ""

        return str(wait_for(there, f"the log of run {run} to hold {words!r}"))

    def history(self) -> str:
        env = {name: value for name, value in own(self.root).items() if name.startswith("P")}
        return slmops(self.root, "history", **env).stdout

    def apply(self) -> None:
        done = slmops(self.root, "deploy", **own(self.root))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("deployments: train-and-release, retrain-scheduled, ")

    def tracked(self, name: str) -> list[dict[str, Any]]:
        """The MLflow runs of a worktree run."""
        place = ask(f"{self.mlflow}/experiments/get-by-name?experiment_name=slmops")["experiment"]["experiment_id"]
        body = {"experiment_ids": [place], "filter": f"tags.`slmops.workspace` = '{self.root}/.runs/{name}'"}
        found = ask(f"{self.mlflow}/runs/search", body)["runs"]
        for run in found:
            for part in ("tags", "metrics"):
                run["data"][part] = {each["key"]: each["value"] for each in run["data"].get(part, [])}
        return list(found)

    def decide(self, run: str, **answer: str | bool) -> None:
        told = ask(f"{self.prefect}/flow_runs/{run}/resume", {"run_input": answer})
        assert told["status"] == "ACCEPT", told

    def aliases(self) -> dict[str, str]:
        name = urllib.parse.quote("home-commands")
        found = ask(f"{self.mlflow}/registered-models/get?name={name}")["registered_model"].get("aliases", [])
        return {each["alias"]: each["version"] for each in found}

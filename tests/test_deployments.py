"""Deployed runs, driven as a stranger would: plain HTTP to Prefect and MLflow, none of our code on the way in."""

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from checkout import ROOT, commit, git, make_toy, slmops, started
from test_servers import DEADLINE_S, Up, own, start, stop

from tasks.stages import STAGES

pytestmark = pytest.mark.slow


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The answer to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Servers:
    """A toy checkout with its servers running."""

    def __init__(self, up: Up) -> None:
        self.root = up.root
        state = json.loads((up.root / ".runs/servers.json").read_text())
        self.prefect, self.mlflow = f"{state['prefect']}/api", f"{state['mlflow']}/api/2.0/mlflow"

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = ask(f"{self.prefect}/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return dict(found)

    def run(self, name: str, parameters: dict[str, Any]) -> str:
        where = f"{self.prefect}/deployments/{self.deployment(name)['id']}/create_flow_run"
        return str(ask(where, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"])

    def wait(self, run: str, *states: str) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            found: dict[str, Any] = ask(f"{self.prefect}/flow_runs/{run}")
            if found["state_name"] in states:
                return found
            assert found["state_type"] not in ("FAILED", "CRASHED", "CANCELLED"), found["state"]
            assert time.monotonic() < deadline, found["state"]
            time.sleep(0.5)

    def decide(self, run: str, **answer: str) -> None:
        ask(f"{self.prefect}/flow_runs/{run}/resume", {"run_input": answer})

    def aliases(self) -> dict[str, str]:
        name = urllib.parse.quote("home-commands")
        found = ask(f"{self.mlflow}/registered-models/get?name={name}")["registered_model"].get("aliases", [])
        return {each["alias"]: each["version"] for each in found}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    root = make_toy(tmp_path_factory.mktemp("deployed"))
    assert (root / "infra/prefect.yaml").is_file()
    up = start(root, TOY_LOG=str(root / "toy.log"))
    yield Servers(up)
    stop(up)


def test_the_form_asks_for_typed_parameters(servers: Servers) -> None:
    deployment = servers.deployment("train-and-release")
    form = deployment["parameter_openapi_schema"]
    assert {"model", "data", "variants", "gates", "approval", "settings", "commit"} == set(form["properties"])
    assert "HubModel" in form["definitions"]
    assert form["definitions"]["HubModel"]["properties"]["revision"]["pattern"] == "^[0-9a-f]{40}$"
    assert "q4_k_m" in json.dumps(form["properties"]["variants"])
    named = {each["name"] for each in yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]}
    assert named <= {each["name"] for each in ask(f"{servers.prefect}/deployments/filter", {})}


def test_a_run_is_started_and_approved_over_http(servers: Servers) -> None:
    run = servers.run("train-and-release", {"variants": ["q4_0", "q8_0"], "settings": {"distill.epochs": 2.0}})
    waiting = servers.wait(run, "Suspended")
    assert len(started(servers.root)) == sum(2 if stage.per_variant else 1 for stage in STAGES.values())
    assert servers.aliases() == {"candidate": "1"}
    name = waiting["name"]
    effective = yaml.safe_load(git(servers.root, "show", f"runs/{name}:params.yaml"))
    assert effective["quantize"]["variants"] == ["q4_0", "q8_0"]
    assert effective["distill"]["epochs"] == 2.0

    servers.decide(run, decision="approve", name="Ada", reason="passed all gates")
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1"}
    assert len(started(servers.root)) == 9  # the flow began anew, the stages did not
    told = slmops(servers.root, "history", **{k: v for k, v in own(servers.root).items() if k.startswith("P")})
    assert "approve" in told.stdout
    assert "by Ada: passed all gates" in told.stdout


def test_a_wrong_parameter_is_told_as_ours(servers: Servers) -> None:
    run = servers.run("train-and-release", {"settings": {"distill.epoch": 2.0}})
    found = servers.wait(run, "Failed")
    assert "distill.epoch: unknown key: did you mean 'epochs'?" in found["state"]["message"]


def test_a_rejected_version_is_no_candidate(servers: Servers) -> None:
    package = servers.root / "tasks" / "package" / "__init__.py"
    package.write_text(package.read_text().replace("toys pass", "other toys pass"))
    commit(servers.root)
    run = servers.run("train-and-release", {"variants": ["q4_0", "q8_0"]})
    servers.wait(run, "Suspended")
    assert servers.aliases() == {"champion": "1", "candidate": "2"}
    servers.decide(run, decision="reject", name="Ada", reason="rude answers")
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1"}

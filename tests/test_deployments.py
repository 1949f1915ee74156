"""Deployed runs, driven as a stranger would: plain HTTP to Prefect and MLflow, none of our code on the way in."""

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT, git, make_toy, slmops, started
from test_servers import Up, own, start, stop

from flows import servers as up_servers
from flows import workspace
from tasks.stages import STAGES

DEADLINE_S = 1200  # where other work has all the cores
TOYS = {"variants": ["q4_0", "q8_0"]}

pytestmark = pytest.mark.slow


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The answer to a GET, or to a POST of `body`. 503: the server's database is busy, so ask again, as clients do."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


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
            assert found["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), found["state"]
            assert time.monotonic() < deadline, found["state"]
            time.sleep(0.5)

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """Oldest first."""
        body = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(ask(f"{self.prefect}/flow_runs/filter", body))

    def artifact(self, run: str, key: str) -> str:
        body = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": [key]}}}
        (found,) = ask(f"{self.prefect}/artifacts/filter", body)
        return str(found["data"])

    def history(self) -> str:
        env = {name: value for name, value in own(self.root).items() if name.startswith("P")}
        return slmops(self.root, "history", **env).stdout

    def apply(self) -> None:
        """What `up` does with infra/prefect.yaml."""
        env = {**own(self.root), "PREFECT_API_URL": self.prefect}
        up_servers.apply_deployments(self.root, env)

    def decide(self, run: str, **answer: str | bool) -> None:
        ask(f"{self.prefect}/flow_runs/{run}/resume", {"run_input": answer})

    def aliases(self) -> dict[str, str]:
        name = urllib.parse.quote("home-commands")
        found = ask(f"{self.mlflow}/registered-models/get?name={name}")["registered_model"].get("aliases", [])
        return {each["alias"]: each["version"] for each in found}


def until(happened: Callable[[], Any], told: Callable[[], object]) -> Any:
    """What `happened` gives as soon as that is something."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := happened()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)
    return found


def change_bundle(root: Path, word: str) -> None:
    """Have the next run make a bundle that was not registered before."""
    package = root / "tasks" / "package" / "__init__.py"
    package.write_text(package.read_text().replace("toys pass", f"{word} toys pass"))
    commit(root)


def commit(root: Path) -> None:
    """What a run reads; the servers' own files beside it come and go."""
    git(root, "commit", "-q", "-m", "state", "--", "tasks", "infra", "data")


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
    assert {"model", "data", "variants", "gates", "approval", "settings", "commit", "overlap"} == set(
        form["properties"]
    )
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
    key = waiting["state"]["state_details"]["run_input_keyset"]["description"]
    question = ask(f"{servers.prefect}/flow_runs/{run}/input/{key}")
    assert "Release **home-commands version 1**" in question
    assert "|  | version 1 |" in question
    name = waiting["name"]
    effective = yaml.safe_load(git(servers.root, "show", f"runs/{name}:params.yaml"))
    assert effective["quantize"]["variants"] == ["q4_0", "q8_0"]
    assert effective["distill"]["epochs"] == 2.0

    servers.decide(run, decision="approve", name="Ada", reason="passed all gates")
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1"}
    assert len(started(servers.root)) == 9  # the flow began anew, the stages did not
    assert "approve   version 1    by Ada: passed all gates" in servers.history()
    saved = servers.artifact(run, "saved")
    assert f"on branch runs/{name}" in saved
    assert "not pushed: no default DVC remote" in saved


def test_a_wrong_parameter_is_told_as_ours(servers: Servers) -> None:
    run = servers.run("train-and-release", {"settings": {"distill.epoch": 2.0}})
    found = servers.wait(run, "Failed")
    assert "distill.epoch: unknown key: did you mean 'epochs'?" in found["state"]["message"]


def test_a_rejected_version_is_no_candidate(servers: Servers) -> None:
    change_bundle(servers.root, "other")
    run = servers.run("train-and-release", TOYS)
    servers.wait(run, "Suspended")
    assert servers.aliases() == {"champion": "1", "candidate": "2"}
    servers.decide(run, decision="reject", name="Ada", reason="rude answers")
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1"}


def test_a_rejected_version_is_released_only_by_who_says_so_and_rolled_back(servers: Servers) -> None:
    run = servers.run("train-and-release", TOYS)
    servers.wait(run, "Suspended")
    servers.decide(run, decision="approve", name="Ada", reason="not so rude after all")
    failed = servers.wait(run, "Failed")
    assert "version 2 was rejected by Ada (rude answers)" in failed["state"]["message"]
    run = servers.run("train-and-release", TOYS)
    servers.wait(run, "Suspended")
    servers.decide(run, decision="approve", name="Ada", reason="not so rude after all", even_if_rejected=True)
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "2", "previous": "1"}

    run = servers.run("rollback", {"model": "home-commands", "by": "Ada", "reason": "too rude"})
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1", "previous": "2"}
    assert "rollback  version 1    by Ada: too rude" in servers.history()


def test_validation_alone_trains_nothing(servers: Servers) -> None:
    made = servers.runs("train-and-release")[0]["name"]
    before = started(servers.root)
    gates = [{"name": "accuracy", "at_least": 0.5}]
    run = servers.run("validate-only", {"run": made, "variants": ["q4_0"], "gates": gates})
    name = servers.wait(run, "Completed")["name"]
    assert started(servers.root)[len(before) :] == ["validate-q4_0"]
    assert "| q4_0 | pass | 0.900 |" in servers.artifact(run, "result")
    assert yaml.safe_load(git(servers.root, "show", f"runs/{name}:params.yaml"))["validate"]["gates"] == gates
    for parameters, told in (
        ({"run": made, "variants": ["q5_1"]}, "quantize@q5_1: not made yet; what was: acquire"),
        ({"run": "nobody"}, f"there is no finished run nobody: name one of .*{made}"),
    ):
        failed = servers.wait(servers.run("validate-only", parameters), "Failed")
        assert re.search(told, failed["state"]["message"]), failed["state"]["message"]
    assert len(started(servers.root)) == len(before) + 1


def test_one_run_at_a_time_works_on_a_model(servers: Servers) -> None:
    other = {**TOYS, "settings": {"package.name": "other"}}
    with workspace.one_at_a_time(servers.root, "home-commands", "by-hand", wait=False, tell=print):
        waits = servers.run("train-and-release", TOYS)
        refused = servers.run("train-and-release", {**TOYS, "overlap": "refuse"})
        failed = servers.wait(refused, "Failed")
        assert "run by-hand works on home-commands: wait for it" in failed["state"]["message"]
        skipped = servers.wait(servers.run("retrain-scheduled", {}), "Skipped")
        assert "run by-hand works on home-commands" in skipped["state"]["message"]
        servers.wait(servers.run("train-and-release", other), "Suspended")
        assert servers.wait(waits, "Running")
        assert not (servers.root / ".runs" / failed["name"]).exists()
        done = slmops(servers.root, "run", "--worktree", "--name", "terminal", **own(servers.root))
        assert "error: run by-hand works on home-commands" in done.stderr
    servers.wait(waits, "Suspended")


def test_a_question_that_nobody_answers_is_recorded_as_rejected(servers: Servers) -> None:
    change_bundle(servers.root, "late")
    seconds = {**TOYS, "settings": {"release.expires_hours": 0.002}}
    run = servers.run("train-and-release", seconds)
    name = servers.wait(run, "Suspended", "Failed")["name"]
    servers.wait(run, "Failed")  # Prefect's own doing
    record = servers.root / "registry" / "history.jsonl"  # written without any command of ours
    until(lambda: '"reason":"nobody decided within 0.002 hours"' in record.read_text(), record.read_text)
    assert re.search(r"reject    version \d    by policy: nobody decided within 0.002 hours", servers.history())
    until(lambda: "candidate" not in servers.aliases(), servers.aliases)
    until(lambda: f"{name} finished" in " ".join(slmops(servers.root, "runs").stdout.split()), servers.history)


def test_a_schedule_fires_skips_runs_and_is_removed(servers: Servers) -> None:
    file = servers.root / "infra/prefect.yaml"
    shipped = file.read_text()
    assert [each["active"] for each in servers.deployment("retrain-scheduled")["schedules"]] == [False]
    name = servers.wait(servers.run("train-and-release", TOYS), "Suspended")["name"]
    before = started(servers.root)
    raw = yaml.safe_load(shipped)
    (retrain,) = (each for each in raw["deployments"] if each["name"] == "retrain-scheduled")
    retrain["parameters"] = {"settings": {"quantize.variants": TOYS["variants"]}}
    retrain["schedules"] = [{"interval": 20}]
    file.write_text(yaml.safe_dump(raw))
    commit(servers.root)
    (servers.root / "data" / "rows" / "train.jsonl").write_text("{}\n{}\n")
    servers.apply()

    def ended(*states: str) -> list[dict[str, Any]]:
        return [
            each
            for each in servers.runs("retrain-scheduled")
            if each["state_name"] in states and each["auto_scheduled"]
        ]

    (skipped, *_) = until(lambda: ended("Skipped"), lambda: servers.runs("retrain-scheduled"))
    told = servers.artifact(skipped["id"], "skipped")
    assert f"are those of run {name}; not in that commit, so not looked at: data/rows/train.jsonl" in told
    assert skipped["state"]["message"] in told
    assert not (servers.root / ".runs" / skipped["name"]).exists()
    assert not git(servers.root, "branch", "--list", f"runs/{skipped['name']}")
    assert started(servers.root)[len(before) :] == []

    commit(servers.root)
    (ran, *_) = until(lambda: ended("Suspended"), lambda: servers.runs("retrain-scheduled"))
    assert started(servers.root)[len(before)] == "acquire"
    assert git(servers.root, "show", f"runs/{ran['name']}:data/rows/train.jsonl") == "{}\n{}"

    retrain["schedules"] = []
    file.write_text(yaml.safe_dump(raw))
    servers.apply()
    assert servers.deployment("retrain-scheduled")["schedules"] == []
    until(lambda: not ended("Scheduled"), lambda: servers.runs("retrain-scheduled"))

"""Deployed runs, driven as a stranger would: plain HTTP to Prefect and MLflow, none of our code on the way in."""

import functools
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from checkout import ASK_S, ROOT, ask, git, make_toy, slmops, started, wait_for
from running import Servers, own, start, stop

from flows.workspace import locks, worktrees
from tasks.stages import STAGES

TOYS = {"variants": ["q4_0", "q8_0"]}
WORKERS = 2  # runs at a time

pytestmark = pytest.mark.slow


until = functools.partial(wait_for, seconds=ASK_S)


def change_bundle(root: Path, word: str) -> None:
    """Have the next run make a bundle that was not registered before."""
    package = root / "tasks" / "package" / "stage.py"
    package.write_text(package.read_text().replace("toys pass", f"{word} toys pass"))
    commit(root)


def commit(root: Path) -> None:
    """What a run reads; the servers' own files beside it come and go."""
    git(root, "commit", "-q", "-m", "state", "--", "tasks", "infra", "data")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    root = make_toy(tmp_path_factory.mktemp("deployed"))
    assert (root / "infra/prefect.yaml").is_file()
    store = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {root.parent / 'store'}\n"
    (root / ".dvc" / "config.local").write_text(store)
    up = start(root, "--runs", str(WORKERS), TOY_LOG=str(root / "toy.log"))
    yield Servers(up)
    stop(up)
    assert "is started again" not in up.text()


def test_the_form_asks_for_typed_parameters(servers: Servers) -> None:
    deployment = servers.deployment("train-and-release")
    form = deployment["parameter_openapi_schema"]
    assert {"model", "data", "variants", "gates", "budget", "approval", "by", "settings", "commit", "overlap"} == set(
        form["properties"]
    )
    assert "HubModel" in form["definitions"]
    assert form["definitions"]["HubModel"]["properties"]["revision"]["pattern"] == "^[0-9a-f]{40}$"
    assert "q4_k_m" in json.dumps(form["properties"]["variants"])
    named = {each["name"] for each in yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]}
    assert named <= {each["name"] for each in ask(f"{servers.prefect}/deployments/filter", {})}


def test_a_run_is_started_and_approved_over_http(servers: Servers) -> None:
    chosen = {**TOYS, "budget": {"distill_epochs": 2.0}, "settings": {"distill.learning_rate": 7e-05}}
    run = servers.run("train-and-release", chosen)
    waiting = servers.wait(run, "Suspended")
    assert len(started(servers.root)) == sum(2 if "variant" in stage.per else 1 for stage in STAGES.values())
    assert servers.aliases() == {"candidate": "1"}
    question = servers.question(run)
    assert question.startswith("toys pass\n\nRelease **home-commands version 1**")
    assert "|  | version 1 |" in question
    assert "| q4_0 | pass | 90.0 % |" in question
    name = waiting["name"]
    effective = yaml.safe_load(git(servers.root, "show", f"runs/{name}:params.yaml"))
    assert effective["quantize"]["variants"] == ["q4_0", "q8_0"]
    assert effective["distill"]["epochs"] == 2.0
    assert effective["distill"]["learning_rate"] == 7e-05

    servers.decide(run, decision="approve", name="Ada", reason="passed all gates")
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1"}
    assert len(started(servers.root)) == 14  # the flow began anew, the stages did not
    assert "approve   version 1    by Ada: passed all gates" in servers.history()
    saved = servers.artifact(run, "saved")
    assert f"on branch runs/{name}" in saved
    assert "pushed to the DVC remote store: " in saved
    assert len([file for file in (servers.root.parent / "store").rglob("*") if file.is_file()]) > len(STAGES)
    version = ask(f"{servers.mlflow}/model-versions/get?name=home-commands&version=1")["model_version"]
    assert {"key": "git_branch", "value": f"runs/{name}"} in version["tags"]
    (parent,) = (each for each in servers.tracked(name) if each["data"]["tags"]["slmops.stage"] == "run")
    assert parent["data"]["tags"]["slmops.root_flow_run"] == run

    again = servers.wait(servers.run("train-and-release", chosen), "Completed")  # there is nothing to decide
    servers.log(again["id"], "home-commands version 1 was registered before")
    assert "reject" not in servers.history()


def test_a_wrong_parameter_is_told_as_ours(servers: Servers) -> None:
    for parameters, told in (
        ({"settings": {"distill.epoch": 2.0}}, "distill.epoch: "),
        ({"budget": {"hours": 1}}, "budget: unknown key"),
        (
            {"settings": {"acquire.watch": "/etc", "acquire.data.path": "/etc/passwd"}},
            "acquire.watch: /etc ",
        ),
    ):
        found = servers.wait(servers.run("train-and-release", parameters), "Failed")
        assert told in found["state"]["message"]
        log = servers.log(found["id"], told)
        assert "Traceback" not in log


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
    first = servers.question(run)
    servers.decide(run, decision="approve", name="Ada", reason="not so rude after all")
    until(lambda: servers.question(run) not in ("", first), lambda: servers.question(run))
    assert re.search(r"\*\*Not done: home-commands version 2 .*Ada \(rude answers\)", servers.question(run))
    assert servers.aliases() == {"champion": "1"}
    servers.decide(run, decision="approve", name="Ada", reason="not so rude after all", even_if_rejected=True)
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "2", "previous": "1"}

    run = servers.run("rollback", {"model": "home-commands", "by": "Ada", "reason": "too rude"})
    servers.wait(run, "Completed")
    assert servers.aliases() == {"champion": "1", "previous": "2"}
    assert "rollback  version 1    by Ada: too rude" in servers.history()


def test_who_starts_a_run_may_not_approve_it_and_the_form_asks_again(servers: Servers) -> None:
    change_bundle(servers.root, "third")
    apart = {**TOYS, "settings": {"release.separate_duties": True}}
    failed = servers.wait(servers.run("train-and-release", apart), "Failed")
    assert "release.separate_duties" in failed["state"]["message"]
    # Under the name of a run that has finished: it is another all the same.
    finished = worktrees.finished(servers.root)[0]
    run = servers.run("train-and-release", {**apart, "by": "Ada"}, name=finished)
    servers.wait(run, "Suspended")
    first = servers.question(run)
    servers.decide(run, decision="approve", name="ada", reason="mine")
    until(lambda: servers.question(run) not in ("", first), lambda: servers.question(run))
    assert re.search(r"\*\*Not done: ada .*home-commands version 3", servers.question(run))

    # The run is lost while it waits: it asks once more.
    second = servers.question(run)
    lost = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
    ask(f"{servers.prefect}/flow_runs/{run}/set_state", lost)
    until(lambda: servers.question(run) not in ("", second), lambda: servers.question(run))
    servers.wait(run, "Suspended")

    # A decision by command ends the run too.
    decision = ("--model", "home-commands", "--by", "Eve", "--reason", "rude again")
    done = slmops(servers.root, "reject", "3", *decision, **own(servers.root))
    place = f"{finished}-{run[:8]}"
    assert done.stdout == f"home-commands version 3 is rejected\ntold run {place}, which waited for it\n", done.stderr
    servers.wait(run, "Completed")
    assert servers.history().count("rude again") == 1
    assert servers.aliases() == {"champion": "1", "previous": "2"}
    assert f"{place} finished" in " ".join(slmops(servers.root, "runs").stdout.split())


def test_validation_alone_trains_nothing(servers: Servers) -> None:
    made = servers.runs("train-and-release")[0]["name"]
    before = started(servers.root)
    gates = [{"name": "accuracy", "at_least": 0.5}]
    run = servers.run("validate-only", {"run": made, "variants": ["q4_0"], "gates": gates})
    name = servers.wait(run, "Completed")["name"]
    assert started(servers.root)[len(before) :] == ["judge-q4_0-desktop"]  # what was measured is in the cache
    assert "| q4_0 | pass | 90.0 % |" in servers.artifact(run, "result")
    assert yaml.safe_load(git(servers.root, "show", f"runs/{name}:params.yaml"))["validate"]["gates"] == gates
    tracked = {each["data"]["tags"]["mlflow.runName"]: each for each in servers.tracked(name)}
    assert {run: each["info"]["status"] for run, each in tracked.items()} == {
        name: "FINISHED",
        "validate@q4_0": "FINISHED",
        "measure@q4_0-desktop": "FINISHED",
        "judge@q4_0-desktop": "FINISHED",
    }
    assert tracked["validate@q4_0"]["data"]["metrics"]["accuracy"] == 0.9
    for parameters, told in (
        ({"run": made, "variants": ["q5_1"]}, "quantize@q5_1: .*acquire"),
        ({"run": "nobody"}, f"run nobody: .*{made}"),
    ):
        failed = servers.wait(servers.run("validate-only", parameters), "Failed")
        assert re.search(told, failed["state"]["message"]), failed["state"]["message"]
    assert len(started(servers.root)) == len(before) + 1


def test_one_run_at_a_time_works_on_a_model(servers: Servers) -> None:
    other = {**TOYS, "settings": {"package.name": "other"}}
    with locks.one_at_a_time(servers.root, "home-commands", "by-hand"):
        waiting = [servers.run("train-and-release", TOYS) for _ in range(WORKERS)]
        for run in waiting:
            waits = servers.wait(run, "Waiting")
            assert waits["state"]["message"].startswith("run by-hand works on home-commands")
        # None of them has a place at the worker, which others need.
        servers.wait(servers.run("rollback", {"model": "home-commands", "by": "Ada", "reason": "back"}), "Completed")
        refused = servers.run("train-and-release", {**TOYS, "overlap": "refuse"})
        failed = servers.wait(refused, "Failed")
        assert "run by-hand works on home-commands" in failed["state"]["message"]
        skipped = servers.wait(servers.run("retrain-scheduled", {}), "Skipped")
        assert "run by-hand works on home-commands" in skipped["state"]["message"]
        servers.wait(servers.run("train-and-release", other), "Suspended")
        assert not (servers.root / ".runs" / failed["name"]).exists()
        done = slmops(servers.root, "run", "--worktree", "--name", "terminal", **own(servers.root))
        assert "error: run by-hand works on home-commands" in done.stderr
    for run in waiting:
        servers.wait(run, "Suspended")


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
    assert re.search(rf"run {name}; .*: data/rows/train\.jsonl", told)
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


def test_drift_that_is_told_starts_a_retraining(servers: Servers) -> None:
    before = len(servers.runs("retrain-scheduled"))
    drift = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "slmops.drift",
        "resource": {"prefect.resource.id": "slmops.model.home-commands"},
    }
    ask(f"{servers.prefect}/events", [drift])
    run = until(lambda: servers.runs("retrain-scheduled")[before:], "a run")[0]
    found = servers.wait(run["id"], "Skipped", "Suspended")
    assert found["created_by"]["type"] == "AUTOMATION"


def test_a_run_that_its_worker_never_began_is_told(servers: Servers) -> None:
    file = servers.root / "infra/automations.yaml"
    raw = yaml.safe_load(file.read_text())
    (stuck,) = (each for each in raw["automations"] if each["name"] == "stuck-runs")
    stuck["trigger"]["within"] = 20
    file.write_text(yaml.safe_dump(raw))
    servers.apply()
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    where = f"{servers.prefect}/deployments/{servers.deployment('rollback')['id']}/create_flow_run"
    scheduled = {"type": "SCHEDULED", "state_details": {"scheduled_time": tomorrow}}
    run = ask(where, {"parameters": {"model": "m", "by": "Ada", "reason": "r"}, "state": scheduled})["id"]
    ask(f"{servers.prefect}/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}, "force": True})
    crashed = servers.wait(run, "Crashed")
    assert "did not begin" in crashed["state"]["message"]

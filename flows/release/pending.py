"""Questions of whether to release a version: each a file in the worktree of the run that asks, until it is settled.

Whatever server a person answers through, a decision is held against what that file says was shown.
"""

import json
from collections.abc import Container
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.release import audit_log, decisions, registration, versions
from flows.workspace import files, paths
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError

ASKED = {"id", "flow_run", "name", "version", "digest", "champion", "decisions", "hours", "expires"}
GRACE = timedelta(minutes=10)  # in which an answer that was given in time reaches the registry


def ask(
    main: MainCheckout, asked: registration.Registered, hours: float, place: Path, *, flow_run: str, refused: str = ""
) -> None:
    """Write the question of whether to approve a version to `place`, with all that an answer is held against. Asked
    again, it ends when the first question would have; `refused` says why a decision was not carried out.

    Raises:
        ArtifactError: its bundle moved or changed, and nobody was asked before.
        StageError: the MLflow server does not answer.
    """
    before = json.loads(place.read_bytes()) if place.exists() else {}
    try:
        seen = decisions.compare(main, asked.name, asked.version)
    except ArtifactError:
        if not before:
            raise
        shown = {key: before[key] for key in ("digest", "champion", "text")}
    else:
        shown = {"digest": seen.digest, "champion": seen.champion, "text": seen.markdown(asked.name)}
    question = {
        "id": uuid4().hex[:12],
        "flow_run": flow_run,
        "name": asked.name,
        "version": asked.version,
        **shown,
        "refused": refused,
        "decisions": len(audit_log.decisions(main, asked.name, asked.version, shown["digest"])),
        "hours": hours,
        "expires": before.get("expires") or (datetime.now(UTC) + timedelta(hours=hours)).isoformat(),
    }
    files.write(place, json.dumps(question))


def unsettled(main: MainCheckout) -> dict[Path, dict[str, Any]]:
    """All that someone was asked and that is not settled yet, by the file that holds it."""
    questions = {}
    for place in paths.questions(main):
        try:
            question = json.loads(place.read_bytes())
        except FileNotFoundError:
            continue  # settled at this moment
        except ValueError:
            question = None
        if not isinstance(question, dict) or not question.keys() >= ASKED:
            raise ArtifactError(
                f"{place} is damaged: delete it, and resume its run on Prefect's page, which asks again"
            )
        questions[place] = question
    return questions


def decide(main: MainCheckout, model: str, version: str, **decision: str) -> list[str]:
    """Note a decision that was made by command in the questions about that version, for their runs to be told; the names
    of these runs.
    """
    waiting = []
    for place, question in unsettled(main).items():
        if (question["name"], question["version"]) == (model, version):
            files.write(place, json.dumps(question | {"decided": decision}))
            waiting.append(place.parent.parent.name)
    return waiting


def untold(main: MainCheckout) -> bool:
    """Does a run wait that was not told yet of a decision by command?"""
    return any("decided" in question for question in unsettled(main).values())


def expire(main: MainCheckout, ended: Container[str] = ()) -> list[str]:
    """Reject, as the policy, each version about which someone was asked and nobody decided in time; a line each.

    Of the flow runs `ended` it is known that they got no answer. To others an answer may be under way: a while more.

    Raises:
        ArtifactError: the record is damaged.
        StageError: the MLflow server does not answer.
    """
    said = []
    for place, question in unsettled(main).items():
        grace = timedelta() if question["flow_run"] in ended else GRACE
        if datetime.now(UTC) < datetime.fromisoformat(question["expires"]) + grace:
            continue
        name, version, digest = question["name"], question["version"], question["digest"]
        with versions.opened(main) as client:
            there = versions.by_digest(client, name, digest) == version  # no one deleted it
            decided = audit_log.decisions(main, name, version, digest)
            # What someone decided on before stays as it is: a question about it was asked by a run that made it again.
            asked = len(decided) == question["decisions"] and [each["action"] for each in decided[-1:]] == ["register"]
            if there and asked:
                reason = f"nobody decided within {question['hours']:g} hours"
                decisions.record_rejection(client, main, name, version, digest, decisions.POLICY, reason)
                said.append(f"{name} version {version} is rejected: {reason}")
            place.unlink(missing_ok=True)
    return said

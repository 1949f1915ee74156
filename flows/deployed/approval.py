"""Approval in Prefect's UI: the flow run that registered a version is suspended until someone decides, or the time is over.

A suspended flow holds no process and begins anew when the decision is there. What it asks is kept in a file of its
worktree (`pending.ask`), so that a run which is lost while it waits, and tried again, asks again, and so that a
decision made by command, or none in time, is held against what was asked.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal
from uuid import UUID

from httpx import HTTPError
from prefect import get_client, runtime
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import PrefectException
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput, keyset_from_base_key, read_flow_run_input
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL
from prefect.states import AwaitingRetry
from pydantic import Field

from flows.release import audit_log, decisions, pending, registration
from flows.report import results
from flows.run import artifacts
from flows.workspace import paths
from flows.workspace.paths import MainCheckout, Workspace
from tasks import params
from tasks.errors import ArtifactError, ConfigError
from tasks.package import escaping

BELL = "slmops-approvals"  # the notification block (webhook, Slack, mail ...) that is told when an approval waits


class Decision(RunInput):
    """The approval form."""

    decision: Literal["approve", "reject"] = Field(description="approve: it becomes the champion")
    name: str = Field(
        title="Your name", description="kept in the history, as is the reason", min_length=1,
        max_length=decisions.LONGEST_NAME,
    )  # fmt: skip
    reason: str = Field(min_length=1, max_length=audit_log.LONGEST)
    even_if_worse: bool = Field(False, description="approve it although the champion is more accurate")
    even_if_rejected: bool = Field(False, description="approve it although it was rejected before")


def released(
    main: MainCheckout, root: Workspace, checked: params.Params, registered: registration.Registered | None, said: str
) -> str:
    """Release what a finished run registered as the policy says; one line for a person. `said`: of its registration."""
    policy = checked.release
    asked = paths.question(root)
    if registered is None or registered.champion:  # nothing passed, or this very bundle is released already
        asked.unlink(missing_ok=True)  # by command, while the run waited
        return logged(said)
    if policy.approval == "auto":
        return logged(decisions.auto_approve(main, registered.name, registered.version, policy.margin))
    ask = partial(
        pending.ask, main, registered, policy.expires_hours, asked, flow_run=str(runtime.flow_run.id)
    )  # fmt: skip
    if not asked.exists():
        ask()
        for line in ring(json.loads(asked.read_bytes())):
            get_run_logger().warning("%s", line)
    while True:
        shown = json.loads(asked.read_bytes())
        keys = keyset_from_base_key(f"suspended-{shown['id']}")
        given = read_flow_run_input(keys["response"])
        if given is None and read_flow_run_input(keys["schema"]):  # the run ended while it waited, and is tried again
            ask()
            continue
        decision = Decision(**given) if given else _answer(root, checked, shown)
        try:
            line = _decide(main, registered, shown, decision)
        except (ArtifactError, ConfigError) as error:  # as to a person: told, and asked again
            get_run_logger().warning("%s", error)
            ask(refused=str(error))
        else:
            asked.unlink(missing_ok=True)
            return logged(line)


def bells() -> list[Any]:
    """The notification blocks named BELL, of whatever kind; none unless someone made one."""
    from prefect.blocks import notifications  # noqa: F401 (registers the kinds)
    from prefect.blocks.core import Block

    with get_client(sync_client=True) as client:
        documents = [each for each in client.read_block_documents() if each.name == BELL and each.block_type]
    return [Block.load(f"{each.block_type.slug}/{BELL}") for each in documents if each.block_type]


def ring(question: dict[str, Any], load: Callable[[], Sequence[Any]] = bells) -> list[str]:
    """Tell people that an approval waits. Returns a line for each who could not be told: the question stands all the same."""
    from prefect.blocks.abstract import NotificationError

    name, version = question["name"], question["version"]
    page = f"{PREFECT_UI_URL.value()}/runs/flow-run/{question['flow_run']}" if PREFECT_UI_URL.value() else ""
    body = (
        f"{question['text']}\n\nUntil {question['expires'][:16].replace('T', ' ')} UTC: {page or 'on the page of its run'}, or "
        f"`slmops approve {version} --model {name}` or `slmops reject` in the checkout."
    )
    troubles = (
        HTTPError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        PrefectException,
        NotificationError,
    )
    said: list[str] = []
    try:
        blocks = load()
    except troubles as error:
        return [f"nobody was told that an approval waits: the block {BELL} cannot be read ({_brief(error)})"]
    for block in blocks:
        try:
            block.notify(body, f"{name} version {version} waits for approval")
        except troubles as error:
            said.append(f"{type(block).__name__} {BELL} could not be told that an approval waits ({_brief(error)})")
    return said


def _brief(error: BaseException) -> str:
    """Only the kind of an error: its text may hold a webhook's address, which is a secret."""
    response = getattr(error, "response", None)
    return f"{type(error).__name__}{f', status {response.status_code}' if response is not None else ''}"


def expire(main: MainCheckout) -> list[str]:
    """Record as rejected what nobody decided on in time; a line each. Prefect has failed the runs that waited. A run that
    crashed while it waited, or was taken for crashed for a beat in the moment of its suspension, asks again.

    Raises:
        PipelineError: the registry or its record cannot be written.
    """
    asked = [UUID(question["flow_run"]) for question in pending.unsettled(main).values()]
    with get_client(sync_client=True) as client:
        flow_runs = (
            client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=asked))) if asked else []
        )
        for run in [run for run in flow_runs if run.state and run.state.is_crashed()]:
            client.set_flow_run_state(run.id, AwaitingRetry())
            logged(f"run {run.name} crashed while its question was open: it asks again")
    return pending.expire(main, {str(run.id) for run in flow_runs if run.state and run.state.is_failed()})


def _answer(root: Workspace, checked: params.Params, shown: dict[str, Any]) -> Decision:
    """What a person answers to the question `shown`; until then the flow is suspended."""
    refused = f"**Not done: {escaping.inline(shown['refused'])}**\n\n" if shown["refused"] else ""
    variants = results.markdown(results.rows(root, checked))
    parts = (shown["text"], artifacts.links(root), "What this run made:", variants)
    # Prefect shows a few lines before one has to scroll: why this file comes first.
    form = Decision.with_initial_data(description="\n\n".join((refused + results.bundle(root)["reason"], *parts)))
    left = datetime.fromisoformat(shown["expires"]) - datetime.now(UTC)
    answer: Decision = suspend_flow_run(wait_for_input=form, timeout=max(1, int(left.total_seconds())), key=shown["id"])
    return answer


def _decide(main: MainCheckout, asked: registration.Registered, shown: dict[str, Any], answer: Decision) -> str:
    """Have the registry do what was decided; one line for a person.

    Raises:
        PipelineError: it refuses.
    """
    if answer.decision == "reject":
        return decisions.reject(main, asked.name, asked.version, answer.name, answer.reason)
    return decisions.approve(
        main, asked.name, asked.version, answer.name, answer.reason,
        digest=shown["digest"], expected_champion=shown["champion"],
        even_if_worse=answer.even_if_worse, even_if_rejected=answer.even_if_rejected,
    )  # fmt: skip


def logged(text: str) -> str:
    """Put a line into the run's log; the same line."""
    get_run_logger().info("%s", text)
    return text

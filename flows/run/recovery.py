"""What killed runs left open with the servers, closed: their tasks in Prefect, their runs in MLflow. And what suspended
runs are to be told: the decisions that were made by command while Prefect's server was away.

The next run calls it, and `slmops up` (`python -m flows.run.recovery CHECKOUT`) as soon as a run's spool has lost its owner,
which the kernel tells the moment the run's process ends. That the flow run itself crashed Prefect finds out by its
heartbeat; nobody tells its tasks.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from uuid import UUID

from httpx import TransportError
from prefect import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed

from flows.release import pending
from flows.tracking import mlflow_store, spool
from flows.workspace.paths import MainCheckout
from tasks.errors import PipelineError, StageError

OPEN = [StateType.PENDING, StateType.RUNNING]


def close(main: MainCheckout, say: Callable[[str], None]) -> None:
    """Close what is open of every run whose process is gone.

    Raises:
        StageError: a server does not answer; what was not closed waits for the next call.
    """
    if PREFECT_API_URL.value():  # else the run had a server of its own, which ended with it
        for flow_run in spool.left(main):
            if tasks := _crash_tasks(UUID(flow_run)):
                say(f"Prefect was told that these tasks ended with their run: {', '.join(tasks)}")
        for line in deliver(main):
            say(line)
    mlflow_store.deliver_left(main, say)


def _crash_tasks(flow_run: UUID) -> list[str]:
    """The names of the tasks that were open."""
    try:
        with get_client(sync_client=True) as client:
            task_runs = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])),
                task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=OPEN))),
            )
            for task in task_runs:
                client.set_task_run_state(task.id, Crashed(message="The process of its run was killed."), force=True)
    except (TransportError, PrefectHTTPStatusError) as error:
        raise StageError(f"Prefect's server does not take the end of a killed run's tasks now: {error}") from error
    return [task.name for task in task_runs]


def answer(flow_run: str, **decision: str) -> Literal["taken", "gone", "away"]:
    """Have a suspended flow run go on with a decision that was made elsewhere: the server took it; no such run waits there
    any more; or the server does not answer.
    """
    try:
        with get_client(sync_client=True) as client:
            if client.resume_flow_run(UUID(flow_run), run_input=decision).status == SetStateStatus.ACCEPT:
                return "taken"
            state = client.read_flow_run(UUID(flow_run)).state
    except PrefectHTTPStatusError as error:
        return "gone" if error.response.status_code == 404 else "away"
    except ObjectNotFound:
        return "gone"
    except TransportError:
        return "away"
    return "gone" if state and state.is_final() else "away"


def deliver(main: MainCheckout) -> list[str]:
    """Tell suspended runs the decisions that were made by command; a line each that heard of it. A question that no run
    asks any more is settled by that.
    """
    said = []
    for place, question in pending.unsettled(main).items():
        if decided := question.get("decided"):
            heard, run = answer(question["flow_run"], **decided), place.parent.parent.name
            if heard == "taken":
                said.append(f"told run {run}, which waited for it")
            elif heard == "gone":
                place.unlink(missing_ok=True)
                said.append(f"run {run} waits no longer: Prefect's server has no such run that does")
    return said


if __name__ == "__main__":
    try:
        close(MainCheckout(Path(sys.argv[1])), print)
    except PipelineError as error:
        print(f"warning: {error}")

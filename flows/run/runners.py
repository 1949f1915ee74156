"""Where the stages' tasks run: threads of this process, or Dask's workers by way of prefect-dask.

On Dask a task gets plain data and writes what it tells into the workspace, as everywhere. The cluster is the one
that Dask's own setting names (DASK_SCHEDULER_ADDRESS), else processes of this machine that last as long as the run. Its
workers need this project installed, Prefect's server in reach, and the workspace under the same path.
"""

import concurrent.futures
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.workspace import versioning
from flows.workspace.paths import Workspace
from tasks.errors import ConfigError, StageError
from tasks.params import Machine


def runner(machine: Machine) -> "TaskRunner[Any]":
    """The task runner that the parameters ask for.

    Raises:
        ConfigError: Dask is not installed, or its workers would find no Prefect server.
    """
    if machine.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=machine.parallel)
    try:
        import dask
        from prefect_dask import DaskTaskRunner
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"machine.runner is dask, but {error.name} is not installed: pip install -c constraints.txt -e '.[dask]'"
        ) from None
    if not PREFECT_API_URL.value():
        raise ConfigError(
            "machine.runner is dask, and its workers need a Prefect server: start `slmops up`, or set PREFECT_API_URL"
        )
    address = dask.config.get("scheduler-address", None)
    if address:
        return DaskTaskRunner(address=address)
    dask.config.set({"distributed.scheduler.allowed-failures": machine.retries})
    local = {"n_workers": machine.parallel, "threads_per_worker": 1, "dashboard_address": None, "security": True}
    return DaskTaskRunner(cluster_kwargs=local)


def machines() -> int:
    """How many of the run's tasks may have a machine to themselves: the workers of a cluster that is not our own."""
    context = FlowRunContext.get()
    assert context is not None
    if isinstance(context.task_runner, ThreadPoolTaskRunner) or not context.task_runner.address:  # type: ignore[attr-defined]
        return 1
    return max(1, len(context.task_runner.client.scheduler_info()["workers"]))  # type: ignore[attr-defined]


def remote() -> bool:
    """Do the run's tasks work on Dask?"""
    context = FlowRunContext.get()
    return context is not None and not isinstance(context.task_runner, ThreadPoolTaskRunner)


@contextmanager
def stopping(root: Workspace, futures: Mapping[Any, PrefectFuture[Any]]) -> Iterator[None]:
    """When an error leaves the block, the tasks in `futures` that wait are cancelled, and what works in the workspace is
    stopped.

    Raises:
        StageError: there is no Dask cluster to use.
    """
    context = FlowRunContext.get()
    assert context is not None
    if not remote():
        try:
            yield
        except BaseException:
            for future in futures.values():  # else the next in line begins as soon as one is stopped
                future.wrapped_future.cancel()  # type: ignore[attr-defined]
            versioning.interrupt(root)
            raise
        return
    try:
        client: Any = context.task_runner.client  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as error:
        raise StageError(
            f"no Dask cluster could be used ({error}): start the one that DASK_SCHEDULER_ADDRESS names"
        ) from error
    try:
        yield
    except BaseException:
        client.cancel([future.wrapped_future for future in futures.values()])  # type: ignore[attr-defined]
        client.run(versioning.interrupt, root)
        raise


def end(name: str, future: Any) -> Any:
    """What a task that has ended came to: its result, or the error that it raised."""
    broken = future.wrapped_future.exception()
    if broken is None:
        future.wait()
        if not isinstance(future.wrapped_future, concurrent.futures.Future):
            future.wrapped_future.release()  # else Dask would do it again should the worker die that holds the result
        return future.state.result(raise_on_failure=False)
    if type(broken).__name__ != "KilledWorker":
        return broken
    text = f"{name}: each Dask worker that worked on it was killed (out of memory?): see its log, then run again"
    try:
        get_client(sync_client=True).set_task_run_state(future.task_run_id, Crashed(message=text), force=True)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 404:  # a server that never heard of it has nothing to put right
            raise
    return StageError(text)

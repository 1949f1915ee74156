"""The flow: every stage as one Prefect task, submitted as soon as its inputs are there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import flow, runtime
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.preflight import checks, plan
from flows.release import registration
from flows.report import results
from flows.report.page import write_report
from flows.run import artifacts, graph, recovery, runners
from flows.run.graph import Key
from flows.run.monitor import Monitor
from flows.run.stage_task import StageRun, task
from flows.run.terminal import Display
from flows.tracking import mlflow_runs
from flows.workspace import paths, versioning, worktrees
from flows.workspace.paths import Workspace
from tasks import params
from tasks.acquire import watched
from tasks.errors import PipelineError, StageError
from tasks.frame.stage import folder
from tasks.stages import STAGES

MLFLOW_S = 120.0  # registering needs MLflow, and waits so long for one that is away


@dataclass(frozen=True)
class Result:
    """What a run came to. `work_s`: seconds in which at least one stage's own command ran."""

    outcomes: dict[Key, versioning.Outcome]
    rows: list[results.Row]
    version: registration.Registered | None  # None: nothing passed
    said: str  # of its registration, for a person
    report: Path
    work_s: float
    page: str | None = None  # MLflow's, of the run


def run(
    root: Workspace, name: str, checked: params.Params, by: str | None = None, *, changed: frozenset[str] | None = None
) -> Result:
    """Run the pipeline under Prefect in the workspace `root`, which the caller has locked. `checked`: its params.yaml; `by`:
    who started it, by default this login; `changed`: DVC's names of what is out of date, where the caller has asked.

    Raises:
        PipelineError: what the first failing stage raised.
    """
    runner: Any = runners.runner(checked.machine)

    @flow(name="slmops", flow_run_name="{name}", task_runner=runner, persist_result=False, validate_parameters=False)
    def slmops(root: str, name: str, by: str | None = None) -> Result:
        """From an open model to a packaged and registered edge model, in the workspace `root`."""
        return _run(Workspace(Path(root)), name, checked, by, changed)

    result: Result = slmops(str(root), name, by)
    return result


def _run(root: Workspace, name: str, checked: params.Params, by: str | None, changed: frozenset[str] | None) -> Result:
    started = time.monotonic()
    artifacts.plain_errors()
    main = worktrees.main_root(root)
    watched.check(checked.acquire, root)
    checks.check(root, checked)
    with opened(root, name, checked) as monitor:
        with monitor:
            _stages(monitor, name, checked, frozenset(versioning.status(root)) if changed is None else changed)
            rows = results.rows(root, checked)
            monitor.display.table(rows)
        report = paths.report(root)
        write_report(folder(root, "package"), folder(root, "select"), report, params=checked)
        monitor.tracker.settle(MLFLOW_S)
        version, said = registration.register_if_passed(root, main, by, separate_duties=checked.release.separate_duties)
        if version:
            numbers = next(row.numbers for row in rows if row.chosen)
            mlflow_runs.tell_model(main, root, version.name, version.version, numbers)
        page = artifacts.show(root, name, rows, said)
    result = Result(monitor.done, rows, version, said, report, covered(monitor.spans), page)
    ended = {"slmops.dvc_lock": versioning.lock_digest(root), "slmops.registered": said}
    spent = {"wall_s": time.monotonic() - started, "work_s": result.work_s}
    monitor.tracker.close("FINISHED", ended, spent, (report, folder(root, "package") / "bundle.json"))
    return result


@contextmanager
def opened(root: Workspace, name: str, checked: params.Params) -> Iterator[Monitor]:
    """The monitor of the run that works in the workspace `root`. Closing its MLflow run is the caller's part, unless an error
    leaves the block: that closes it as what it came to.
    """
    tags = {
        "slmops.flow_run": str(runtime.flow_run.id),
        "slmops.root_flow_run": str(runtime.flow_run.root_flow_run_id),  # the deployed run that it is a part of
        "slmops.git_branch": worktrees.git(root, "branch", "--show-current"),  # runs/<name> ends with what it made
        "slmops.git_commit": worktrees.git(root, "rev-parse", "HEAD"),
        "slmops.workspace": str(root),
    }
    display, logger = Display(), get_run_logger()

    def say(text: str) -> None:
        display.say(text)
        logger.warning("%s", text)

    tracker = mlflow_runs.Tracker(worktrees.main_root(root), name, checked, tags, say, recovery.close)
    try:
        yield Monitor(root, display, tracker)
    except BaseException as error:
        _close_failed(tracker, error)
        raise


def _close_failed(tracker: mlflow_runs.Tracker, error: BaseException) -> None:
    """End the MLflow run truly; should that fail too, the first error stays the one to tell."""
    try:
        tracker.close(
            "FAILED" if isinstance(error, Exception) else "KILLED", {"slmops.error": str(error)[:5000]}, {}, ()
        )
    except StageError as second:
        error.add_note(str(second))


def stage_runs(root: Workspace, run: str, checked: params.Params, changed: frozenset[str]) -> list[StageRun]:
    """Everything that a run does, in order. `changed`: DVC's names of what is out of date."""
    behind = graph.behind(changed, checked)
    parallel = min(checked.machine.parallel, len(checked.quantize.variants))
    return [
        StageRun(
            root, run, *key, key not in behind, checked.digest(STAGES[key[0]].sections),
            parallel if "variant" in key[1] else 1, runners.remote(),
        )
        for key in graph.keys(checked)
    ]  # fmt: skip


def _stages(monitor: Monitor, run: str, checked: params.Params, changed: frozenset[str]) -> None:
    """Submit every stage as a task as soon as its inputs are there; variants go side by side, and so do students where
    there are machines for them: each takes one whole.

    Raises:
        PipelineError: what the first failing stage raised, in the pipeline's order.
    """
    works = stage_runs(monitor.root, run, checked, changed)
    outlook = plan.outlook(monitor.root, checked, [work.key for work in works if not work.up_to_date])
    if outlook.minutes:
        monitor.display.expect(outlook.minutes)
    for doubt in outlook.doubts:
        _tell(monitor, f"warning: {doubt}")
    monitor.watch(works)
    futures: dict[Key, PrefectFuture[versioning.Outcome]] = {}
    failures: dict[Key, Exception] = {}
    ended: SimpleQueue[StageRun] = SimpleQueue()
    try:
        with runners.stopping(monitor.root, futures):
            machines = runners.machines()
            while True:
                for work in works:
                    if work.key in futures or not monitor.done.keys() >= set(graph.inputs(work.key, checked)):
                        continue
                    at_work = len(futures) - len(monitor.done) - len(failures)
                    if STAGES[work.stage].alone and (failures or at_work >= machines):
                        continue
                    futures[work.key] = future = task(work.name, checked.machine.retries).submit(work)
                    future.add_done_callback(lambda _, work=work: ended.put(work))
                if len(monitor.done) + len(failures) == len(futures):  # what is left waits for something that failed
                    break
                work = ended.get()
                outcome = runners.end(work.name, futures[work.key])
                if isinstance(outcome, versioning.Outcome):
                    monitor.end(work, outcome)
                    if work.stage == "select":
                        _tell(monitor, results.student(monitor.root, checked.validate_.gates))
                else:
                    failures[work.key] = outcome
                    monitor.fail(work, str(outcome))
    except BaseException as error:
        monitor.fail_all(str(error) or type(error).__name__ if isinstance(error, Exception) else "stopped")
        raise
    if failures:
        first = [failures[work.key] for work in works if work.key in failures]
        raise next((error for error in first if isinstance(error, PipelineError)), first[0])


def _tell(monitor: Monitor, text: str) -> None:
    monitor.display.say(text)
    get_run_logger().info("%s", text)


def one(monitor: Monitor, work: StageRun, retries: int) -> None:
    """Bring one stage up to date, in this thread.

    Raises:
        PipelineError: what the stage raised.
    """
    monitor.watch([work])
    try:
        outcome = task(work.name, retries)(work)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        monitor.fail(work, str(error) or type(error).__name__, status)
        raise
    monitor.end(work, outcome)


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by at least one span."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total

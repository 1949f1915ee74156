"""The flow: one Prefect task per stage and variant, each a single call of DVC.

Prefect decides when a stage runs, in what order, and whether it is tried again. Whether there is anything to
do is DVC's decision alone, so a retry, a second run and `dvc repro` all take up what is finished.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task, flow, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from flows import pages, release, results, tracking, versioning, workspace
from flows.display import Display
from flows.report import write_report
from tasks import params
from tasks.errors import DiskFullError, PipelineError, StageError
from tasks.stage import Stage, folder
from tasks.stages import STAGES

MLFLOW_S = 120.0  # registering needs MLflow, and waits so long for one that is away
ARTIFACT_S = 2.0  # between two updates of a progress artifact

Key = tuple[str, str | None]  # stage, variant


@dataclass(frozen=True)
class Result:
    """What a run came to. `work_s`: seconds in which at least one stage's own command ran."""

    outcomes: dict[Key, versioning.Outcome]
    rows: list[results.Row]
    registered: str
    report: Path
    work_s: float


@dataclass(frozen=True)
class Context:
    """What every task of a run shares."""

    root: Path
    name: str
    params: params.Params
    tracker: tracking.Tracker
    display: Display
    lock: int
    changed: frozenset[str]  # DVC's names of the stages that were out of date when the run began
    done: dict[Key, versioning.Outcome]
    spans: list[tuple[float, float]]  # when stages' own commands ran, by the monotonic clock


def run(root: Path, name: str, lock: int) -> Result:
    """Run the pipeline under Prefect in the workspace `root`, which `lock` (a descriptor) keeps for this run.

    Raises:
        PipelineError: what the first failing stage raised.
    """
    workers = params.load(root / "params.yaml").machine.parallel
    runner: Any = ThreadPoolTaskRunner(max_workers=workers)
    result: Result = slmops.with_options(task_runner=runner)(str(root), name, lock)
    return result


@flow(name="slmops", flow_run_name="{name}", persist_result=False, validate_parameters=False)
def slmops(root: str, name: str, lock: int) -> Result:
    """From an open model to a packaged and registered edge model, in the workspace `root`."""
    started = time.monotonic()
    pages.plain_errors()
    here = Path(root)
    main = workspace.main_root(here)
    checked = params.load(here / "params.yaml")
    tags = {
        "slmops.flow_run": str(runtime.flow_run.id),
        "slmops.git_commit": workspace.git(here, "rev-parse", "HEAD"),
        "slmops.workspace": str(here),
    }
    display, logger = Display(), get_run_logger()

    def say(text: str) -> None:
        display.say(text)
        logger.warning("%s", text)

    tracker = tracking.Tracker(main, name, checked, tags, say)
    try:
        with display:
            changed = frozenset(versioning.status(here))
            context = Context(here, name, checked, tracker, display, lock, changed, {}, [])
            _stages(context)
            rows = results.rows(here, checked)
            display.table(rows)
        report = here / "report.html"
        write_report(folder(here, "package"), folder(here, "distill"), report, params=checked)
        tracker.settle(MLFLOW_S)
        version, registered = release.register_if_passed(here, main)
        if version:
            chosen = folder(here, "validate", results.bundle(here)["chosen"])
            tracking.tell_model(main, here, version.name, version.version, chosen)
        pages.show(here, name, rows, registered)
    except BaseException as error:
        versioning.interrupt()
        _close_failed(tracker, error)
        raise
    result = Result(context.done, rows, registered, report, _covered(context.spans))
    ended = {"slmops.dvc_lock": versioning.lock_digest(here), "slmops.registered": registered}
    spent = {"wall_s": time.monotonic() - started, "work_s": result.work_s}
    tracker.close("FINISHED", ended, spent, (report, folder(here, "package") / "bundle.json"))
    return result


def _close_failed(tracker: tracking.Tracker, error: BaseException) -> None:
    """End the MLflow run truly; should that fail too, the first error stays the one to tell."""
    try:
        tracker.close(
            "FAILED" if isinstance(error, Exception) else "KILLED", {"slmops.error": str(error)[:5000]}, {}, ()
        )
    except StageError as second:
        error.add_note(str(second))


def _stages(context: Context) -> None:
    """Submit every stage as a task that waits for its inputs; variants go side by side.

    Raises:
        PipelineError: what the first failing stage raised, in the pipeline's order.
    """
    futures: dict[Key, PrefectFuture[versioning.Outcome]] = {}
    variants = context.params.quantize.variants
    for stage in STAGES.values():
        for variant in variants if stage.per_variant else (None,):
            inputs = [futures[key] for key in _inputs(stage, variant, variants)]
            futures[stage.name, variant] = _task(context, stage, variant).submit(wait_for=inputs)
    wait(list(futures.values()))
    # A stage whose input failed was not run (its state is pending) and has no error of its own to tell.
    for future in futures.values():
        end = future.state.result(raise_on_failure=False) if future.state.is_final() else None
        if isinstance(end, PipelineError):
            raise end
    for future in futures.values():
        future.result()  # raises what is no error of ours


def _inputs(stage: Stage, variant: str | None, variants: tuple[str, ...]) -> list[Key]:
    found: list[Key] = []
    for source in stage.inputs.values():
        if not STAGES[source].per_variant:
            found.append((source, None))
        elif stage.per_variant:
            found.append((source, variant))
        else:
            found += [(source, each) for each in variants]
    return found


def _task(context: Context, stage: Stage, variant: str | None) -> Task[[], versioning.Outcome]:
    """The Prefect task of one stage: `distill`, `quantize-q4_0`."""
    name = f"{stage.name}-{variant}" if variant else stage.name
    task: Task[[], versioning.Outcome] = Task(
        lambda: _bring(context, stage, variant, name),
        name=name,
        task_run_name=name,
        retries=context.params.machine.retries,
        retry_delay_seconds=exponential_backoff(2),  # 2, 4, 8 ... seconds, and up to half more:
        retry_jitter_factor=0.5,  # variants that failed together at one server do not return together
        retry_condition_fn=_worth_a_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    return task


def _bring(context: Context, stage: Stage, variant: str | None, name: str) -> versioning.Outcome:
    """Bring one stage up to date through DVC and tell of it to the terminal, Prefect and MLflow."""
    tell = _teller(context, stage, variant, name)
    context.tracker.begin(stage, variant)
    context.display.begin(name)
    began = time.monotonic()
    try:
        if _up_to_date(context, stage, variant):
            outcome = versioning.Outcome("unchanged", 0.0, 0.0)
        else:
            outcome = versioning.repro(
                context.root,
                stage.name,
                variant,
                log=context.root / ".runs" / "logs" / context.name / f"{name}.log",
                on_event=tell,
                env=_threads(context.params) if stage.per_variant else {},
                keep_open=(context.lock,),
            )
        if outcome.how == "ran":
            context.spans.append((began, began + outcome.stage_s))
        context.tracker.end(stage, variant, folder(context.root, stage.name, variant), outcome)
    except BaseException as error:
        context.display.fail(name, error)
        context.tracker.fail(stage, variant, error, "KILLED" if isinstance(error, versioning.Stopped) else "FAILED")
        raise
    context.done[stage.name, variant] = outcome
    context.display.end(name, outcome)
    return outcome


def _up_to_date(context: Context, stage: Stage, variant: str | None) -> bool:
    """One `dvc status` at the start answers for every stage whose inputs this run left alone."""
    inputs = _inputs(stage, variant, context.params.quantize.variants)
    unchanged = all(context.done[key].how == "unchanged" for key in inputs)
    return unchanged and versioning.address(stage.name, variant) not in context.changed


def _teller(context: Context, stage: Stage, variant: str | None, name: str) -> Callable[[versioning.Event], None]:
    """Hand a stage's events to the bars, to a Prefect progress artifact and to MLflow's curves."""
    artifact: Any = None
    last = time.monotonic()  # a stage that ends at once needs no artifact

    def tell(event: versioning.Event) -> None:
        nonlocal artifact, last
        context.display.event(name, event)
        if event["event"] == "metric":
            context.tracker.point(stage, variant, event["name"], event["value"], event["step"])
        elif event["event"] == "note":
            get_run_logger().info("%s", event["text"])
        elif event["event"] == "progress" and time.monotonic() - last > ARTIFACT_S:
            last, percent = time.monotonic(), 100 * event["done"] / event["total"]
            if artifact is None:
                key = f"progress-{name}".replace("_", "-")  # Prefect's keys know no underscore
                artifact = create_progress_artifact(percent, key=key, description=event["label"])
            else:
                update_progress_artifact(artifact, percent, description=event["label"])

    return tell


def _worth_a_retry(task: Any, run: Any, state: Any) -> bool:
    """Only work that failed (network, memory, a library) may go better next time; a wrong parameter, a damaged file or
    a full disk will not.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and not isinstance(error, DiskFullError)


def _threads(checked: params.Params) -> dict[str, str]:
    """Variants that run side by side share the cores instead of fighting for them."""
    each = max(1, (os.cpu_count() or 1) // min(checked.machine.parallel, len(checked.quantize.variants)))
    return {"OMP_NUM_THREADS": str(each)}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by at least one span."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total

"""The Prefect task of one stage: a single call of DVC, in whatever process and on whatever machine.

Prefect decides when a stage runs and whether it is tried again. Whether there is anything to do is DVC's decision alone,
so a retry, a second run and `dvc repro` all take up what is finished. What the stage tells goes into its event file, which
whoever wants to know reads.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.tasks import exponential_backoff

from flows.run.graph import Key, title
from flows.workspace import locks, paths, versioning
from flows.workspace.paths import Workspace
from tasks import params
from tasks.errors import BrokenRuntimeError, ConfigError, DiskFullError, PipelineError, StageError
from tasks.frame import cores, manifest
from tasks.frame.items import Item
from tasks.frame.stage import folder
from tasks.stages import STAGES

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ARTIFACT_S = 2.0  # between two updates of a progress artifact


@dataclass(frozen=True)
class StageRun:
    """One stage of one run: plain data, for it may be done in another process or on another machine."""

    root: Workspace
    run: str
    stage: str
    item: Item
    up_to_date: bool  # as `dvc status` found when the run began
    params: str = ""  # digest of the sections that the stage reads, as they were then; "": not held against
    parallel: int = 1  # so many of its kind share a machine
    remote: bool = False  # on a worker that leaves libraries one thread each

    @property
    def key(self) -> Key:
        return self.stage, self.item

    @property
    def name(self) -> str:
        return title(self.key)

    @property
    def log(self) -> Path:
        return paths.stage_log(self.root, self.run, self.name)

    @property
    def events(self) -> Path:
        """The stage's event file."""
        return self.log.with_suffix(".jsonl")


def task(name: str, retries: int) -> Task[[StageRun], versioning.Outcome]:
    """The Prefect task of a stage of that name."""
    return Task(
        reproduce,
        name=name,
        task_run_name=name,
        retries=retries,
        retry_delay_seconds=exponential_backoff(2),  # 2, 4, 8 ... seconds, and up to half more:
        retry_jitter_factor=0.5,  # variants that failed together at one server do not return together
        retry_condition_fn=_worth_a_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


def reproduce(work: StageRun) -> versioning.Outcome:
    """Bring one stage up to date through DVC.

    Raises:
        PipelineError: what the stage raised, or ConfigError: params.yaml was changed since the run began.
    """
    if work.up_to_date:
        return versioning.Outcome("unchanged", 0.0, 0.0)
    work.events.parent.mkdir(parents=True, exist_ok=True)
    _tell(work, event="begin")
    try:
        with locks.joined(work.root, work.name) as descriptors:
            _hold_params(work, params.load(paths.params_file(work.root)).digest(STAGES[work.stage].sections))
            outcome = versioning.repro(
                work.root,
                work.stage,
                *work.item.words,
                log=work.log,
                events=work.events,
                on_event=_artifact(work.name),
                env=_threads(work),
                keep_open=descriptors,
            )
        if outcome.how == "ran":
            _hold_params(work, manifest.load(folder(work.root, work.stage, *work.item.words)).params)
        return outcome
    except versioning.Stopped:
        raise  # whoever stopped the run tells it
    except PipelineError as error:
        _tell(work, event="fail", text=str(error))
        raise


def _tell(work: StageRun, **event: str) -> None:
    with work.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _hold_params(work: StageRun, digest: str) -> None:
    """Whoever edits params.yaml during a run must not get a model of other values than MLflow and the report tell.

    Raises:
        ConfigError: they are others than when the run began.
    """
    if work.params and digest != work.params:
        raise ConfigError(
            f"params.yaml was changed since this run began, and {work.name} depends on it: run again, and what is done and "
            "did not change is taken from the cache; to work beside an edit use `slmops run --worktree`"
        )


def _artifact(name: str) -> Callable[[versioning.Event], None]:
    """Show the progress of a stage on its Prefect page, and its notes in the log there."""
    artifact: Any = None
    last = time.monotonic()  # a stage that ends at once needs no artifact

    def show(event: versioning.Event) -> None:
        nonlocal artifact, last
        if event["event"] == "note":
            get_run_logger().info("%s", event["text"])
        elif event["event"] == "progress":
            percent = 100 * event["done"] / event["total"] if event["total"] else 100.0
            if time.monotonic() - last < ARTIFACT_S and not (artifact and percent >= 100):
                return
            last = time.monotonic()
            if artifact is None:
                key = f"progress-{name}".replace("_", "-")  # Prefect's keys know no underscore
                artifact = create_progress_artifact(percent, key=key, description=event["label"])
            else:
                update_progress_artifact(artifact, percent, description=event["label"])

    return show


def _worth_a_retry(task: Any, run: Any, state: Any) -> bool:
    """Only work that failed (network, memory) may go better next time; a wrong parameter, a damaged file, a full disk or
    a library that crashes will not.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and not isinstance(error, (DiskFullError, BrokenRuntimeError))


def _threads(work: StageRun) -> dict[str, str | None]:
    """Variants that run side by side share the cores instead of fighting for them. All else has them to itself, also on
    Dask, whose workers leave libraries one thread each: the bytes of what is trained depend on how many those are.
    """
    if work.parallel > 1:
        return dict.fromkeys(THREADS, str(max(1, cores.available() // work.parallel)))
    return dict.fromkeys(THREADS) if work.remote else {}

"""The flow: one Prefect task per stage and variant, each a single call of DVC.

Prefect decides when a stage runs, in what order, and whether it is tried again. Whether there is anything to
do is DVC's decision alone, so a retry, a second run and `dvc repro` all take up what is finished.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import Task, flow, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.tasks import exponential_backoff

from flows.preflight import checks, plan
from flows.release import decisions
from flows.report import results
from flows.report.page import write_report
from flows.run import artifacts, recovery, runners
from flows.run.terminal import Display
from flows.tracking import mlflow_runs
from flows.workspace import locks, paths, versioning, worktrees
from flows.workspace.paths import Workspace
from tasks import params
from tasks.acquire import watched
from tasks.errors import BrokenRuntimeError, ConfigError, DiskFullError, PipelineError, StageError
from tasks.frame import cores, manifest
from tasks.frame.stage import folder
from tasks.stages import STAGES

MLFLOW_S = 120.0  # registering needs MLflow, and waits so long for one that is away
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ARTIFACT_S = 2.0  # between two updates of a progress artifact

Key = tuple[str, str | None]  # stage; variant or seed, where it is done once for each


@dataclass(frozen=True)
class Result:
    """What a run came to. `work_s`: seconds in which at least one stage's own command ran."""

    outcomes: dict[Key, versioning.Outcome]
    rows: list[results.Row]
    registered: str
    report: Path
    work_s: float
    page: str | None = None  # MLflow's, of the run


@dataclass(frozen=True)
class Order:
    """What the task of one stage is told: plain data, for it may work in another process or on another machine."""

    root: Workspace
    run: str
    stage: str
    item: str | None
    parallel: int  # so many of its kind share a machine
    up_to_date: bool  # as `dvc status` found when the run began
    params: str = ""  # digest of the sections that the stage reads, as they were then

    @property
    def key(self) -> Key:
        return self.stage, self.item

    @property
    def name(self) -> str:
        """`distill`, `quantize-q4_0`: of the task, its log and its line on the terminal."""
        return f"{self.stage}-{self.item}" if self.item else self.stage


@dataclass
class Desk:
    """The flow's own end: what tasks post, wherever they run, is told here to the terminal and to MLflow."""

    root: Workspace
    display: Display
    tracker: mlflow_runs.Tracker
    done: dict[Key, versioning.Outcome] = field(default_factory=dict)
    began: dict[str, tuple[Order, float]] = field(default_factory=dict)  # by name; of what is not yet done
    spans: list[tuple[float, float]] = field(default_factory=list)  # when stages' own commands ran

    def take(self, order: Order, event: versioning.Event) -> None:
        """An event of `tasks/frame/events.py`, or that a task begins or failed."""
        name, stage = order.name, STAGES[order.stage]
        if event["event"] == "begin":
            self.began[name] = order, time.monotonic()
            self.tracker.begin(stage, order.item)
            self.display.begin(name)
        elif event["event"] == "fail":
            self.fail(name, event["text"])
        elif event["event"] == "metric":
            self.tracker.point(stage, order.item, event["name"], event["value"], event["step"])
        else:
            self.display.event(name, event)

    def end(self, order: Order, outcome: versioning.Outcome) -> None:
        """A stage is up to date."""
        _, began = self.began.pop(order.name)
        if outcome.how == "ran":
            self.spans.append((began, began + outcome.stage_s))
        self.done[order.key] = outcome
        self.display.end(order.name, outcome)
        self.tracker.end(STAGES[order.stage], order.item, folder(self.root, order.stage, order.item), outcome)

    def fail(self, name: str, text: str, status: str = "FAILED") -> None:
        """A stage failed, and may be tried again, or was stopped (KILLED)."""
        order, _ = self.began.pop(name)
        self.display.fail(name, text)
        self.tracker.fail(STAGES[order.stage], order.item, text, status)


def run(root: Workspace, name: str, by: str | None = None) -> Result:
    """Run the pipeline under Prefect in the workspace `root`, which the caller has locked. `by`: who started it, by default
    this login.

    Raises:
        PipelineError: what the first failing stage raised.
    """
    runner: Any = runners.runner(params.load(paths.params_file(root)).machine)
    result: Result = slmops.with_options(task_runner=runner)(str(root), name, by)
    return result


@flow(name="slmops", flow_run_name="{name}", persist_result=False, validate_parameters=False)
def slmops(root: str, name: str, by: str | None = None) -> Result:
    """From an open model to a packaged and registered edge model, in the workspace `root`."""
    started = time.monotonic()
    artifacts.plain_errors()
    here = Workspace(Path(root))
    main = worktrees.main_root(here)
    checked = params.load(paths.params_file(here))
    watched.check(checked.acquire, here)
    checks.check(here, checked)
    with opened(here, name, checked) as desk:
        with desk.display:
            _stages(desk, name, checked)
            rows = results.rows(here, checked)
            desk.display.table(rows)
        report = paths.report(here)
        write_report(folder(here, "package"), folder(here, "select"), report, params=checked)
        desk.tracker.settle(MLFLOW_S)
        version, registered = decisions.register_if_passed(
            here, main, by, separate_duties=checked.release.separate_duties
        )
        if version:
            chosen = folder(here, "validate", results.bundle(here)["chosen"])
            mlflow_runs.tell_model(main, here, version.name, version.version, chosen)
        page = artifacts.show(here, name, rows, registered)
    result = Result(desk.done, rows, registered, report, covered(desk.spans), page)
    ended = {"slmops.dvc_lock": versioning.lock_digest(here), "slmops.registered": registered}
    spent = {"wall_s": time.monotonic() - started, "work_s": result.work_s}
    desk.tracker.close("FINISHED", ended, spent, (report, folder(here, "package") / "bundle.json"))
    return result


@contextmanager
def opened(root: Workspace, name: str, checked: params.Params) -> Iterator[Desk]:
    """The desk of the run that works in the workspace `root`. Closing its MLflow run is the caller's part, unless an error
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
        yield Desk(root, display, tracker)
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


def _stages(desk: Desk, run: str, checked: params.Params) -> None:
    """Submit every stage as a task as soon as its inputs are there; variants go side by side, and so do students where
    there are machines for them: each takes one whole.

    Raises:
        PipelineError: what the first failing stage raised, in the pipeline's order.
    """
    parallel = min(checked.machine.parallel, len(checked.quantize.variants))
    behind = _behind(frozenset(versioning.status(desk.root)), checked)
    orders = [
        Order(
            desk.root,
            run,
            *key,
            parallel if STAGES[key[0]].per == "variant" else 1,
            key not in behind,
            checked.digest(STAGES[key[0]].sections),
        )
        for key in _keys(checked)
    ]
    if minutes := plan.expected(desk.root, checked, behind):
        desk.display.expect(minutes)
    by_name = {order.name: order for order in orders}
    inputs = {order.key: _inputs(*order.key, checked) for order in orders}
    futures: dict[Key, PrefectFuture[versioning.Outcome]] = {}
    ends: dict[Key, Any] = {}
    posts: SimpleQueue[runners.Message] = SimpleQueue()
    try:
        with runners.post(posts.put, desk.root, futures) as post:
            machines = runners.machines()
            while True:
                for order in orders:
                    if order.key in futures or not desk.done.keys() >= set(inputs[order.key]):
                        continue
                    if STAGES[order.stage].per == "seed" and not _may_train(futures, ends, machines):
                        continue
                    # States, not futures: Dask would do again what a future stood for, were it lost.
                    states = [futures[key].state for key in inputs[order.key]]
                    futures[order.key] = future = _task(order.name, checked).submit(order, post, wait_for=states)
                    future.add_done_callback(lambda _, name=order.name: posts.put((name, None)))
                if len(ends) == len(futures):  # what is left waits for something that failed
                    break
                name, event = posts.get()
                order = by_name[name]
                if event is not None:
                    desk.take(order, event)
                    continue
                ends[order.key] = end = runners.end(name, futures[order.key])
                if isinstance(end, versioning.Outcome):
                    desk.end(order, end)
                    if order.stage == "select":
                        _tell(desk, results.student(desk.root, checked.validate_.gates))
                elif name in desk.began:  # it had no time for a word
                    desk.fail(name, str(end))
    except BaseException as error:
        for name in list(desk.began):
            desk.fail(name, str(error) or type(error).__name__, "KILLED")
        raise
    failed = [ends[order.key] for order in orders if isinstance(ends.get(order.key), BaseException)]
    ours = [error for error in failed if isinstance(error, PipelineError)]
    if failed:
        raise (ours or failed)[0]


def _tell(desk: Desk, text: str) -> None:
    desk.display.say(text)
    get_run_logger().info("%s", text)


def _may_train(futures: Mapping[Key, Any], ends: Mapping[Key, Any], machines: int) -> bool:
    """Whether a further student may begin: beside another one, or beside anything, training takes many times as long, as
    their threads fight for the cores; and where one has failed for good, the run has, too.
    """
    failed = any(isinstance(end, BaseException) for end in ends.values())
    return not failed and len(futures.keys() - ends.keys()) < machines


def one(desk: Desk, order: Order, checked: params.Params) -> None:
    """Bring one stage up to date, in this thread.

    Raises:
        PipelineError: what the stage raised.
    """

    def post(message: runners.Message) -> None:
        if message[1] is not None:
            desk.take(order, message[1])

    try:
        outcome = _task(order.name, checked)(order, post)
    except BaseException as error:
        if order.name in desk.began:  # it had no time for a word
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            desk.fail(order.name, str(error) or type(error).__name__, status)
        raise
    desk.end(order, outcome)


def _keys(checked: params.Params) -> list[Key]:
    """Everything that a run does, in order."""
    return [(stage.name, item) for stage in STAGES.values() for item in stage.items(checked) or (None,)]


def _behind(changed: frozenset[str], checked: params.Params) -> set[Key]:
    """The stages that are out of date or follow from one that is. All others need no call of DVC."""
    found: set[Key] = set()
    for key in _keys(checked):
        if versioning.address(*key) in changed or found & set(_inputs(*key, checked)):
            found.add(key)
    return found


def _inputs(name: str, item: str | None, checked: params.Params) -> list[Key]:
    stage = STAGES[name]
    found: list[Key] = []
    for source in stage.inputs.values():
        if stage.per == STAGES[source].per:
            found.append((source, item))
        else:
            found += [(source, each) for each in STAGES[source].items(checked) or (None,)]
    return found


def _task(name: str, checked: params.Params) -> Task[[Order, runners.Post], versioning.Outcome]:
    """The Prefect task of one stage."""
    return Task(
        bring,
        name=name,
        task_run_name=name,
        retries=checked.machine.retries,
        retry_delay_seconds=exponential_backoff(2),  # 2, 4, 8 ... seconds, and up to half more:
        retry_jitter_factor=0.5,  # variants that failed together at one server do not return together
        retry_condition_fn=_worth_a_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


def bring(order: Order, post: runners.Post) -> versioning.Outcome:
    """Bring one stage up to date through DVC. Knows the workspace and nothing of the flow's process."""
    name = order.name
    post((name, {"event": "begin"}))
    if order.up_to_date:
        return versioning.Outcome("unchanged", 0.0, 0.0)
    try:
        with locks.joined(order.root, name) as descriptors:
            _hold_params(order, params.load(paths.params_file(order.root)).digest(STAGES[order.stage].sections))
            outcome = versioning.repro(
                order.root,
                order.stage,
                order.item,
                log=paths.stage_log(order.root, order.run, name),
                on_event=_teller(name, post),
                env=_threads(order, post),
                keep_open=descriptors,
            )
        if outcome.how == "ran":
            _hold_params(order, manifest.load(folder(order.root, order.stage, order.item)).params)
        return outcome
    except PipelineError as error:
        post((name, {"event": "fail", "text": str(error)}))
        raise


def _hold_params(order: Order, digest: str) -> None:
    """Whoever edits params.yaml during a run must not get a model of other values than MLflow and the report tell.

    Raises:
        ConfigError: they are others than when the run began.
    """
    if order.params and digest != order.params:
        raise ConfigError(
            f"params.yaml was changed since this run began, and {order.name} depends on it: run again, and what is done and "
            "did not change is taken from the cache; to work beside an edit use `slmops run --worktree`"
        )


def _teller(name: str, post: runners.Post) -> Callable[[versioning.Event], None]:
    """Hand a stage's events to the flow; its notes and its progress to Prefect too."""
    artifact: Any = None
    last = time.monotonic()  # a stage that ends at once needs no artifact

    def tell(event: versioning.Event) -> None:
        nonlocal artifact, last
        post((name, event))
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

    return tell


def _worth_a_retry(task: Any, run: Any, state: Any) -> bool:
    """Only work that failed (network, memory) may go better next time; a wrong parameter, a damaged file, a full disk or
    a library that crashes will not.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and not isinstance(error, (DiskFullError, BrokenRuntimeError))


def _threads(order: Order, post: runners.Post) -> dict[str, str | None]:
    """Variants that run side by side share the cores instead of fighting for them. All else has them to itself, also on
    Dask, whose workers leave libraries one thread each: the bytes of what is trained depend on how many those are.
    """
    if order.parallel > 1:
        return dict.fromkeys(THREADS, str(max(1, cores.available() // order.parallel)))
    return dict.fromkeys(THREADS) if isinstance(post, runners.DaskPost) else {}


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by at least one span."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total

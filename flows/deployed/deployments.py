"""What a person or a schedule starts on Prefect's server: the deployments that infra/prefect.yaml names.

Each is the same run as `slmops run --worktree`. The parameters' types make the form in Prefect's UI; their values
go through params.py as those of any run do, so a wrong one is told in the same words. A flow that waits for approval
is suspended: it holds no process, and begins anew when the decision is there, which is why it finds what it did.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import yaml
from prefect import flow, get_client, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import Pause
from prefect.logging import get_run_logger
from prefect.states import Completed, Scheduled, State
from pydantic import BaseModel, Field

from flows.deployed import approval, policy
from flows.release import decisions, registration
from flows.report import results
from flows.run import artifacts, pipeline
from flows.run.stage_task import StageRun
from flows.workspace import files, locks, paths, versioning, worktrees
from flows.workspace.paths import MainCheckout, Workspace
from tasks import params
from tasks.acquire.params import AnyData, AnyModel
from tasks.errors import ConfigError
from tasks.quantize.params import VariantName
from tasks.schema import Seed, Share
from tasks.stages import STAGES
from tasks.validate.params import Gate

LOOK_S = 60  # from one look of a waiting run to the next

Settings = Annotated[dict[str, Any] | None, Field(examples=[{"finetune.epochs": 0.5}])]
Commit = Annotated[str, Field(pattern=r"^\w[\w./-]*$")]
Overlap = Literal["wait", "refuse"]
Variants = Annotated[list[VariantName] | None, Field(examples=[["q8_0", "q4_0"]])]
Gates = list[Gate] | None


class Budget(BaseModel):
    """What training may spend, and how large the student may be."""

    finetune_epochs: float | None = Field(None, gt=0, description="passes of the teacher over the training rows")
    distill_epochs: float | None = Field(None, gt=0, description="passes of the student over what the teacher answered")
    seeds: list[Seed] | None = Field(None, min_length=1, description="one student each; the best one goes on")
    max_parameters: Share | None = Field(None, description="the student's, as a share of the teacher's")


BUDGET = {
    "finetune_epochs": "finetune.epochs",
    "distill_epochs": "distill.epochs",
    "seeds": "select.seeds",
    "max_parameters": "prune.max_parameters",
}


@flow(name="train-and-release", persist_result=True, validate_parameters=False)
def train_and_release(
    model: AnyModel | None = None,
    data: AnyData | None = None,
    variants: Variants = None,
    gates: Gates = None,
    budget: Budget | None = None,
    approval: Literal["manual", "auto"] | None = None,
    settings: Settings = None,
    commit: Commit = "HEAD",
    overlap: Overlap = "wait",
    by: str | None = None,
) -> str:
    """Run the whole pipeline in a worktree of its own, register what passed, and ask for approval.

    Prefect's form takes its help texts from here, as those of all deployments.

    Args:
        model: Where the open model comes from. None: as params.yaml has it.
        data: The task's data. None: as params.yaml has it.
        variants: Quantized variants to make. None: as params.yaml has it.
        gates: What a variant must hold to be registered. None: as params.yaml has it.
        budget: What training may spend. None: as params.yaml has it, and so for each of its values.
        approval: auto: released when it passed and beats the champion by release.margin. None: as params.yaml has it.
        settings: Any parameter by its dotted name, e.g. {"finetune.epochs": 0.5}. It wins over the fields above.
        commit: The commit, branch or tag to run. A branch of a remote, as origin/main, is fetched first.
        overlap: While another run works on the same model (package.name).
        by: Your name. Needed where release.separate_duties is on: who starts a run may not approve it.

    Raises:
        PipelineError: what the pipeline or the registry raised.
    """
    typed = {
        "acquire.model": model, "acquire.data": data, "quantize.variants": variants, "validate.gates": gates,
        "release.approval": approval,
    }  # fmt: skip
    spending: dict[str, Any] = dict(budget or {})  # as it came over HTTP: params.py checks it
    spending = {BUDGET.get(key, f"budget.{key}"): value for key, value in spending.items()}
    main, name = _here()
    if paths.finished(paths.worktree(main, name)).exists():
        return _resume(main, name)
    overrides = _overrides(typed | spending | (settings or {}))
    planned = _planned(main, name, commit, overrides)
    if planned.params.release.separate_duties and not by:
        raise ConfigError("release.separate_duties is on: say who starts this run (by), and may not approve it")
    with _model(main, planned.params, name, overlap), _worktree(main, name, commit, planned) as place:
        return _run(main, place, name, planned.params, by)


@flow(name="retrain-scheduled", persist_result=True, validate_parameters=False)
def retrain_scheduled(settings: Settings = None, commit: Commit = "HEAD", overlap: Overlap = "refuse") -> str | State:
    """Run the pipeline as `train-and-release` does, if data, parameters or code are not those of the last finished run
    of this model. If they are, or if another run works on this model, the run ends as `Skipped`, with the reason.

    What counts is the commit, as for every run in a worktree. Data that no commit holds is seen at once where
    `acquire.watch` is an absolute path.

    Args:
        settings: Any parameter by its dotted name, e.g. {"finetune.epochs": 0.5}.
        commit: The commit, branch or tag to run. A branch of a remote, as origin/main, is fetched first.
        overlap: While another run works on the same model (package.name).

    Raises:
        PipelineError: what the pipeline or the registry raised.
    """
    main, name = _here()
    if paths.finished(paths.worktree(main, name)).exists():
        return _resume(main, name)
    overrides = _overrides(settings or {})
    planned = _planned(main, name, commit, overrides)
    try:
        with _model(main, planned.params, name, overlap), _worktree(main, name, commit, planned) as place:
            reason = _unchanged(main, place, planned.params.package.name)
            if reason is None:
                return _run(main, place, name, planned.params)
        worktrees.discard(main, name, branch=True)
    except locks.Busy as error:
        reason = str(error)
    create_markdown_artifact(f"Skipped: {reason}", key="skipped", description=f"Why run {name} did nothing")
    return Completed(name="Skipped", message=reason)


@flow(name="validate-only", persist_result=True, validate_parameters=False)
def validate_only(
    run: Annotated[str, Field(pattern=r"^\w[\w.-]*$")],
    variants: Variants = None,
    gates: Gates = None,
) -> str:
    """Validate the variants that a finished run made, with its own code and data, and train nothing. With other gates alone,
    what was measured is judged anew, and no model runs.

    Args:
        run: The finished run whose files to validate.
        variants: Those of its variants. None: as its params.yaml has it.
        gates: What a variant must hold. None: as its params.yaml has it.

    Raises:
        ConfigError: there is no such run, or it made no such variant.
        PipelineError: the cache lacks its files, or the validation failed.
    """
    main, name = _here()
    known = worktrees.finished(main)
    if run not in known:
        raise ConfigError(f"there is no finished run {run}: name one of {', '.join(known) or '(none yet)'}")
    if "measure" not in yaml.safe_load(worktrees.git(main, "show", f"runs/{run}:dvc.yaml"))["stages"]:
        raise ConfigError(f"run {run} is of a version that validated and measured in one: run its commit again instead")
    overrides = _overrides({"quantize.variants": variants, "validate.gates": gates})
    planned = worktrees.planned(main, name, f"runs/{run}", None, overrides)
    checked = planned.params
    locks.mark()
    with _model(main, checked, name), _worktree(main, name, f"runs/{run}", planned) as place:
        chosen = checked.quantize.variants
        made = ["acquire", "select", "convert", *(versioning.address("quantize", each) for each in chosen)]
        if pulled := versioning.restore(place, *made):
            approval.logged(pulled)
        with pipeline.opened(place, name, checked) as monitor, monitor:
            keys = [
                (stage, item) for stage in ("validate", "measure", "judge") for item in STAGES[stage].items(checked)
            ]
            for stage, item in keys:
                pipeline.one(monitor, StageRun(place, name, stage, item, up_to_date=False), checked.machine.retries)
        monitor.tracker.close("FINISHED", {"slmops.validated": run}, {}, ())
        approval.logged(versioning.push(place, *(versioning.address(stage, *item.words) for stage, item in keys)))
        table = results.markdown(results.rows(place, checked, packaged=False))
        create_markdown_artifact(table, key="result", description=f"Validation of run {run}")
        commit = worktrees.finish(place, name, f"Validate {run}\n\n{table}")
    worktrees.retire(main, checked.machine.keep_runs)
    return f"validated {', '.join(chosen)} of run {run}: commit {commit[:12]} on branch runs/{name}"


@flow(name="rollback", persist_result=True)
def rollback(
    model: str,
    by: Annotated[str, Field(min_length=1)],
    reason: Annotated[str, Field(min_length=1)],
) -> str:
    """Make the previous champion champion again.

    Args:
        model: Name of the registered model.
        by: Who decides.
        reason: Why.

    Raises:
        PipelineError: there is none, or the registry refused.
    """
    return approval.logged(decisions.rollback(_here()[0], model, by, reason))


@flow(name="expire-approvals", persist_result=True)
def expire_approvals() -> str:
    """Record as rejected what nobody decided on in time, and have runs that crashed while they waited ask again. That such
    a run failed, as Prefect has it when its time is over, or crashed starts this one.

    Raises:
        PipelineError: the registry or its record cannot be written.
    """
    return approval.logged("; ".join(approval.expire(_here()[0])) or "no question has expired")


def _here() -> tuple[MainCheckout, str]:
    """The main checkout, and a name for this run's worktree: the flow run's own, unless another run has had that name. From
    now on the run's page tells our errors as sentences.
    """
    artifacts.plain_errors()
    main = worktrees.main_root(worktrees.find(Path()))
    worktrees.check_commit(paths.own_workspace(main))
    name, own = str(runtime.flow_run.name), str(runtime.flow_run.id)
    worktrees.check_name(name)
    owner = paths.owner(paths.worktree(main, name))
    ours = owner.exists() and owner.read_text() == own
    taken = worktrees.git(main, "branch", "--list", f"runs/{name}") and not ours
    return main, f"{name}-{own[:8]}" if taken else name


@contextmanager
def _worktree(main: MainCheckout, name: str, commit: str, planned: worktrees.Effective) -> Iterator[Workspace]:
    with worktrees.worktree(main, name, commit, planned) as place:
        files.write(paths.owner(place), str(runtime.flow_run.id))
        yield place


def _overrides(chosen: dict[str, Any]) -> list[str]:
    """As `--set` takes them. A value is data here as it is in params.yaml, never a command."""
    return [params.override(key, value) for key, value in chosen.items() if value is not None]


def _planned(main: MainCheckout, name: str, commit: str, overrides: list[str]) -> worktrees.Effective:
    """The parameters that a run will have.

    Raises:
        ConfigError: they are wrong, or change what only a commit may.
    """
    worktrees.fetch(main, commit)
    committed = worktrees.planned(main, name, commit, None, []).params
    planned = worktrees.planned(main, name, commit, None, overrides)
    policy.check(main, commit, planned.params)
    watch = planned.params.acquire.watch
    if watch.is_absolute() and watch != committed.acquire.watch:
        raise ConfigError(
            f"acquire.watch: {watch} lies outside the workspace, and only params.yaml may name such a place"
        )
    return planned


@contextmanager
def _model(main: MainCheckout, planned: params.Params, name: str, overlap: Overlap = "wait") -> Iterator[None]:
    """Hold the model that a run will work on. While another run has it, this one is refused, or is to begin anew in a minute:
    meanwhile it holds no process, and no place at the worker that an approval or a rollback may need.

    Raises:
        Busy: another run holds it, and `overlap` is "refuse".
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.one_at_a_time(main, planned.package.name, name))
        except locks.Busy as busy:
            if overlap == "refuse":
                raise
            approval.logged(f"{busy}; this run looks again every {LOOK_S} s")
            again = Scheduled(
                name="Waiting", message=str(busy), scheduled_time=datetime.now(UTC) + timedelta(seconds=LOOK_S)
            )
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(UUID(runtime.flow_run.id), again)
            raise Pause(str(busy), state=again) from None  # Prefect's signal of a run that ends to be started again
        yield


def _unchanged(main: MainCheckout, place: Workspace, model: str) -> str | None:
    """Why a run in the worktree `place` would make nothing new; None if it might."""
    for last in worktrees.finished(main):
        if yaml.safe_load(worktrees.git(main, "show", f"runs/{last}:params.yaml"))["package"]["name"] == model:
            changed = versioning.changed_since(place, worktrees.git(main, "show", f"runs/{last}:dvc.lock") + "\n")
            if changed:
                approval.logged(f"changed since run {last}: {', '.join(changed)}")
                return None
            commit = worktrees.git(place, "rev-parse", "--short=12", "HEAD")
            waiting = worktrees.uncommitted(main)
            note = f"; not in that commit, so not looked at: {', '.join(waiting)}" if waiting else ""
            return f"data, model, parameters and code of commit {commit} are those of run {last}{note}"
    approval.logged(f"no run of {model} has finished yet")
    return None


def _run(main: MainCheckout, place: Workspace, name: str, checked: params.Params, by: str | None = None) -> str:
    """The pipeline in a worktree, up to its commit; then what comes of it."""
    if waiting := worktrees.uncommitted(main):
        get_run_logger().warning(
            "not in the commit that this run starts from, so not seen by it: %s", ", ".join(waiting)
        )
    locks.mark()
    result = pipeline.run(place, name, checked, by)
    artifacts.show(place, name, result.rows, result.said)
    pushed = versioning.push(place)  # before the run counts as finished, so that one that could not is taken up again
    commit = worktrees.finish(place, name, f"Run {name}\n\n{result.said}")
    saved = approval.logged(f"commit {commit[:12]} on branch runs/{name}; {pushed}")
    create_markdown_artifact(saved, key="saved", description="Where what this run made is kept")
    worktrees.retire(main, checked.machine.keep_runs)
    return approval.released(main, place, checked, result.version, result.said)


def _resume(main: MainCheckout, name: str) -> str:
    root = paths.worktree(main, name)
    with locks.locked(root, name):
        checked = params.load(paths.params_file(root))
        version, said = registration.registered(root, main)
        return approval.released(main, root, checked, version, said)

"""What a person or a schedule starts on Prefect's server: the deployments that infra/prefect.yaml names.

Each is the same run as `slmops run --worktree`. The parameters' types make the form in Prefect's UI; their values
go through params.py as those of any run do, so a wrong one is told in the same words. A flow that waits for approval
is suspended: it holds no process, and begins anew when the decision is there, which is why it finds what it did.
"""

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from prefect import flow, get_client, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.states import Completed, State
from pydantic import Field

from flows import automations, pages, pipeline, release, results, versioning, workspace
from tasks import params
from tasks.errors import ArtifactError, ConfigError, StageError

FILE = Path("infra") / "prefect.yaml"

Settings = Annotated[dict[str, Any] | None, Field(examples=[{"finetune.epochs": 0.5}])]
Commit = Annotated[str, Field(pattern=r"^\w[\w./-]*$")]
Overlap = Literal["wait", "refuse"]
Variants = Annotated[list[params.Variant] | None, Field(examples=[["q8_0", "q4_0"]])]
Gates = list[params.Gate] | None


class Decision(RunInput):
    """The approval form."""

    decision: Literal["approve", "reject"] = Field(description="approve: it becomes the champion")
    name: str = Field(title="Your name", description="kept in the history, as is the reason", min_length=1)
    reason: str = Field(min_length=1)
    even_if_worse: bool = Field(False, description="approve it although the champion is more accurate")
    even_if_rejected: bool = Field(False, description="approve it although it was rejected before")


def apply(root: Path) -> list[str]:
    """Bring the server's deployments in step with infra/prefect.yaml; returns their names. None where it is missing.

    Raises:
        ConfigError: Prefect refuses the file.
    """
    if not (root / FILE).is_file():
        return []
    root = root.resolve()
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE)]
    env = {**os.environ, "SLMOPS_ROOT": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ConfigError(f"{root / FILE} was refused: {' '.join(lines[-3:])}")
    automations.apply(root)
    written = yaml.safe_load((root / FILE).read_bytes())["deployments"]
    _end_schedules({(each["name"], each["entrypoint"]) for each in written if not each.get("schedules")})
    return [each["name"] for each in written]


def _end_schedules(names: set[tuple[str, str | None]]) -> None:
    """Remove what schedules the server still has for deployments without any: `prefect deploy` leaves them alone."""
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            for schedule in deployment.schedules if (deployment.name, deployment.entrypoint) in names else ():
                client.delete_deployment_schedule(deployment.id, schedule.id)


@flow(name="train-and-release", persist_result=True, validate_parameters=False)
def train_and_release(
    model: params.PackageModel | params.GgufModel | params.LocalModel | params.HubModel | None = None,
    data: params.LocalData | params.HubData | None = None,
    variants: Variants = None,
    gates: Gates = None,
    approval: Literal["manual", "auto"] | None = None,
    settings: Settings = None,
    commit: Commit = "HEAD",
    overlap: Overlap = "wait",
) -> str:
    """Run the whole pipeline in a worktree of its own, register what passed, and ask for approval.

    Prefect's form takes its help texts from here, as those of all deployments.

    Args:
        model: Where the open model comes from. None: as params.yaml has it.
        data: The task's data. None: as params.yaml has it.
        variants: Quantized variants to make. None: as params.yaml has it.
        gates: What a variant must hold to be registered. None: as params.yaml has it.
        approval: auto: released when it passed and is no worse than the champion. None: as params.yaml has it.
        settings: Any other parameter by its dotted name, e.g. {"finetune.epochs": 0.5}.
        commit: The commit, branch or tag to run.
        overlap: While another run works on the same model (package.name).

    Raises:
        PipelineError: what the pipeline or the registry raised.
    """
    chosen = {
        "acquire.model": model, "acquire.data": data, "quantize.variants": variants, "validate.gates": gates,
        "release.approval": approval, **(settings or {}),
    }  # fmt: skip
    main, name = _here()
    if (main / ".runs" / name / workspace.FINISHED).exists():
        return _resume(main, name)
    overrides = _overrides(chosen)
    held = _model(main, name, commit, overrides, overlap)
    with held, workspace.worktree(main, name, commit, None, overrides) as place:
        return _run(main, place, name)


@flow(name="retrain-scheduled", persist_result=True, validate_parameters=False)
def retrain_scheduled(settings: Settings = None, commit: Commit = "HEAD", overlap: Overlap = "refuse") -> str | State:
    """Run the pipeline as `train-and-release` does, if data, parameters or code are not those of the last finished run
    of this model. If they are, or if another run works on this model, the run ends as `Skipped`, with the reason.

    What counts is the commit, as for every run in a worktree. Data that no commit holds is seen at once where
    `acquire.watch` is an absolute path.

    Args:
        settings: Any parameter by its dotted name, e.g. {"finetune.epochs": 0.5}.
        commit: The commit, branch or tag to run.
        overlap: While another run works on the same model (package.name).

    Raises:
        PipelineError: what the pipeline or the registry raised.
    """
    main, name = _here()
    if (main / ".runs" / name / workspace.FINISHED).exists():
        return _resume(main, name)
    overrides = _overrides(settings or {})
    try:
        held = _model(main, name, commit, overrides, overlap)
        with held, workspace.worktree(main, name, commit, None, overrides) as place:
            reason = _unchanged(main, place)
            if reason is None:
                return _run(main, place, name)
        workspace.discard(main, name, branch=True)
    except workspace.Busy as error:
        reason = str(error)
    create_markdown_artifact(f"Skipped: {reason}", key="skipped", description=f"Why run {name} did nothing")
    return Completed(name="Skipped", message=reason)


@flow(name="validate-only", persist_result=True, validate_parameters=False)
def validate_only(
    run: Annotated[str, Field(pattern=r"^\w[\w.-]*$")],
    variants: Variants = None,
    gates: Gates = None,
) -> str:
    """Validate the variants that a finished run made, with its own code and data, and train nothing.

    Args:
        run: The finished run whose files to validate.
        variants: Those of its variants. None: as its params.yaml has it.
        gates: What a variant must hold. None: as its params.yaml has it.

    Raises:
        ConfigError: there is no such run, or it made no such variant.
        PipelineError: the cache lacks its files, or the validation failed.
    """
    main, name = _here()
    known = workspace.finished(main)
    if run not in known:
        raise ConfigError(f"there is no finished run {run}: name one of {', '.join(known) or '(none yet)'}")
    overrides = _overrides({"quantize.variants": variants, "validate.gates": gates})
    workspace.mark()
    with workspace.worktree(main, name, f"runs/{run}", None, overrides) as place:
        checked = params.load(place / "params.yaml")
        chosen = checked.quantize.variants
        needed = ["acquire", "distill", "convert", *(versioning.address("quantize", each) for each in chosen)]
        try:
            versioning.checkout(place, *needed)
        except StageError as error:
            raise ArtifactError(
                f"the files of run {run} are not in the cache: `git checkout runs/{run}` and `dvc pull` bring them ({error})"
            ) from None
        for variant in chosen:
            _validate(place, name, variant)
        table = results.markdown(results.rows(place, checked, packaged=False))
        create_markdown_artifact(table, key="result", description=f"Validation of run {run}")
        commit = workspace.finish(place, name, f"Validate {run}\n\n{table}")
    workspace.retire(main, checked.machine.keep_runs)
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
    return _told(release.rollback(_here()[0], model, by, reason))


@flow(name="expire-approvals", persist_result=True)
def expire_approvals() -> str:
    """Record as rejected what nobody decided on in time. Prefect fails a suspended run then, and that starts this one.

    Raises:
        PipelineError: the registry or its record cannot be written.
    """
    return _told("; ".join(release.expire(_here()[0])) or "no question has expired")


@task(name="validate", task_run_name="validate-{variant}", cache_policy=NO_CACHE, persist_result=False)
def _validate(place: Path, name: str, variant: str) -> None:
    log = place / ".runs" / "logs" / name / f"validate-{variant}.log"
    with workspace.joined(place, f"validate-{variant}") as locks:
        versioning.repro(place, "validate", variant, log=log, keep_open=locks)


def _here() -> tuple[Path, str]:
    """The main checkout, and the name of this run, whose page tells our errors as sentences from now on."""
    pages.plain_errors()
    return workspace.main_root(workspace.find(Path())), str(runtime.flow_run.name)


def _told(text: str) -> str:
    get_run_logger().info("%s", text)
    return text


def _overrides(chosen: dict[str, Any]) -> list[str]:
    """JSON is YAML, so a value is data here as it is in params.yaml, never a command."""
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]


def _model(
    main: Path, name: str, commit: str, overrides: list[str], overlap: Literal["wait", "refuse"]
) -> AbstractContextManager[None]:
    """The lock of the model that a run will work on."""
    _, planned = workspace.planned(main, name, commit, None, overrides)
    tell = get_run_logger().info
    return workspace.one_at_a_time(main, planned.package.name, name, wait=overlap == "wait", tell=tell)


def _unchanged(main: Path, place: Path) -> str | None:
    """Why a run in the worktree `place` would make nothing new; None if it might."""
    model = params.load(place / "params.yaml").package.name
    for last in workspace.finished(main):
        if yaml.safe_load(workspace.git(main, "show", f"runs/{last}:params.yaml"))["package"]["name"] == model:
            changed = versioning.changed_since(place, workspace.git(main, "show", f"runs/{last}:dvc.lock") + "\n")
            if changed:
                _told(f"changed since run {last}: {', '.join(changed)}")
                return None
            commit = workspace.git(place, "rev-parse", "--short=12", "HEAD")
            waiting = workspace.uncommitted(main)
            note = f"; not in that commit, so not looked at: {', '.join(waiting)}" if waiting else ""
            return f"data, model, parameters and code of commit {commit} are those of run {last}{note}"
    _told(f"no run of {model} has finished yet")
    return None


def _run(main: Path, place: Path, name: str) -> str:
    """The pipeline in a worktree, up to its commit; then what comes of it."""
    workspace.mark()
    result = pipeline.run(place, name)
    pages.show(place, name, result.rows, result.registered)
    pushed = versioning.push(place)  # before the run counts as finished, so that one that could not is taken up again
    commit = workspace.finish(place, name, f"Run {name}\n\n{result.registered}")
    told = _told(f"commit {commit[:12]} on branch runs/{name}; {pushed}")
    create_markdown_artifact(told, key="saved", description="Where what this run made is kept")
    workspace.retire(main, params.load(place / "params.yaml").machine.keep_runs)
    return _released(main, place)


def _resume(main: Path, name: str) -> str:
    root = main / ".runs" / name
    with workspace.locked(root, name):
        return _released(main, root)


def _released(main: Path, root: Path) -> str:
    """Register what a finished run made, and release it as the policy says; one line for a person."""
    policy = params.load(root / "params.yaml").release
    registered, said = release.register_if_passed(root, main)
    if registered is None:
        return _told(said)
    if policy.approval == "auto":
        return _told(release.auto_approve(main, registered.name, registered.version, policy.margin))
    asked = root / workspace.QUESTION
    if not asked.exists():
        release.ask(main, registered, policy.expires_hours, asked)
    shown = json.loads(asked.read_bytes())
    form = Decision.with_initial_data(description=f"{pages.links(root)}\n\n{shown['text']}")
    left = datetime.fromisoformat(shown["expires"]) - datetime.now(UTC)
    answer = suspend_flow_run(wait_for_input=form, timeout=max(1, int(left.total_seconds())), key="approval")
    if answer.decision == "reject":
        told = release.reject(main, registered.name, registered.version, answer.name, answer.reason)
    else:
        starter = release.started_by(main, registered.name, registered.version) if policy.separate_duties else None
        told = release.approve(
            main, registered.name, registered.version, answer.name, answer.reason,
            digest=shown["digest"], expected_champion=shown["champion"], forbid=starter,
            even_if_worse=answer.even_if_worse, even_if_rejected=answer.even_if_rejected,
        )  # fmt: skip
    asked.unlink(missing_ok=True)
    return _told(told)

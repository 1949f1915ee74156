"""What a person or a schedule starts on Prefect's server: the deployments that infra/prefect.yaml names.

Each is the same run as `slmops run --worktree`. The parameters' types make the form in Prefect's UI; their values
go through params.py as those of any run do, so a wrong one is told in the same words. A flow that waits for approval
is suspended: it holds no process, and begins anew when the decision is there, which is why it finds what it did.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow, runtime
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from flows import automations, pages, pipeline, release, versioning, workspace
from tasks import params
from tasks.errors import ConfigError

FILE = Path("infra") / "prefect.yaml"
ASKED = Path(".runs") / "asked.json"  # in a run's worktree: what the approval form showed


class Decision(RunInput):
    """The approval form."""

    decision: Literal["approve", "reject"] = Field(description="approve: it becomes the champion")
    name: str = Field(title="Your name", description="kept in the history, as is the reason", min_length=1)
    reason: str = Field(min_length=1)
    even_if_worse: bool = Field(False, description="approve it although the champion is more accurate")


def apply(root: Path) -> list[str]:
    """Bring the server's deployments in step with infra/prefect.yaml, and its automations; returns the names of the
    deployments. None where the file is missing.

    Raises:
        ConfigError: Prefect refuses the file.
    """
    if not (root / FILE).is_file():
        return []
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE)]
    env = {**os.environ, "SLMOPS_ROOT": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ConfigError(f"{root / FILE} was refused: {' '.join(lines[-3:])}")
    automations.apply(root)
    import yaml

    return [each["name"] for each in yaml.safe_load((root / FILE).read_bytes())["deployments"]]


@flow(name="train-and-release", persist_result=True, validate_parameters=False)
def train_and_release(
    model: params.PackageModel | params.GgufModel | params.LocalModel | params.HubModel | None = None,
    data: params.LocalData | params.HubData | None = None,
    variants: Annotated[list[params.Variant] | None, Field(examples=[["q8_0", "q4_0"]])] = None,
    gates: list[params.Gate] | None = None,
    approval: Literal["manual", "auto"] | None = None,
    settings: Annotated[dict[str, Any] | None, Field(examples=[{"finetune.epochs": 0.5}])] = None,
    commit: Annotated[str, Field(pattern=r"^[\w./-]+$")] = "HEAD",
) -> str:
    """Run the whole pipeline in a worktree of its own, register what passed, and ask for approval.

    Prefect's form takes its help texts from here.

    Args:
        model: Where the open model comes from. None: as params.yaml has it.
        data: The task's data. None: as params.yaml has it.
        variants: Quantized variants to make. None: as params.yaml has it.
        gates: What a variant must hold to be registered. None: as params.yaml has it.
        approval: auto: released when it passed and is no worse than the champion. None: as params.yaml has it.
        settings: Any other parameter by its dotted name, e.g. {"finetune.epochs": 0.5}.
        commit: The commit, branch or tag to run.

    Raises:
        PipelineError: what the pipeline or the registry raised.
    """
    pages.plain_errors()
    main = workspace.main_root(workspace.find(Path()))
    name = str(runtime.flow_run.name)
    root = main / ".runs" / name
    if not (root / workspace.FINISHED).exists():
        chosen = {
            "acquire.model": model, "acquire.data": data, "quantize.variants": variants, "validate.gates": gates,
            "release.approval": approval, **(settings or {}),
        }  # fmt: skip
        # JSON is YAML, so a value is data here as it is in params.yaml, never a command.
        overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
        workspace.mark()
        with workspace.worktree(main, name, commit, None, overrides) as place:
            result = pipeline.run(place, name)
            pages.show(place, name, result.rows, result.registered)
            workspace.finish(place, name, f"Run {name}\n\n{result.registered}")
            print(versioning.push(place))
    return _released(main, root)


@flow(name="rollback", persist_result=True)
def rollback(
    model: str,
    name: Annotated[str, Field(min_length=1)],
    reason: Annotated[str, Field(min_length=1)],
) -> str:
    """Make the previous champion champion again.

    Args:
        model: Name of the registered model.
        name: Who decides.
        reason: Why.
    """
    pages.plain_errors()
    return release.rollback(workspace.main_root(workspace.find(Path())), model, name, reason)


def _released(main: Path, root: Path) -> str:
    """Register what a finished run made, and release it as the policy says; one line for a person."""
    policy = params.load(root / "params.yaml").release
    registered, said = release.register_if_passed(root, main)
    if registered is None:
        return said
    if policy.approval == "auto":
        return release.auto_approve(main, registered.name, registered.version, policy.margin)
    asked = root / ASKED
    if not asked.exists():
        seen = release.compare(main, registered.name, registered.version)
        asked.write_text(
            json.dumps({"digest": seen.digest, "champion": seen.champion, "text": seen.markdown(registered.name)})
        )
    shown = json.loads(asked.read_bytes())
    form = Decision.with_initial_data(description=f"{pages.links(root)}\n\n{shown['text']}")
    answer = suspend_flow_run(wait_for_input=form, timeout=int(policy.expires_hours * 3600), key="approval")
    if answer.decision == "reject":
        return release.reject(main, registered.name, registered.version, answer.name, answer.reason)
    forbidden = release.started_by(main, registered.name, registered.version) if policy.separate_duties else None
    return release.approve(
        main, registered.name, registered.version, answer.name, answer.reason,
        digest=shown["digest"], expected_champion=shown["champion"], forbid=forbidden, even_if_worse=answer.even_if_worse,
    )  # fmt: skip

"""Where things lie. Two kinds of folder, each with a type of its own, so that one is never taken for the other.

`MainCheckout` is the git checkout that all runs of it share: there lie the registry's bundles, MLflow's database, the
worktrees and what servers write. `Workspace` is where one run works: that checkout itself, or a worktree under its `.runs/`.
"""

from pathlib import Path
from typing import NewType

MainCheckout = NewType("MainCheckout", Path)
Workspace = NewType("Workspace", Path)

RUNS = ".runs"
# What lies in `.runs/` of a main checkout beside worktrees, whose names these cannot be.
RESERVED = ("lock", "logs", "models", "prune.lock", "servers", "servers.json", "spool")


# --- in a workspace --------------------------------------------------------------------------------


def params_file(root: Workspace) -> Path:
    return root / "params.yaml"


def dvc_lock(root: Workspace) -> Path:
    return root / "dvc.lock"


def report(root: Workspace) -> Path:
    return root / "report.html"


def certificate(root: Workspace) -> Path:
    """The folder of the certificate."""
    return root / "certificate"


def run_lock(root: Workspace) -> Path:
    """Held by the run that works here, and by its stages."""
    return root / RUNS / "lock"


def stage_lock(root: Workspace, stage: str) -> Path:
    return root / RUNS / "logs" / f"{stage}.lock"


def stage_log(root: Workspace, run: str, stage: str) -> Path:
    return root / RUNS / "logs" / run / f"{stage}.log"


def finished(root: Workspace) -> Path:
    """There when the run of a worktree came to its end."""
    return root / RUNS / "finished.json"


def question(root: Workspace) -> Path:
    """There while someone is asked to approve what the run of a worktree registered."""
    return root / RUNS / "question.json"


def owner(root: Workspace) -> Path:
    """The flow run that a worktree is of."""
    return root / RUNS / "owner"


# --- in the main checkout --------------------------------------------------------------------------


def own_workspace(main: MainCheckout) -> Workspace:
    """The main checkout as the place of a run without a worktree."""
    return Workspace(main)


def worktree(main: MainCheckout, name: str) -> Workspace:
    """Where the run of that name works, if it is in a worktree."""
    return Workspace(main / RUNS / name)


def worktrees(main: MainCheckout) -> list[Workspace]:
    """Those that are there, finished or not."""
    return [Workspace(file.parent) for file in sorted((main / RUNS).glob("*/params.yaml"))]


def questions(main: MainCheckout) -> list[Path]:
    """The open questions for approval of all worktrees."""
    return sorted((main / RUNS).glob(f"*/{RUNS}/question.json"))


def model_lock(main: MainCheckout, model: str) -> Path:
    """Held by the run that works on the registered model."""
    return main / RUNS / "models" / model


def prune_lock(main: MainCheckout) -> Path:
    return main / RUNS / "prune.lock"


def spools(main: MainCheckout) -> Path:
    """What MLflow is still to be told, a folder a run."""
    return main / RUNS / "spool"


def servers(main: MainCheckout) -> Path:
    """What `slmops up` keeps."""
    return main / RUNS / "servers"


def servers_state(main: MainCheckout) -> Path:
    return main / RUNS / "servers.json"


def server_logs(main: MainCheckout) -> Path:
    return main / RUNS / "logs" / "servers"


def registry(main: MainCheckout) -> Path:
    """The bundles of registered versions."""
    return main / "registry"


def history(main: MainCheckout) -> Path:
    """The record of decisions."""
    return registry(main) / "history.jsonl"


def registry_lock(main: MainCheckout) -> Path:
    return registry(main) / ".lock"


def mlflow_database(main: MainCheckout) -> Path:
    return main / "mlflow.db"


def mlflow_artifacts(main: MainCheckout) -> Path:
    return main / "mlruns"

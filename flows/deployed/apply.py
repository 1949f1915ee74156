"""Bring Prefect's server in step with the files of `infra/`: deployments, schedules, work pools, automations."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import yaml
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists

from flows.deployed import automations
from flows.servers import prefect_api
from flows.workspace.paths import Workspace
from tasks.errors import ConfigError

FILE = Path("infra") / "prefect.yaml"


def apply(root: Workspace, place: Path, runs: int | None = None) -> list[str]:
    """Bring the server's deployments in step with infra/prefect.yaml, and its automations with theirs; returns the
    deployments' names, none where the file is missing. A work pool that the server lacks is made, one of processes.
    `place`: where the workers find the checkout. `runs`: at work at once in a pool, kept by the server. (A worker's own
    `--limit` forgets what runs when it is restarted, and ends it when a run is resumed before its old process has ended.)

    Raises:
        ConfigError: Prefect refuses the file, or its server wants a password.
        StageError: its server does not answer.
    """
    if not (root / FILE).is_file():
        return []
    prefect_api.started()()
    written = yaml.safe_load((root / FILE).read_bytes())["deployments"]
    with get_client(sync_client=True) as client:
        known = {pool.name for pool in client.read_work_pools()}
        wanted = {each["work_pool"]["name"] for each in written}
        for pool in wanted - known:
            with suppress(ObjectAlreadyExists):  # two may deploy at once
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        for pool in wanted if runs else ():
            client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=runs))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE)]
    env = {**os.environ, "SLMOPS_ROOT": str(place.absolute())}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ConfigError(f"{root / FILE} was refused: {' '.join(lines[-3:])}")
    automations.apply(root)
    _end_schedules({(each["name"], each["entrypoint"]) for each in written if not each.get("schedules")})
    return [each["name"] for each in written]


def _end_schedules(names: set[tuple[str, str | None]]) -> None:
    """Remove what schedules the server still has for deployments without any: `prefect deploy` leaves them alone."""
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            for schedule in deployment.schedules if (deployment.name, deployment.entrypoint) in names else ():
                client.delete_deployment_schedule(deployment.id, schedule.id)

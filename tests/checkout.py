"""A checkout of the project in a temporary folder: its own params and data, git history, DVC, and the stages."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tasks.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ROOT / "tests" / "params.yaml"
SLMOPS = Path(sys.executable).with_name("slmops")
WAIT_S, ASK_S = 300.0, 1200.0  # where other work has all the cores
FILES = ("dvc.yaml", ".dvcignore", ".gitattributes", ".gitignore", "constraints.txt")

TOYS = ROOT / "tests" / "toys"
PROFILES = ROOT / "tests" / "profiles"


@functools.cache
def _servers() -> tempfile.TemporaryDirectory[str]:
    """Databases of Prefect and MLflow with their tables, made once a session: it takes seconds."""
    return tempfile.TemporaryDirectory(prefix="slmops-tests-")


@functools.cache
def empty_store() -> Path:
    """An MLflow database without runs, to be copied."""
    from flows.tracking import mlflow_store

    folder = Path(_servers().name)
    mlflow_store.client(folder).search_experiments()
    return folder / "mlflow.db"


@functools.cache
def prefect_server() -> str:
    """The address of one Prefect server for the session: each run would otherwise start one of its own."""
    port, _ = free_ports()
    log = (Path(_servers().name) / "prefect.log").open("wb")
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    process = subprocess.Popen(command, env=environment(Path(), PREFECT_UI_ENABLED="0"), stdout=log, stderr=log)
    atexit.register(process.terminate)
    address = f"http://127.0.0.1:{port}/api"
    wait_for(lambda: answers(f"{address}/health") or process.poll() is not None, "Prefect's server to answer")
    assert process.poll() is None, "Prefect's server ended"
    return address


def free_ports() -> tuple[int, int]:
    """Two ports that nobody uses."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def answers(url: str) -> bool:
    """Does a server answer there?"""
    try:
        urllib.request.urlopen(url, timeout=5).close()
        return True
    except OSError:
        return False


def ask(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """The answer to a GET, or to a POST of `body`. 503: the server's database is busy, so ask again, as clients do."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    deadline = time.monotonic() + ASK_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=ASK_S) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def wait_for(happened: Callable[[], Any], told: object = "", seconds: float = WAIT_S) -> Any:
    """What `happened` gives as soon as that is something. `told` (called, if it can be) says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s: {told() if callable(told) else told}")
        time.sleep(0.2)
    return found


def git(root: Path, *arguments: str) -> str:
    """Output of a git command, with a committer."""
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def make(root: Path, params: Mapping[str, object]) -> Path:
    """Everything that a run reads, committed: our code and pipeline, these params, and the data already there."""
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("tasks", "infra"):
        shutil.copytree(ROOT / name, root / name, ignore=skip)
    shutil.copytree(PROFILES, root / "profiles", dirs_exist_ok=True)
    (root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, root / ".dvc" / name)
    shutil.copy(empty_store(), root / "mlflow.db")
    (root / "params.yaml").write_text(yaml.safe_dump(dict(params), sort_keys=False))
    git(root, "init", "-q", "-b", "main")
    commit(root)
    return root


def make_toy(root: Path) -> Path:
    """A checkout whose stages are toys: for what is around the stages."""
    raw = yaml.safe_load(DEFAULTS.read_text())
    raw["acquire"]["data"]["path"] = "data/rows"
    raw["quantize"]["variants"] = ["q8_0", "q4_0"]
    (root / "data" / "rows").mkdir(parents=True)
    (root / "data" / "rows" / "train.jsonl").write_text("{}\n")
    make(root, raw)
    shutil.copy(TOYS / "toys.py", root / "tasks" / "toys.py")
    for stage in STAGES:
        toy = TOYS / f"{stage}.py"
        text = toy.read_text() if toy.exists() else (TOYS / "another.py").read_text().replace("another", stage)
        (root / "tasks" / stage / "stage.py").write_text(text)
    commit(root)
    return root


def commit(root: Path) -> str:
    """Commit all there is."""
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "state", "--allow-empty")
    return git(root, "rev-parse", "HEAD")


def environment(root: Path, **extra: str) -> dict[str, str]:
    """Servers and their databases apart from the person's own, toys told what to do. An empty value: it is not set."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_", "SLMOPS_"))
    }
    made = {
        **kept,
        "PREFECT_HOME": str(Path(_servers().name) / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # it writes as the server starts, and ends it if others write
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(ROOT))),  # the code beside these tests
        "TOY_LOG": str(root / "toy.log"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        **extra,
    }
    return {name: value for name, value in made.items() if value}


def slmops(root: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a checkout."""
    return subprocess.run(
        [SLMOPS, *arguments], cwd=root, env=environment(root, **extra), capture_output=True, text=True
    )


def digests(root: Path) -> dict[str, str]:
    """Every file that is not measured, of every stage: path -> sha256, as the manifests have them."""
    found = {}
    for path in sorted((root / "build").rglob("manifest.json")):
        made = json.loads(path.read_bytes())
        folder = path.parent.relative_to(root / "build").as_posix()
        found |= {f"{folder}/{name}": digest for name, digest in made["files"].items()}
    return found


def started(root: Path) -> list[str]:
    """Which toy stages were started, in order."""
    log = root / "toy.log"
    return log.read_text().splitlines() if log.exists() else []


def holding(folder: Path, text: bytes) -> list[Path]:
    """Files under a folder that hold this text; databases too. What git packs is read with git."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and text in path.read_bytes()]


def dvc_python() -> list[str]:
    """The command that calls dvc with this interpreter."""
    return [sys.executable, "-m", "dvc"]


def runs(root: Path) -> list[tuple[str, str]]:
    """Name and status of every MLflow run, oldest first."""
    from flows.tracking import mlflow_store

    store = mlflow_store.client(root)
    found = store.search_runs([mlflow_store.experiment(store, root)], order_by=["attributes.start_time ASC"])
    return [(run.data.tags["mlflow.runName"], run.info.status) for run in found]


def run_toy(root: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """`slmops run` against the one server of the session."""
    return slmops(root, "run", *arguments, PREFECT_API_URL=prefect_server(), **extra)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

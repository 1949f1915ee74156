"""The hub source, with the real client against a server on loopback; each run is a process with its own environment."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOMS, ROOT, tiny_rows, write_jsonl
from hub_server import TOKEN, Hub, serve

from tasks.frame import manifest

DEADLINE_S = 300
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"
DOWNLOAD = """
import sys
from pathlib import Path
from tasks.acquire import hub
from tasks.errors import PipelineError
try:
    found = hub.describe(sys.argv[1], sys.argv[2], "model", hub.MODEL_FILES)
    hub.download(found, found.files, Path(sys.argv[3]))
except PipelineError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def environment(url: str, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("PROXY")}
    kept |= {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    kept.pop("HF_TOKEN", None)
    return kept | {"HF_HUB_DISABLE_TELEMETRY": "1"} | extra


def download(url: str, folder: Path, repo: str = REPO, commit: str = COMMIT, **extra: str) -> str:
    """Fetch a model repository in a process of its own; returns what it said on failure, else nothing."""
    command = [sys.executable, "-c", DOWNLOAD, repo, commit, str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(url, **extra),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode == 0) == (not done.stderr.strip().startswith(("ConfigE", "Artif", "StageE"))), done.stderr
    return done.stderr if done.returncode else ""


def big(megabytes: int) -> bytes:
    return random.Random(0).randbytes(megabytes * 2**20)


def test_a_whole_run_from_the_hub(hub: Hub, tiny_params: dict, tmp_path: Path, tiny_model_folder: Path) -> None:
    model = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()}
    card = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    extra = {"README.md": card, "LICENSE": b"the text", "pytorch_model.bin": b"never", "onnx/config.json": b"{}"}
    hub.repos[REPO] = {COMMIT: model | extra}
    splits = {"train": ROOMS[:6], "validation": ROOMS[6:8], "test": ROOMS[8:]}
    files = {f"{name}.jsonl": write_jsonl(tmp_path / "d" / name, tiny_rows(rooms)) for name, rooms in splits.items()}
    rows = {name: path.read_bytes() for name, path in files.items()}
    hub.repos["datasets/someone/rows"] = {COMMIT: rows | {"README.md": b"---\nlicense: mit\n---\n"}}
    tiny_params["acquire"] |= {
        "model": {"source": "hub", "repo": REPO, "revision": COMMIT},
        "data": {"source": "hub", "repo": "someone/rows", "revision": COMMIT},
        "licences": ["Apache-2.0", "MIT"],
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    command = [sys.executable, "-m", "tasks", "acquire", "--root", str(tmp_path)]
    hub.gated = True
    env = environment(hub.url, HF_TOKEN=TOKEN)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "build" / "acquire"
    manifest.verify(out)
    lineage = yaml.safe_load((out / "lineage.json").read_text())
    assert lineage["model"]["repo"] == REPO
    assert lineage["model"]["revision"] == COMMIT
    assert lineage["model"]["licence"] == "apache-2.0"
    assert lineage["model"]["sha256"] == {"model.safetensors": manifest.sha256(tiny_model_folder / "model.safetensors")}
    assert lineage["data"]["licence"] == "mit"
    assert lineage["data"]["rows"] == {"train": 18, "validation": 6, "test": 6}
    assert (out / "LICENSE").read_text() == "the text"
    asked = {request.path for request in hub.requests}
    assert not any("pytorch_model.bin" in path or "/onnx/" in path for path in asked)
    # The token goes to the hub and never to the host that it redirects to.
    cdn = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert cdn
    assert all(request.authorization is None for request in cdn)
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in out.glob("*.json"))


def test_code_beside_a_model_that_needs_none_stays_where_it_is(
    hub: Hub, tiny_params: dict, tmp_path: Path, tiny_model_folder: Path
) -> None:
    """Phi's repositories hold code for older versions of transformers."""
    model = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()}
    config = json.loads(model["config.json"]) | {"auto_map": {"AutoConfig": "configuration_tiny.TinyConfig"}}
    code = {"configuration_tiny.py": b"raise SystemExit('ran')", "README.md": b"---\nlicense: apache-2.0\n---\n"}
    hub.repos[REPO] = {COMMIT: model | code | {"config.json": json.dumps(config).encode()}}
    strange = config | {"model_type": "nonesuch"}
    hub.repos["someone/strange"] = {COMMIT: model | code | {"config.json": json.dumps(strange).encode()}}

    def acquire(repo: str, root: Path) -> subprocess.CompletedProcess[str]:
        tiny_params["acquire"]["model"] = {"source": "hub", "repo": repo, "revision": COMMIT}
        (root / "params.yaml").write_text(yaml.safe_dump(tiny_params))
        command = [sys.executable, "-m", "tasks", "acquire", "--root", str(root)]
        return subprocess.run(
            command, cwd=ROOT, env=environment(hub.url), capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )

    done = acquire(REPO, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "auto_map" not in json.loads((tmp_path / "build" / "acquire" / "model" / "config.json").read_text())
    done = acquire("someone/strange", tmp_path)
    assert re.search(r"someone/strange@01234567 .*\(configuration_tiny\.py\)", done.stderr)
    assert not any(request.path.endswith(".py") for request in hub.requests)


def test_a_dropped_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    data = big(24)
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}", "model.safetensors": data}}
    hub.drops["model.safetensors"] = [15 * 2**20]
    assert download(hub.url, tmp_path) == ""
    assert (tmp_path / "model.safetensors").read_bytes() == data
    ranges = [request.range for request in hub.asked("model.safetensors")]
    assert ranges[0] is None
    assert ranges[-1] == f"bytes={10 * 2**20}-"  # the client stores chunks of 10 MiB


def test_a_killed_download_is_taken_up_by_the_next_run(hub: Hub, tmp_path: Path) -> None:
    data = big(48)
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}", "model.safetensors": data}}
    hub.stall = "model.safetensors"
    command = [sys.executable, "-c", DOWNLOAD, REPO, COMMIT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(hub.url)) as process:
        assert hub.stalled.wait(DEADLINE_S)
        # Half was sent; wait until the client has stored the two whole chunks of it.
        part = tmp_path / "model.safetensors.part"
        deadline = time.monotonic() + DEADLINE_S
        while part.stat().st_size < 20 * 2**20:
            assert time.monotonic() < deadline, "the client stores nothing"
        process.send_signal(signal.SIGKILL)
    hub.resume.set()
    assert not (tmp_path / "model.safetensors").exists()
    before = len(hub.asked("config.json"))
    assert download(hub.url, tmp_path) == ""
    assert (tmp_path / "model.safetensors").read_bytes() == data
    assert hub.asked("model.safetensors")[-1].range == f"bytes={20 * 2**20}-"
    assert len(hub.asked("config.json")) == before, "a complete file was fetched again"


def test_wrong_content_is_refused_and_deleted(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}", "model.safetensors": b"good weights"}}
    for name in ("config.json", "model.safetensors"):
        hub.served = {name: b"bad weights!"}
        said = download(hub.url, tmp_path)
        assert said.startswith("ArtifactError")
        assert "wrong content" in said
        assert name in said
        assert not (tmp_path / name).exists()
    hub.served = {}
    assert download(hub.url, tmp_path) == ""
    # A file that was changed on disk since is found, not trusted for being there.
    (tmp_path / "model.safetensors").write_bytes(b"evil weights")
    assert "model.safetensors" in download(hub.url, tmp_path)


def test_a_gated_repository_names_its_page_and_the_token(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}"}}
    hub.gated = True
    said = download(hub.url, tmp_path)
    assert said.startswith("ConfigError")
    assert f"{hub.url}/{REPO} is gated" in said
    assert "HF_TOKEN" in said
    assert "hf_wrong" not in download(hub.url, tmp_path, HF_TOKEN="hf_wrong")
    assert download(hub.url, tmp_path, HF_TOKEN=TOKEN) == ""


def test_what_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}"}}
    said = download(hub.url, tmp_path, commit="f" * 40)
    assert said.startswith("ConfigError")
    assert "f" * 40 in said
    said = download(hub.url, tmp_path, repo="someone/else")
    assert said.startswith("ConfigError")
    assert "does not exist" in said
    assert download(hub.url, tmp_path, repo="some--one/x..y").startswith("ConfigError")


def test_a_hub_in_trouble_may_be_retried(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}"}}
    hub.status = 503
    said = download(hub.url, tmp_path)
    assert said.startswith("StageError")
    assert "503" in said
    assert len(hub.requests) == 1, "retries are the orchestrator's"


def test_an_unreachable_hub_and_offline_mode_say_so(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = download(url, tmp_path)
        assert said.startswith("StageError")
        assert "cannot be reached" in said
        assert url in said
        said = download(url, tmp_path, HF_HUB_OFFLINE="1")
        assert said.startswith("StageError")
        assert "HF_HUB_OFFLINE" in said


def test_something_that_is_not_a_hub_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.status = 200
    said = download(hub.url, tmp_path)
    assert said.startswith("StageError")
    assert "HF_ENDPOINT" in said


ROLES = """
import json, sys
from pathlib import Path
from tasks.acquire import data_sources
from tasks.errors import PipelineError
from tasks.acquire.params import HubData
try:
    found = data_sources.from_hub(HubData(source="hub", repo="someone/rows", revision=sys.argv[1]), Path(), Path(sys.argv[2]))
    print(json.dumps({role: path.read_text() for role, path in found.files.items()} | {"licence": found.licence}))
except PipelineError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_data_of_a_repository_without_splits_is_to_be_split(hub: Hub, tmp_path: Path) -> None:
    card, row = b"---\nlicense: mit\n---\n", b'{"prompt": "a", "completion": "b"}\n'
    alone = {"README.md": card, "train.jsonl": row, "extra/train.jsonl": b"never", "data/note.txt": b"never"}
    nested = {"data/train-00000-of-00001.jsonl": row, "data/test-00000-of-00001.jsonl": row}
    commits = {letter * 40: files for letter, files in zip("ab", (alone, nested), strict=True)}
    hub.repos["datasets/someone/rows"] = commits

    def roles(commit: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ROLES, commit, str(tmp_path / commit)]
        return subprocess.run(
            command, cwd=ROOT, env=environment(hub.url), capture_output=True, text=True, timeout=DEADLINE_S
        )

    done = roles("a" * 40)
    assert json.loads(done.stdout) == {"all": row.decode(), "licence": "mit"}
    assert {path.name for path in (tmp_path / ("a" * 40)).rglob("*") if path.is_file()} == {"README.md", "train.jsonl"}
    done = roles("b" * 40)  # no validation rows, and nothing is fetched for that
    assert done.stderr.startswith("ConfigError")
    assert not (tmp_path / ("b" * 40)).exists()


@pytest.mark.parametrize(
    "name", ["a\0b.json", "x" * 300 + ".json", "sub/" + "ü" * 128 + ".json", "../up.json", "a\nb.json"]
)
def test_a_name_that_no_file_system_takes_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.repos[REPO] = {COMMIT: {"config.json": b"{}", name: b"{}"}}
    told = download(hub.url, tmp_path / "out")
    assert told.startswith("ArtifactError")
    assert len(told) < 600
    assert not (tmp_path / "out").exists()

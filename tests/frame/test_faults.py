"""What a kill, a full disk, a dead server and a damaged file do to a workspace: an error, and nothing lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import digests, dvc_python, environment, make_toy, slmops, started

from tasks.frame.stage import folder
from tasks.stages import STAGES

DEADLINE_S = 300
VARIANT = "q8_0"
ITEMS = {"variant": VARIANT, "seed": "17"}
OVERRIDES = ["--set", f"quantize.variants=[{VARIANT}]"]


def command(root: Path, stage: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tasks",
        stage,
        *(ITEMS[axis] for axis in STAGES[stage].per),
        "--root",
        str(root),
        *OVERRIDES,
    ]


def run(root: Path, stage: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, stage), env=environment(root), capture_output=True, text=True)


def output(root: Path, stage: str) -> Path:
    return folder(root, stage, *(ITEMS[axis] for axis in STAGES[stage].per))


def killed(root: Path, stage: str) -> None:
    """Start a stage and kill it, unannounced, when it has begun to write."""
    out = output(root, stage)
    partial = out.with_name(f".{out.name}.partial")
    events = root / "events.jsonl"
    events.unlink(missing_ok=True)
    process = subprocess.Popen(
        command(root, stage), env=environment(root, SLMOPS_EVENTS=str(events)), stderr=subprocess.PIPE
    )
    with process:
        deadline = time.monotonic() + DEADLINE_S
        told = not STAGES[stage].scratch  # a stage of training tells its first loss
        while not (partial.is_dir() and (told or (events.is_file() and '"metric"' in events.read_text()))):
            if stage == "acquire":
                told = True
            assert process.poll() is None, f"{stage} ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()


@pytest.mark.slow
def test_a_kill_in_any_stage_changes_nothing(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil

    calm = tmp_path_factory.mktemp("calm") / "workspace"
    shutil.copytree(tiny_workspace, calm)
    for stage in STAGES:
        done = run(calm, stage)
        assert done.returncode == 0, done.stderr
        killed(tiny_workspace, stage)
        done = run(tiny_workspace, stage)
        assert done.returncode == 0, done.stderr
        assert not list((tiny_workspace / "build").rglob(".*.partial"))
    assert digests(tiny_workspace) == digests(calm)


@pytest.mark.slow
def test_a_kill_in_training_changes_nothing(tiny_workspace: Path) -> None:
    for stage in ("acquire", "finetune"):
        assert run(tiny_workspace, stage).returncode == 0
    want = digests(tiny_workspace)
    manifest = output(tiny_workspace, "finetune") / "manifest.json"
    first = manifest.read_bytes()
    output(tiny_workspace, "finetune").rename(tiny_workspace / "kept")

    killed(tiny_workspace, "finetune")
    done = run(tiny_workspace, "finetune")
    assert done.returncode == 0, done.stderr
    assert digests(tiny_workspace) == want
    assert manifest.read_bytes() == first
    assert not list((tiny_workspace / "build").glob(".*.partial"))


@pytest.fixture
def small_disk(tiny_workspace: Path) -> Iterator[Path]:
    """A workspace whose build/ is a file system of 4 MB."""
    place = tiny_workspace / "build"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system here")
    try:
        yield tiny_workspace
    finally:
        subprocess.run(["umount", str(place)], check=False)


def test_a_full_disk_is_an_error_with_a_way_out_and_leaves_nothing(small_disk: Path) -> None:
    done = run(small_disk, "acquire")
    assert done.returncode == 1
    assert re.match(r"error: .*/build/.* \(\d+ MB free", done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (small_disk / "build").iterdir() if path.name.endswith(("acquire", ".partial"))] == []

    subprocess.run(["umount", str(small_disk / "build")], check=True)
    done = run(small_disk, "acquire")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A checkout on a read-only disk."""
    toy = make_toy(tmp_path)
    bind = ["mount", "--bind", str(toy), str(toy)]
    if os.geteuid() != 0 or subprocess.run(bind, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a folder read-only here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(toy)], check=True)
        yield toy
    finally:
        subprocess.run(["umount", str(toy)], check=False)


def test_a_read_only_disk_is_an_error_with_a_way_out(unwritable: Path) -> None:
    for done in (run(unwritable, "acquire"), slmops(unwritable, "run", "--name", "a")):
        assert (done.returncode, done.stderr[:7]) == (1, "error: "), done.stderr
        assert "Read-only" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_mlflow_server_that_is_down_stops_a_run_before_any_work(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    done = slmops(toy, "run", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.match(r"error: .*http://127\.0\.0\.1:9 .*MLFLOW_TRACKING_URI", done.stderr), done.stderr
    assert started(toy) == []


def test_a_damaged_manifest_is_refused_and_dvc_restores_it(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    repro = [*dvc_python(), "repro", "finetune"]
    subprocess.run(repro, cwd=toy, env=environment(toy), check=True, capture_output=True)
    manifest = toy / "build" / "acquire" / "manifest.json"
    manifest.unlink()  # it may be a link into DVC's cache
    manifest.write_text('{"stage": "acquire"')

    done = run(toy, "finetune")
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")
    assert f"{manifest} is damaged" in done.stderr

    done = subprocess.run(repro, cwd=toy, env=environment(toy), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert manifest.read_text().startswith("{\n")
    assert started(toy) == ["acquire", "finetune"]

"""Who holds what: locks whose files hold anything, disks that take nothing, and process numbers that come round again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flows.workspace import locks, processes, versioning
from tasks.errors import ArtifactError, StageError

GARBAGE = [b"", b"[]", b"7", b"{}", b'{"pid": 1}', b'{"name": "a", "pid": [], "started": 3}', b"\xff\x00", b'{"name"']


def lock_file(root: Path, content: bytes) -> Path:
    path = root / ".runs" / "lock"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", GARBAGE)
def test_whatever_a_free_locks_file_holds_it_can_be_taken(tmp_path: Path, content: bytes) -> None:
    path = lock_file(tmp_path, content)
    with locks.locked(tmp_path, "a"):
        assert json.loads(path.read_bytes())["name"] == "a"
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", GARBAGE)
def test_whatever_a_held_locks_file_holds_it_is_told_as_held(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "ORPHAN_S", 0.0)
    with locks.locked(tmp_path, "a"):
        lock_file(tmp_path, content)
        with pytest.raises(locks.Busy), locks.locked(tmp_path, "b"):
            pytest.fail("two runs hold one workspace")


def test_a_stranger_with_the_number_of_a_killed_run_lives(tmp_path: Path) -> None:
    # As long ago as another boot: its number, carried as the mark, is the same.
    env = {**os.environ, locks.MARK: "4242", locks.MARK_EXACT: "another-boot:4242:1"}
    stranger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=env)
    try:
        for process in ({}, {"process": ""}, {"process": "this-boot:4242:2"}):
            lock_file(tmp_path, json.dumps({"name": "a", "pid": 4242, "started": "x", **process}).encode())
            with locks.locked(tmp_path, "b"):
                assert stranger.poll() is None
        lock_file(
            tmp_path, json.dumps({"name": "a", "pid": 1, "started": "x", "process": "another-boot:4242:1"}).encode()
        )
        with locks.locked(tmp_path, "b"):
            assert stranger.wait(60) != 0  # that one is the killed run's own
    finally:
        stranger.kill()
        stranger.communicate()


def test_a_process_is_known_by_more_than_its_number() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    written = processes.identity(child.pid)
    boot, number, start = written.split(":")
    assert number == str(child.pid)
    assert processes.lives(written)
    assert not processes.lives(f"{boot}:{number}:{int(start) + 1}")
    assert not processes.lives(f"other:{number}:{start}")
    child.communicate()
    assert not processes.lives(written)


@given(st.text())
def test_what_is_no_process_does_not_live(text: str) -> None:
    assert not processes.lives(text)


LIMITED = """
import resource, sys
from pathlib import Path
from flows.workspace import locks
resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))
with getattr(locks, sys.argv[1])(*[Path(sys.argv[2]), "name", "run"][: int(sys.argv[3])]):
    pass
"""


@pytest.mark.parametrize(("lock", "given"), [("locked", 2), ("one_at_a_time", 3)])
def test_a_full_disk_at_a_lock_is_told(tmp_path: Path, lock: str, given: int) -> None:
    command = [sys.executable, "-c", LIMITED, lock, str(tmp_path), str(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "tasks.errors.StageError" in done.stderr
    assert str(tmp_path / ".runs") in done.stderr


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / ".runs").write_text("a file where the folder belongs")
    for lock in (locks.locked(tmp_path, "a"), locks.one_at_a_time(tmp_path, "lamps", "a")):
        with pytest.raises(StageError), lock:
            pytest.fail("nobody can hold it")


# --- DVC's own lock ------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """As much of one as is looked at before DVC is started."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    return tmp_path


def test_dvcs_lock_held_by_a_number_that_came_round_again_is_told(workspace: Path) -> None:
    rwlock = workspace / ".dvc" / "tmp" / "rwlock"
    stranger = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    holder = {"pid": stranger.pid, "cmd": "python -m dvc repro"}
    try:
        for held in ({"write": {"build": holder}}, {"read": {"data": [holder]}}):
            rwlock.write_text(json.dumps(held))
            with pytest.raises(ArtifactError, match=f"process {stranger.pid}"):
                versioning.check_state(workspace)
    finally:
        stranger.communicate()
    versioning.check_state(workspace)  # DVC itself takes a lock of nobody's


@pytest.mark.parametrize(
    "content", ["[]", "7", '{"read": []}', '{"write": {"a": {}}}', '{"write": {"a": [{"pid": "x"}]}}']
)
def test_a_lock_of_dvcs_that_holds_anything_else_is_told(workspace: Path, content: str) -> None:
    (workspace / ".dvc" / "tmp" / "rwlock").write_text(content)
    with pytest.raises(ArtifactError):
        versioning.check_state(workspace)

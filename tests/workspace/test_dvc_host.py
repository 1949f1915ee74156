"""Calls of dvc by one process that has it loaded: their results, side by side, and their ends whatever is killed."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, environment, make_toy, started, wait_for

from flows.workspace import dvc_host, versioning
from tasks.errors import StageError

CALLER = """
import sys
from pathlib import Path
from flows.workspace import versioning
versioning.repro(Path.cwd(), "acquire", log=Path("acquire.log"))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = make_toy(tmp_path)
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dvc_host, "_host", None)
    yield root
    if dvc_host._host:
        dvc_host._host.process.kill()


def called(root: Path, *arguments: str) -> tuple[int | None, str]:
    """Exit code and output."""
    log = root / f"{arguments[0].strip('-')}.log"
    with log.open("wb") as out:
        call = dvc_host.call(
            arguments, folder=root, env=versioning.stage_environment(), out=out.fileno(), err=out.fileno()
        )
    assert call.wait(120)
    call.close()
    return call.returncode, log.read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_calls_say_what_dvc_says(toy: Path) -> None:
    code, text = called(toy, "stage", "list")
    assert (code, "acquire" in text) == (0, True)
    code, text = called(toy, "repro", "nothing")
    assert (code, "nothing" in text) == (255, True)
    code, text = called(toy, "nonsense")
    assert code == 254
    assert "usage" in text.lower()


def test_calls_work_side_by_side_in_places_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_toy(tmp_path_factory.mktemp("other"))
    ended = []

    def run(root: Path) -> None:
        env = {"TOY_LOG": str(root / "toy.log"), "TOY_WAIT": '{"acquire": 2}'}
        ended.append((root, versioning.repro(root, "acquire", log=root / "acquire.log", env=env).how))

    threads = [threading.Thread(target=run, args=(root,)) for root in (toy, other)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(ended) == sorted([(toy, "ran"), (other, "ran")])
    assert (started(toy), started(other)) == (["acquire"], ["acquire"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_caller_began_ends(toy: Path, number: signal.Signals) -> None:
    env = {**environment(toy, TOY_WAIT='{"acquire": 600}'), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", CALLER], cwd=toy, env=env) as caller:
        wait_for(lambda: started(toy) == ["acquire"])
        (host,) = (int(pid) for pid in Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text().split())
        (call,) = (int(pid) for pid in Path(f"/proc/{host}/task/{host}/children").read_text().split())
        caller.send_signal(number)
    wait_for(lambda: not alive(call) and not alive(host))
    assert "stopped by hand" in (toy / "acquire.log").read_text()  # it heard SIGINT, and was not killed
    assert not (toy / "build" / "acquire").exists()


def test_where_the_host_is_killed_the_call_ends_and_the_next_one_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_WAIT", '{"acquire": 600}')
    failed: list[Exception] = []

    def run() -> None:
        try:
            versioning.repro(toy, "acquire", log=toy / "acquire.log")
        except StageError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: started(toy) == ["acquire"])
    (call,) = versioning._children
    assert dvc_host._host
    dvc_host._host.process.kill()
    thread.join(60)
    assert len(failed) == 1
    wait_for(lambda: not alive(call))
    time.sleep(0.2)
    monkeypatch.setenv("TOY_WAIT", "{}")
    assert versioning.repro(toy, "acquire", log=toy / "acquire.log").how == "ran"


PIPELINE = """
stages:
  first: {cmd: cp rows first, deps: [rows], outs: [first]}
  each:
    foreach: [q4_0, onnx-int4]
    do: {cmd: "cp first ${item}", deps: [first], params: [rate, none, text], outs: ["${item}"]}
"""


def test_dvc_lock_has_the_bytes_that_dvc_writes(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shutil.copytree(toy, other := tmp_path_factory.mktemp("other") / "toy")
    plain, env = [sys.executable, "-m", "dvc", "repro"], versioning.stage_environment()
    seen = []
    for rows, values in (
        ("1", {"rate": 1e-05, "none": None, "text": "a: b # c\nd"}),
        ("1", {"rate": 0.25, "none": None, "text": "null"}),
        ("2", {"rate": 0.25, "none": [1, {"x": "ä" * 200}], "text": ""}),
    ):
        for root in (toy, other):
            (root / "dvc.yaml").write_text(PIPELINE)
            (root / "rows").write_text(rows)
            (root / "params.yaml").write_text(yaml.safe_dump(values))
        code, text = called(toy, "repro")
        assert code == 0, text
        subprocess.run(plain, cwd=other, env=env, check=True, stdout=subprocess.DEVNULL)
        assert (toy / "dvc.lock").read_text() == (other / "dvc.lock").read_text()
        seen.append((toy / "dvc.lock").read_text())
    assert len(set(seen)) == 3


def test_a_dvc_lock_of_another_form_is_left_to_dvc(toy: Path) -> None:
    versioning.repro(toy, "acquire", log=toy / "acquire.log")
    lock = toy / "dvc.lock"
    lock.write_text("# mine\n" + lock.read_text().rstrip())
    versioning.repro(toy, "finetune", log=toy / "finetune.log")
    assert lock.read_text().startswith("# mine\n")
    assert set(yaml.safe_load(lock.read_text())["stages"]) == {"acquire", "finetune"}


def test_a_dvc_lock_without_its_last_line_end_stays_sound(toy: Path) -> None:
    versioning.repro(toy, "acquire", log=toy / "acquire.log")
    lock = toy / "dvc.lock"
    lock.write_text(lock.read_text().rstrip("\n"))
    versioning.repro(toy, "finetune", log=toy / "finetune.log")
    assert set(yaml.safe_load(lock.read_text())["stages"]) == {"acquire", "finetune"}


def test_at_a_terminal_what_dvc_says_is_understood_too(toy: Path) -> None:
    """DVC colours its words where standard error is a terminal as it is loaded."""
    code = """
from pathlib import Path
from flows.workspace import versioning
from tasks.errors import StageError
try:
    versioning.checkout(Path.cwd(), "nothing.dvc")
except StageError as error:
    print(repr(str(error)))
"""
    terminal, theirs = pty.openpty()
    env = {**environment(toy), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=toy, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True
    )
    os.close(theirs)
    os.close(terminal)
    assert "nothing.dvc" in done.stdout
    assert "\\x1b" not in done.stdout

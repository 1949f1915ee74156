"""The process of a runtime with an environment of its own: what it answers, and how each of its ends is told."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from checkout import wait_for

from tasks.errors import BrokenRuntimeError, ConfigError, StageError
from tasks.runtimes import environments, worker
from tasks.variants import RUNTIMES, Runtime

TOY = Runtime("toy", "Toy", "toy", "model", "model", isolated=True)
ENGINE = """
import os, sys, time
class Engine:
    def __init__(self):
        print("a library says hello")
        os.write(1, b"and a native one, too")
    def add(self, a, b):
        print("garbage")
        return a + b
    def table(self, rows, columns):
        import numpy
        return numpy.arange(rows * columns, dtype="float64").reshape(rows, columns)
    def refuse(self):
        raise ValueError("not this one")
    def crash(self):
        os.abort()
    def leave(self):
        print("the model is too large", file=sys.stderr)
        os._exit(3)
    def hang(self):
        time.sleep(600)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "serve.py").write_text((worker.WORKERS / "serve.py").read_text())
    (tmp_path / "toy.py").write_text(ENGINE)
    monkeypatch.setattr(worker, "WORKERS", tmp_path)
    monkeypatch.setattr(environments, "interpreter", lambda runtime: Path(sys.executable))
    return tmp_path


def test_a_call_gives_what_the_engine_returns_whatever_libraries_print(toy: Path) -> None:
    with worker.Worker(TOY) as running:
        assert running.call("add", 1, 2) == 3
        assert running.call("add", "ä", "\n") == "ä\n"
        for rows in (0, 3, 4000):
            wanted = np.arange(rows * 500, dtype=np.float32).reshape(rows, 500)
            np.testing.assert_array_equal(running.call("table", rows, 500), wanted)
        assert running.call("add", [1], [2]) == [1, 2]


def test_what_an_engine_refuses_is_told_and_the_next_call_goes_well(toy: Path) -> None:
    with worker.Worker(TOY) as running:
        with pytest.raises(StageError, match="not this one"):
            running.call("refuse")
        with pytest.raises(StageError):
            running.call("unknown")
        assert running.call("add", 1, 2) == 3


def test_a_crash_is_told_as_its_signal(toy: Path) -> None:
    with worker.Worker(TOY) as running, pytest.raises(BrokenRuntimeError, match="SIGABRT"):
        running.call("crash")


def test_an_end_by_itself_is_told_with_its_last_line(toy: Path) -> None:
    with worker.Worker(TOY) as running, pytest.raises(StageError, match="the model is too large"):
        running.call("leave")


def test_a_hanging_runtime_is_ended(toy: Path) -> None:
    with worker.Worker(TOY, silent_s=1.0) as running:
        with pytest.raises(StageError, match="hang"):
            running.call("hang")
        assert running._process.poll() is not None


@pytest.mark.parametrize("said", ["hello", '{"shape": "x"}', "[1]", "{}", "\\xff\\xfe"])
def test_garbage_in_the_place_of_an_answer_is_refused(toy: Path, said: str) -> None:
    (toy / "serve.py").write_text(
        f"import sys\nsys.stdout.buffer.write(b'''{said}''' + b'\\n')\nsys.stdout.flush()\ninput()"
    )
    with pytest.raises(StageError):
        worker.Worker(TOY)


def test_half_an_array_is_an_end(toy: Path) -> None:
    (toy / "serve.py").write_text(
        textwrap.dedent("""
        import json, sys
        print(json.dumps({"result": "ready"}), flush=True)
        input()
        print(json.dumps({"shape": [100, 100]}), flush=True)
        """)
    )
    with worker.Worker(TOY) as running, pytest.raises(StageError):
        running.call("table")


def test_a_runtime_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "folder", lambda runtime: tmp_path / runtime.name)
    with pytest.raises(ConfigError, match="slmops runtimes install openvino"):
        worker.Worker(RUNTIMES["openvino"])


def test_it_ends_with_the_process_that_started_it(toy: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(worker.__file__).parents[2])!r})
from tasks.runtimes import environments, worker
from tasks.variants import Runtime
worker.WORKERS = Path({str(toy)!r})
environments.interpreter = lambda runtime: Path(sys.executable)
running = worker.Worker(Runtime("toy", "Toy", "toy", "model", "model", isolated=True))
print(running._process.pid, flush=True)
running.call("hang")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())

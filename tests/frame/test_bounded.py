"""Work without end is ended with a sentence, and a watched stage ends as it would by itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import yaml
from checkout import ROOT

from tasks import params
from tasks.acquire import limits
from tasks.errors import ArtifactError
from tasks.frame import bounded

DEADLINE_S = 300
WORK = {
    "time": "while True: pass",
    "memory": "x = b'x'\nwhile True: x += x",
    "native memory": "import numpy\nx = [numpy.ones(10**7)]\nwhile True: x.append(numpy.ones(10**7))",
}


def watched(work: str, cpu_s: float, memory: float = 5e8) -> "subprocess.Popen[str]":
    code = (
        f"from tasks.frame import bounded\nbounded.watch(lambda: bounded.Limits({cpu_s}, {memory}), 'acquire')\n{work}"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=-1, stderr=-1)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="nothing tells what a process uses")
@pytest.mark.parametrize("what", WORK)
def test_work_beyond_its_limits_is_ended_with_a_sentence(what: str) -> None:
    # One limit at a time: a busy machine looks late.
    process = watched(WORK[what], cpu_s=1.0 if what == "time" else 60.0)
    told = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 1
    assert told.startswith("error: acquire was stopped")
    assert what.removeprefix("native ").replace("time", "seconds") in told


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("print('done')", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11),
    ],
    ids=["done", "failed", "a signal"],
)
def test_a_watched_process_ends_as_its_work_does(work: str, code: int) -> None:
    process = watched(work, cpu_s=60)
    out = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == code
    assert out == ("done\n" if code == 0 else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_work_ends_with_the_process_that_was_started(number: int) -> None:
    process = watched("import os, time; print(os.getpid(), flush=True); time.sleep(60)", cpu_s=60)
    assert process.stdout
    child = int(process.stdout.readline())
    assert child != process.pid
    process.send_signal(number)
    assert process.wait(timeout=DEADLINE_S) == -number
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"{child} goes on")


def test_python_code_that_takes_too_long_is_refused() -> None:
    with pytest.raises(ArtifactError, match="a template"), bounded.seconds(0.2, "a template"):
        sum(1 for _ in iter(int, 1))
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_what_may_be_used_grows_with_the_files(tiny_params: dict, tmp_path: Path) -> None:
    checked = params.check(tiny_params, "test")
    before = limits.limits(checked, tmp_path)
    with (tmp_path / "data" / "model" / "more.safetensors").open("wb") as file:
        file.truncate(28 * 10**9)  # a 14B model
    after = limits.limits(checked, tmp_path)
    assert after.memory - before.memory > 100e9
    assert after.cpu_s - before.cpu_s > 3600


def test_downloads_that_are_removed_while_they_are_counted_are_no_error(tiny_params: dict, tmp_path: Path) -> None:
    """A watched stage is asked every moment, at its end too, when it removes them."""
    checked, downloads, over = params.check(tiny_params, "test"), tmp_path / "build" / ".acquire.scratch", Event()

    def come_and_go() -> None:
        while not over.is_set():
            (downloads / "model").mkdir(parents=True)
            (downloads / "model" / "part").write_bytes(b"x")
            shutil.rmtree(downloads)

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(come_and_go)
        try:
            for _ in range(1000):
                limits.limits(checked, tmp_path)
        finally:
            over.set()
        work.result()


@pytest.mark.slow
def test_a_template_without_end_is_refused_by_the_command(tiny_params: dict, tmp_path: Path) -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "data" / "model" / "chat_template.jinja").write_text(loops)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    command = [sys.executable, "-m", "tasks", "acquire", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "error: the model's chat template" in done.stderr

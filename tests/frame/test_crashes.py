"""How a process that ended without a word is told: the signal, the library, and whether to run again helps."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import BrokenRuntimeError, ConfigError, DiskFullError, StageError
from tasks.frame import crashes

DUMP = """some line
Fatal Python error: Segmentation fault

Current thread 0x00007f4821e4ab80 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "/app/tasks/runtimes/llama.py", line 133 in decode
  File "/app/tasks/validate/__init__.py", line 9 in validate

Extension modules: numpy._core._multiarray_umath (total: 1)
"""


@pytest.fixture(autouse=True)
def _silent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "_kernel_log", list)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGBUS, signal.SIGABRT])
@pytest.mark.parametrize("shell", [False, True])
def test_a_crash_of_native_code_is_named_and_not_tried_again(tmp_path: Path, number: int, shell: bool) -> None:
    code = 128 + number if shell else -number
    error = crashes.error_for("validate@q4_0", code, DUMP, tmp_path)
    assert type(error) is BrokenRuntimeError
    for part in (signal.Signals(number).name, str(code), "runtimes/llama.py", "slmops doctor"):
        assert part in str(error)


def test_a_process_that_the_system_killed_may_run_again(tmp_path: Path) -> None:
    error = crashes.error_for("distill@17", 137, "", tmp_path)
    assert type(error) is StageError
    assert "SIGKILL" in str(error)
    assert "machine.parallel" in str(error)


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_a_process_that_died_of_a_full_disk_is_told_as_that(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crashes, "_free", lambda place: 0 if place == tmp_path else 10**12)
    error = crashes.error_for("quantize@q4_0", -number, "", tmp_path)
    assert type(error) is DiskFullError
    assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (1, "Traceback\nOSError: [Errno 28] No space left on device: 'x'", DiskFullError),
        (1, "Traceback\nMemoryError", StageError),
        (127, "sh: 1: infra/python: not found", ConfigError),
        (1, "Traceback\nNameError: name 'os' is not defined", StageError),
        (-signal.SIGTERM, "", StageError),
        (200, "", StageError),  # no signal has that number
    ],
)
def test_other_ends_are_told_by_what_was_printed(tmp_path: Path, code: int, said: str, kind: type[Exception]) -> None:
    error = crashes.error_for("finetune", code, said, tmp_path)
    assert type(error) is kind
    assert "finetune" in str(error)


def test_a_line_without_end_is_not_quoted_whole(tmp_path: Path) -> None:
    assert len(str(crashes.error_for("finetune", 1, "x" * 100_000, tmp_path))) < 400


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("", ""),
        (DUMP.replace("/app/tasks/runtimes/llama.py", "/v/site-packages/llama_cpp/x.py"), "llama_cpp"),
        # A crash in a thread of native code: the function that waits for it tells.
        ("Fatal Python error: Aborted\n\nThread 0x1:\n  File \"/app/tasks/a.py\", line 3 in f\n\nCurrent thread 0x2:\n  <no Python frame>\n", "a.py"),
        (DUMP + '\nCurrent thread\'s C stack trace:\n  Binary file "/v/libpython3.14.so.1.0", at f\n  Binary file "/v/libggml-cpu.so", at g\n', "libggml-cpu.so"),
    ],
)  # fmt: skip
def test_the_library_is_told_from_what_the_fault_handler_wrote(said: str, found: str) -> None:
    assert found in crashes.where(said)
    assert bool(found) == bool(crashes.where(said))


def test_the_kernel_knows_the_library_best(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "traps: python3[123] general protection fault ip:7f sp:7f error:0 in libggml-cpu.so[7f1+9d000]"
    monkeypatch.setattr(crashes, "_kernel_log", lambda: ["systemd[1]: hello", line])
    assert crashes.where(DUMP) == " in libggml-cpu.so"


def test_a_real_crash_is_told(tmp_path: Path) -> None:
    program = "import faulthandler, ctypes; faulthandler.enable()\ndef decode(): ctypes.string_at(0)\ndecode()"
    (tmp_path / "native.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "native.py"], capture_output=True, text=True)
    said = str(crashes.error_for("it", done.returncode, done.stderr, tmp_path))
    assert "SIGSEGV" in said
    assert "native.py, line 2" in said

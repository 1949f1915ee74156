"""The process of a runtime with an environment of its own: what `workers/serve.py` serves, as calls."""

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tasks.errors import StageError
from tasks.frame import crashes
from tasks.frame.environment import NO_TELEMETRY, OFFLINE
from tasks.runtimes import environments
from tasks.variants import Runtime

WORKERS = Path(__file__).parent / "workers"
END_S = 10.0  # from the end of its output to its own
SILENT_S = 600.0  # no call takes that long: it hangs


class Worker:
    """A runtime at work, ended by `with`.

    Raises:
        ConfigError: its environment is not there.
        StageError: it does not start.
    """

    def __init__(self, runtime: Runtime, silent_s: float = SILENT_S) -> None:
        self.label, self._silent_s = runtime.label, silent_s
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed on exit
        command: list[str | Path] = [
            environments.interpreter(runtime),
            "-I",
            WORKERS / "serve.py",
            WORKERS / f"{runtime.name}.py",
        ]
        env = {**os.environ, **NO_TELEMETRY, **OFFLINE}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=env, bufsize=0
        )
        self._rest = b""
        self._answer("start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end anything may be gone
            self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """What the engine's method of that name returns.

        Raises:
            StageError: it refuses, dies (of its own family, where to run it again will not help), hangs or says what is no answer.
        """
        assert self._process.stdin
        with suppress(OSError):  # it has ended, and the answer tells why
            self._process.stdin.write(json.dumps({"call": name, "with": arguments}).encode() + b"\n")
        return self._answer(name)

    def _answer(self, name: str) -> Any:
        deadline = time.monotonic() + self._silent_s
        while b"\n" not in self._rest:
            self._rest += self._read(name, deadline)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            told = json.loads(line)
            if "error" in told:
                raise StageError(f"{self.label} refuses ({name}): {told['error'][:500]}")
            if "shape" not in told:
                return told["result"]
            return self._array(name, told["shape"], deadline)
        except (ValueError, KeyError, TypeError):
            self.close()
            raise StageError(f"{self.label} said what is no answer ({name}): {line[:80]!r}: install it again") from None

    def _array(self, name: str, shape: Sequence[int], deadline: float) -> Any:
        import numpy as np

        size = 4 * int(np.prod(shape))
        parts, had = [self._rest], len(self._rest)
        while had < size:
            parts.append(self._read(name, deadline))
            had += len(parts[-1])
        content = b"".join(parts)
        self._rest = content[size:]
        return np.frombuffer(content[:size], "<f4").reshape(shape)

    def _read(self, name: str, deadline: float) -> bytes:
        assert self._process.stdout
        pipe = self._process.stdout.fileno()
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            self.close()
            raise StageError(
                f"{self.label} gave no answer in {self._silent_s:.0f} s ({name}), and was ended: run again"
            )
        if more := os.read(pipe, 1 << 20):
            return more
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        raise crashes.error_for(f"{self.label} ({name})", code, self._errors.read(), Path(tempfile.gettempdir()))

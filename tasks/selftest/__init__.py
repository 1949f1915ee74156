"""Native code proves itself: a runtime that was compiled or installed here is held against torch before a stage uses it.

A small model of random weights is computed by the runtime, in a process of its own, and by torch from the same weights.
What held is written down, so that it is done once for each build of a library on each kind of processor.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from tasks.errors import BrokenRuntimeError, ConfigError, StageError
from tasks.frame import crashes, events
from tasks.frame.environment import NO_TELEMETRY, OFFLINE
from tasks.runtimes import environments
from tasks.variants import LLAMA, VARIANTS, Runtime

LIMIT_S = 900.0
_ROOT = Path(__file__).resolve().parents[2]  # where `tasks` is importable from


def used(stage: str, variant: str | None) -> tuple[Runtime, ...]:
    """The runtimes whose arithmetic a stage relies on, of those that have native code."""
    if stage not in ("quantize", "validate", "measure") or variant is None:
        return ()
    own = VARIANTS[variant].runtime
    wanted = (LLAMA, own) if stage != "quantize" and own is not LLAMA else (own,)  # held against the F16 file
    return tuple(each for each in wanted if each.native)


def ensure(runtimes: tuple[Runtime, ...]) -> None:
    """Test each runtime that has not proved itself in this environment, on this kind of processor.

    Raises:
        ConfigError: a library is not installed.
        BrokenRuntimeError: a library crashes, or computes wrongly.
        StageError: the test itself could not be done.
    """
    for runtime in runtimes:
        path = record(runtime)
        if path.exists():
            continue
        with _alone(path):
            if not path.exists():  # else another stage, which started beside this one, has just tested it
                events.note(f"testing {runtime.label} against torch, once for this environment: less than a minute")
                check(runtime)


def check(runtime: Runtime) -> dict[str, Any]:
    """Test a library now, and write down that it held. Returns what was written: `versions`, `kernels` (what the library
    says it was compiled for), `checks` and the greatest `distance` of the logits from torch's, a share of their length.

    Raises:
        ConfigError: the library is not installed.
        BrokenRuntimeError: it crashes, or computes wrongly.
        StageError: the test itself could not be done.
    """
    path, began = record(runtime), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slmops-selftest-") as folder:
        lines, code, said = _child(runtime, Path(folder))
    results = [json.loads(line) for line in lines]
    done = [each for each in results if "distance" in each]
    at = f" at {results[-1]['what']}" if results and "what" in results[-1] else ""
    full_name = f"{runtime.label} ({runtime.distribution} {environments.version(runtime)})"
    kernels = next((each["kernels"] for each in results if "kernels" in each), "")
    if code != 0:
        error = crashes.error_for(f"{full_name}: the self-test{at}", code, said, Path(tempfile.gettempdir()))
        if isinstance(error, BrokenRuntimeError):
            raise BrokenRuntimeError(_broken(runtime, full_name, f"{_how(code, said)} in the self-test{at}", kernels))
        raise error
    wrong = [each for each in done if not _holds(each)]
    if wrong:
        first = wrong[0]
        failure = (
            f"computes wrongly: {len(wrong)} of {len(done)} results, the first at {first['what']}: off by "
            f"{first['distance'][0]:.1%} of the logits' length, {first['limit'][0]:.1%} is what rounding comes to"
        )
        raise BrokenRuntimeError(_broken(runtime, full_name, failure, kernels))
    made = {
        "library": runtime.label,
        "versions": _versions(runtime),
        "kernels": kernels,
        "checks": len(done),
        "distance": max((each["distance"][0] for each in done), default=0.0),
        "seconds": round(time.monotonic() - began, 1),
    }
    with contextlib.suppress(OSError):  # nowhere to write: it is tested again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def _holds(result: Mapping[str, Any]) -> bool:
    return all(found <= limit for found, limit in zip(result["distance"], result["limit"], strict=True))


def _broken(runtime: Runtime, full_name: str, failure: str, kernels: str) -> str:
    compiled = f" (compiled for {kernels})" if kernels else ""
    return f"{full_name}{compiled} {failure}: nothing that it makes can be relied on here: {runtime.remedy}"


def _how(code: int, said: str) -> str:
    by = crashes.signal_of(code)
    return f"died by {by.name if by else 'itself'} (exit code {code}){crashes.where(said)}"


def _child(runtime: Runtime, folder: Path) -> tuple[list[str], int, str]:
    """What the test printed, its exit code, and what it said on standard error."""
    variables = {**os.environ, **NO_TELEMETRY, **OFFLINE, "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tasks.selftest", runtime.name, str(folder)], cwd=_ROOT, env=variables, text=True,
            errors="replace", stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StageError(
            f"{runtime.label}: the self-test did not end in {LIMIT_S:.0f} s: free the machine's cores, then "
            "`slmops doctor`"
        ) from None
    return done.stdout.splitlines(), done.returncode, done.stderr


def record(runtime: Runtime) -> Path:
    """Where it is written down that a library holds: a file whose name tells its build, this processor and this test. In
    the environment, or in the person's cache where that is read-only.

    Raises:
        ConfigError: the library is not installed.
    """
    parts = [
        *(f"{name} {version}" for name, version in _versions(runtime).items()),
        *_native(runtime),
        processor(),
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))),
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    file = Path("slmops", f"selftest-{runtime.name}-{key}.json")
    data = Path(sysconfig.get_path("data"))
    own = data / "share" / file
    if own.exists() or os.access(data, os.W_OK):
        return own
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / file


def processor() -> str:
    """The kind of this processor: its name and what it can do, as the kernel has it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    lines = re.findall(r"^(model name|flags|Features|CPU part)\s*:\s*(.*)$", text, re.MULTILINE)
    return "\n".join([platform.machine(), *sorted({f"{key} {value}" for key, value in lines})])


def _versions(runtime: Runtime) -> dict[str, str]:
    """Of the distributions that the result depends on."""
    environments.version(runtime)
    if runtime.isolated:
        installed = environments.versions(runtime)
        return {each: installed[each] for each in (runtime.distribution, *runtime.beside)}
    try:
        return {each: metadata.version(each) for each in (runtime.distribution, *runtime.beside)}
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: make setup") from None


def _native(runtime: Runtime) -> list[str]:
    """What tells one build of its native code from another."""
    if runtime.isolated:
        return [environments.requirements(runtime).read_text(encoding="utf-8")]
    spec = util.find_spec(runtime.package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{runtime.distribution} is not installed: make setup")
    files = sorted(
        file for place in spec.submodule_search_locations for file in Path(place).rglob("*.so*") if file.is_file()
    )
    return [f"{file.name} {file.stat().st_size} {int(file.stat().st_mtime)}" for file in files]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One test of a library at a time, where there is a place for a lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

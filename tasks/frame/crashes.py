"""How a process that ended without a word of its own is told: by which signal, in what library, and what helps.

The library is told where the system tells it: by the kernel's log, where it may be read; else by what Python's fault
handler wrote (from 3.14 on the C stack, before that the Python function that called native code).
"""

import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from tasks.errors import BrokenRuntimeError, ConfigError, StageError
from tasks.frame.stage import disk_full

FULL = 16_000_000  # bytes; a process that was killed for want of room may have left less than it wanted
RECENT_S = 120.0
QUOTED = 200  # characters of what a process printed
STOPPED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
LIMITS = {signal.SIGXCPU: "ulimit -t", signal.SIGXFSZ: "ulimit -f"}
MEMORY = re.compile(r"\bMemoryError\b|\bbad_alloc\b|Cannot allocate memory|can't allocate memory")
NO_SPACE = re.compile(r"No space left on device|database or disk is full")


def signal_of(code: int) -> signal.Signals | None:
    """The signal that an exit code stands for: -11, as Python tells it, or 139, as a shell does."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


def error_for(what: str, code: int, said: str, place: Path, see: str = "") -> StageError | ConfigError:
    """The error for `what`, a process that ended with `code` after it printed `said`. `place`: where it wrote.
    `see`: a word more about where to look.
    """
    by = signal_of(code)
    full = next((each for each in (place, Path(tempfile.gettempdir())) if _free(each) < FULL), None)
    if NO_SPACE.search(said) or (full and by in (signal.SIGBUS, signal.SIGKILL, signal.SIGXFSZ)):
        found = disk_full(full or place)
        return type(found)(f"{what}: {found}")
    if by is None and MEMORY.search(said):
        return StageError(f"{what} ran out of memory ({_memory()}): {_less_memory()}{see}")
    if by is None and code in (126, 127):
        return ConfigError(f"{what} could not be started: {_last_line(said)!r}: see what `slmops doctor` says{see}")
    if by is None:
        return StageError(f"{what} ended with exit code {code}; its last line: {_last_line(said)!r}{see}")
    how = f"{by.name} (exit code {code})"
    if by in STOPPED:
        return StageError(f"{what} was stopped by {how}: run it again, it takes up where it can")
    if by in LIMITS:
        return StageError(f"{what} was ended by {how}: it met a limit of this login: raise it ({LIMITS[by]})")
    if by is signal.SIGKILL:
        log = _kernel_log()
        sure = any("Out of memory" in line or "out of memory" in line for line in log)
        cause = "the kernel had no memory left" if sure else "most likely for want of memory"
        return StageError(f"{what} was killed by {how}, {cause} ({_memory()}): {_less_memory()}{see}")
    return BrokenRuntimeError(
        f"{what} died by {how}{where(said)}: to run it again will not help: `slmops doctor` tests each native library "
        f"and says what to do{see}"
    )


def where(said: str) -> str:
    """In what library a process died, as far as the kernel or the fault handler's lines in `said` tell; "" if not at all."""
    for line in reversed(_kernel_log()):
        if match := re.search(r"\bpython[\d.]*\[\d+\].*\bin ([\w.+-]+)\[", line):
            return f" in {match[1]}"
    for library in re.findall(r'^  Binary file "([^"]+)"', said, re.MULTILINE):
        name = Path(library).name
        if not re.match(r"(lib)?python|libc[.-]|libpthread|\[", name):
            return f" in {name}"
    stacks = said.partition("Fatal Python error: ")[2].split("\n\n")
    stacks.sort(key=lambda stack: "Current thread" not in stack)  # a thread of native code alone has no frame
    frames = re.findall(r'^  File "([^"]+)", line (\d+) in (\S+)', "\n".join(stacks), re.MULTILINE)
    for file, line, function in frames:
        package = re.search(r"site-packages/([^/.]+)", file)
        if package:
            return f" in native code called by {package[1]}"
        if not re.search(r"^<|/lib/python3\.\d+/", file):  # the standard library only hands on
            return f" in native code called by {function} ({'/'.join(Path(file).parts[-3:])}, line {line})"
    return ""


def _kernel_log() -> list[str]:
    """What the kernel said in the last minutes, where it may be read."""
    now, lines = time.monotonic(), []
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        while True:
            prefix, _, text = os.read(log, 8192).decode("utf-8", "replace").partition(";")
            if now - int(prefix.split(",")[2]) / 1e6 < RECENT_S:
                lines.append(text.partition("\n")[0])
    except (OSError, ValueError, IndexError):  # the end of it, or lines were lost while it was read
        return lines
    finally:
        os.close(log)


def _free(place: Path) -> int:
    try:
        state = os.statvfs(place)
    except OSError:
        return sys.maxsize
    return state.f_bavail * state.f_frsize


def _memory() -> str:
    path = Path("/proc/meminfo")
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", path.read_text() if path.exists() else "", re.MULTILINE))
    if "MemTotal" not in fields:
        return "how much there is cannot be told"
    return f"{int(fields.get('MemAvailable', 0)) / 1e6:.1f} of {int(fields['MemTotal']) / 1e6:.1f} GB are free now"


def _less_memory() -> str:
    return "free memory, set machine.parallel to 1 or take a smaller model, then run again"


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][-QUOTED:] if lines else ""

"""Speed and memory of a file and of a yardstick, each in a process of its own, by turns.

A process of its own makes the peak memory that of this file alone, and its first load a real one. Whatever else the
machine does changes within seconds, so the two take turns, and a ratio is that of neighbours in time. Times are wall
clock, medians where one number stands for several runs.

Both keep to the cores of the device. The file's process is ended as soon as it holds more memory than the device has: its peak
(VmHWM of proc(5)) is looked at many times a second. A limit of the address space (RLIMIT_AS) would count what is
mapped and never touched, and a control group needs rights that most people do not have.
"""

import json
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tasks.frame import crashes
from tasks.frame.cores import available
from tasks.measure.timed import CONTEXT, DECODED, peak_rss
from tasks.profiles import Limits
from tasks.variants import LLAMA, Runtime

ROUNDS = {"prefill": 3, "decode": 5}  # medians; a gate may rest on the second
WATCHED_S = 0.02  # between two looks at the memory of a process
_ROOT = Path(__file__).resolve().parents[2]  # where `tasks` is importable from


class OverMemory(Exception):
    """A process held more memory than its device has, and was ended. `peak`: bytes."""

    def __init__(self, peak: int) -> None:
        super().__init__(peak)
        self.peak = peak


def measure(
    runtime: Runtime, file: Path, yardstick: Path, prompt: Sequence[int], repeats: int, limits: Limits
) -> dict[str, Any]:
    """Load time, time to first token of `prompt`, prefill and decode speed, peak memory; those of the yardstick, a GGUF, as
    `reference`, on the same cores and with as much memory as it wants.

    Raises:
        OverMemory: the file's process held more than the device's memory.
        StageError: a process dies; of its own family, where to run it again will not help.
    """
    cores = min(limits.threads or available(), available())
    memory = limits.memory_mb * 1_000_000 if limits.memory_mb else None
    cells = max(limits.context, CONTEXT)
    with _Timed(runtime, file, cores, cells, memory) as ours, _Timed(LLAMA, yardstick, cores, cells) as theirs:
        for each in (ours, theirs):  # started side by side, timed one after the other
            each.ready()
        for each in (ours, theirs):
            each.load(prompt)
        for name, rounds in {"ttft": repeats, **ROUNDS}.items():
            for _ in range(rounds):
                ours.run(name)
                theirs.run(name)
        speedup = statistics.median(
            b / a for a, b in zip(ours.seconds["decode"], theirs.seconds["decode"], strict=True)
        )
        measured, reference = ours.summary(), theirs.summary()
    return {
        **measured,
        "decode_speedup": speedup,
        "peak_rss_ratio": measured["peak_rss_bytes"] / reference["peak_rss_bytes"],
        "prompt_tokens": len(prompt),
        "threads": cores,
        "reference": reference,
    }


class _Timed:
    """A loaded file that does, and times, what it is told."""

    def __init__(self, runtime: Runtime, file: Path, cores: int, cells: int, memory: int | None = None) -> None:
        self.file, self.memory = file, memory
        self.seconds: dict[str, list[float]] = {"ttft": [], "prefill": [], "decode": []}
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed on exit
        command = [
            sys.executable, "-m", "tasks.measure.timed", runtime.name, str(file.resolve()),
            "--threads", str(cores), "--cells", str(cells),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=_ROOT
        )
        self.load_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, line: str) -> float:
        """Send a line, return the number that comes back."""
        assert self.process.stdin
        with suppress(OSError):  # it has ended, and `answer` tells why
            print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> float:
        """The next number that it says.

        Raises:
            OverMemory: it held more memory than it may.
            StageError: it has ended.
        """
        assert self.process.stdout
        self._watch()
        try:
            return float(self.process.stdout.readline())
        except (OSError, ValueError):
            code = self.process.wait()
        self.errors.seek(0)
        raise crashes.error_for(f"measuring {self.file}", code, self.errors.read(), self.file.parent)

    def _watch(self) -> None:
        """Wait until it says something, or holds too much."""
        assert self.process.stdout
        while self.memory is not None:
            said, _, _ = select.select([self.process.stdout.fileno()], [], [], WATCHED_S)
            with suppress(OSError, ValueError):  # it has ended
                if (peak := peak_rss(self.process.pid)) > self.memory:
                    raise OverMemory(peak)
            if said:
                return

    def ready(self) -> None:
        """Wait until its runtime is imported."""
        self.answer()

    def load(self, prompt: Sequence[int]) -> None:
        """Time the loading of the file; `prompt` is that of every `ttft` and `decode`."""
        self.load_s = self.ask(json.dumps(list(prompt)))

    def run(self, name: str) -> None:
        """Time one more `ttft`, `prefill` or `decode`."""
        self.seconds[name].append(self.ask(name))

    def summary(self) -> dict[str, Any]:
        """What all that was timed comes to."""
        return {
            "load_s": self.load_s,
            **{f"ttft_p{percent}_s": _percentile(self.seconds["ttft"], percent) for percent in (50, 95, 99)},
            "prefill_tokens_per_s": CONTEXT / statistics.median(self.seconds["prefill"]),
            "decode_tokens_per_s": DECODED / statistics.median(self.seconds["decode"]),
            "peak_rss_bytes": int(self.ask("peak_rss")),
        }


def _percentile(values: Sequence[float], percent: int) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)

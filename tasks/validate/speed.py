"""Speed and memory of a file and of a yardstick, each in a process of its own, by turns.

A process of its own makes the peak memory that of this file alone, and its first load a real one. Whatever else the
machine does changes within seconds, so the two take turns, and a ratio is that of neighbours in time. Times are wall
clock, medians where one number stands for several runs.
"""

import json
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
from tasks.frame.events import doing
from tasks.models import chat
from tasks.validate.shipped import Shipped
from tasks.validate.timed import CONTEXT, DECODED
from tasks.variants import LLAMA, Runtime

ROUNDS = {"prefill": 3, "decode": 5}  # medians; a gate may rest on the second
_ROOT = Path(__file__).resolve().parents[2]  # where `tasks` is importable from


def evaluate(shipped: Shipped) -> dict[str, Any]:
    """Speed and memory of the shipped file with the prompt of middle length, those of the teacher's F16 file beside it."""
    doing("measure speed and memory")
    rows = shipped.rows
    middle = sorted(rows, key=lambda row: len(str(row)))[len(rows) // 2]
    prompt = chat.prompt_ids(shipped.tokenizer, middle[:-1])
    return measure(shipped.variant.runtime, shipped.file, shipped.yardstick, prompt, shipped.settings.repeats)


def measure(runtime: Runtime, file: Path, yardstick: Path, prompt: Sequence[int], repeats: int) -> dict[str, Any]:
    """Load time, time to first token of `prompt`, prefill and decode speed, peak memory; those of the yardstick, a GGUF, as `reference`.

    Raises:
        StageError: a process dies; of its own family, where to run it again will not help.
    """
    with _Timed(runtime, file) as ours, _Timed(LLAMA, yardstick) as theirs:
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
        "threads": available(),
        "reference": reference,
    }


class _Timed:
    """A loaded file that does, and times, what it is told."""

    def __init__(self, runtime: Runtime, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, list[float]] = {"ttft": [], "prefill": [], "decode": []}
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed on exit
        command = [
            sys.executable,
            "-m",
            "tasks.validate.timed",
            runtime.name,
            str(file.resolve()),
            "--threads",
            str(available()),
        ]
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
            StageError: it has ended.
        """
        assert self.process.stdout
        try:
            return float(self.process.stdout.readline())
        except (OSError, ValueError):
            code = self.process.wait()
        self.errors.seek(0)
        raise crashes.error_for(f"measuring {self.file}", code, self.errors.read(), self.file.parent)

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

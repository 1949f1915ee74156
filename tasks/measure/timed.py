"""`python -m tasks.measure.timed RUNTIME FILE`: load one file, then time what standard input asks for.

It says 0 when the runtime is imported. The first line of input is a prompt as token ids in JSON, so that no tokenizer is
loaded; the answer is the seconds until the file was loaded and had decoded one token. Each further line is `ttft`, `prefill` or `decode`, answered by
the seconds it took, or `peak_rss`, answered in bytes.
"""

import argparse
import faulthandler
import json
import os
import re
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from tasks.runtimes.protocol import Step
from tasks.variants import RUNTIMES

CONTEXT, DECODED = 512, 64  # tokens of the prefill and of the generation: llama-bench's pp512 and tg64
WARM_UP = 3


def main(argv: list[str] | None = None) -> int:
    faulthandler.enable()  # whoever started this process reads where native code crashed
    parser = argparse.ArgumentParser(prog="python -m tasks.measure.timed", description=__doc__)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("file", type=Path, help="what the runtime loads")
    parser.add_argument("--threads", type=int, required=True, help="and cores that it keeps to")
    parser.add_argument("--cells", type=int, default=CONTEXT, help="tokens that must fit")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    runtime = RUNTIMES[args.runtime]
    import_module(runtime.package or runtime.module.__name__)
    print(0, flush=True)
    prompt = json.loads(sys.stdin.readline())

    began = time.perf_counter()
    step: Step = runtime.module.stepper(args.file, args.threads, args.cells)
    step(prompt[:1], 0)
    print(time.perf_counter() - began, flush=True)

    prompt = prompt[: CONTEXT - DECODED]
    for _ in range(WARM_UP):
        step(prompt, 0)
    for line in sys.stdin:
        print(peak_rss() if line.strip() == "peak_rss" else _seconds(step, prompt, line.strip()), flush=True)
    return 0


def _seconds(step: Step, prompt: list[int], what: str) -> float:
    """Wall clock of one `ttft`, `prefill` or `decode`; what has to come before is not timed."""
    if what == "decode":
        token = step(prompt, 0)
        began = time.perf_counter()
        for at in range(len(prompt), len(prompt) + DECODED):
            token = step([token], at)
    else:
        tokens = prompt if what == "ttft" else (prompt * (CONTEXT // len(prompt) + 1))[:CONTEXT]
        began = time.perf_counter()
        step(tokens, 0)
    return time.perf_counter() - began


def peak_rss(process: int | None = None) -> int:
    """Bytes of memory that a process (this one by default), or one that it started, held at most (VmHWM of proc(5), in
    kibibytes there). A runtime with an environment of its own works in a process that was started.

    Raises:
        OSError: there is no such process.
        ValueError: it has ended, or the system does not tell.
    """
    process = process or os.getpid()
    status = Path(f"/proc/{process}/status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if not match:
        raise ValueError("/proc has no VmHWM: peak memory can only be measured on Linux")
    own = int(match[1]) * 1024
    if not Path(f"/proc/{process}/task/{process}/children").exists():
        raise ValueError("/proc does not tell what a process started: its peak memory cannot be measured")
    started: list[int] = []
    for each in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            started += map(int, each.read_text().split())
    for child in started:
        with suppress(OSError, ValueError):  # it has ended
            own = max(own, peak_rss(child))
    return own


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tasks.validate.measure FILE`: time one file in a process of its own; one JSON line.

A process of its own makes the peak memory that of this file alone, and its first load a real one. The
prompt comes as token ids on standard input, so that no tokenizer is loaded. Times are wall clock, medians
where one number stands for several runs.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

CONTEXT, DECODED = 512, 64  # tokens of the prefill and of the generation: llama-bench's pp512 and tg64
WARM_UP = 3

# step(tokens, position) -> the most likely next token; positions before `position` are kept
Step = Callable[[Sequence[int], int], int]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.validate.measure", description=__doc__)
    parser.add_argument("file", type=Path, help="a .gguf file or an ONNX Runtime GenAI folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=20, help="latency samples after warm-up")
    args = parser.parse_args(argv)
    prompt = json.load(sys.stdin)

    began = time.perf_counter()
    step = (_onnx if args.file.is_dir() else _gguf)(args.file, args.threads)
    step(prompt[:1], 0)
    load_s = time.perf_counter() - began
    print(json.dumps({"load_s": load_s, **_speed(step, prompt, args.repeats), "peak_rss_bytes": peak_rss()}))
    return 0


def _gguf(file: Path, threads: int) -> Step:
    from tasks.validate.llama_runtime import Session

    session = Session(file, threads=threads, cells=CONTEXT)

    def step(tokens: Sequence[int], position: int) -> int:
        if position == 0:
            session.clear()
        wanted = [False] * (len(tokens) - 1) + [True]
        logits = session.decode(tokens, range(position, position + len(tokens)), [0] * len(tokens), wanted)
        return int(logits[0].argmax())

    return step


def _onnx(folder: Path, threads: int) -> Step:
    from tasks.validate.onnx_runtime import Decoded, load

    sequence = Decoded(load(folder, threads), CONTEXT)

    def step(tokens: Sequence[int], position: int) -> int:
        sequence.cut(position)
        sequence.append(tokens)
        return sequence.next_token()

    return step


def _speed(step: Step, prompt: Sequence[int], repeats: int) -> dict[str, object]:
    prompt = list(prompt)[: CONTEXT - DECODED]
    for _ in range(WARM_UP):
        step(prompt, 0)
    first_token = [_timed(lambda: step(prompt, 0)) for _ in range(repeats)]
    fill = (prompt * (CONTEXT // len(prompt) + 1))[:CONTEXT]
    prefill = [_timed(lambda: step(fill, 0)) for _ in range(3)]

    decode = []
    for _ in range(3):
        token = step(prompt, 0)
        decode.append(_timed(partial(_generate, step, token, len(prompt))))
    return {
        "ttft_s": {f"p{percent}": _percentile(first_token, percent) for percent in (50, 95, 99)},
        "prefill_tokens_per_s": CONTEXT / statistics.median(prefill),
        "decode_tokens_per_s": DECODED / statistics.median(decode),
    }


def _generate(step: Step, token: int, position: int) -> None:
    for at in range(position, position + DECODED):
        token = step([token], at)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _percentile(values: Sequence[float], percent: int) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def peak_rss() -> int:
    """Bytes of memory this process held at most (VmHWM of proc(5), in kibibytes there)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if not found:
        raise SystemExit("/proc/self/status has no VmHWM: peak memory can only be measured on Linux")
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())

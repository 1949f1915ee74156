"""`python -m tasks.validate.timed FILE`: load one file, then time what standard input asks for.

It says 0 when the runtime is imported. The first line of input is a prompt as token ids in JSON, so that no tokenizer is
loaded; the answer is the seconds until the file was loaded and had decoded one token. Each further line is `ttft`, `prefill` or `decode`, answered by
the seconds it took, or `peak_rss`, answered in bytes.
"""

import argparse
import faulthandler
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

CONTEXT, DECODED = 512, 64  # tokens of the prefill and of the generation: llama-bench's pp512 and tg64
WARM_UP = 3

# step(tokens, position) -> the most likely next token; positions before `position` are kept
Step = Callable[[Sequence[int], int], int]


def main(argv: list[str] | None = None) -> int:
    faulthandler.enable()  # whoever started this process reads where native code crashed
    parser = argparse.ArgumentParser(prog="python -m tasks.validate.timed", description=__doc__)
    parser.add_argument("file", type=Path, help="a .gguf file or an ONNX Runtime GenAI folder")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args(argv)
    load = _onnx if args.file.is_dir() else _gguf
    import_module("onnxruntime_genai" if args.file.is_dir() else "llama_cpp")
    print(0, flush=True)
    prompt = json.loads(sys.stdin.readline())

    began = time.perf_counter()
    step = load(args.file, args.threads)
    step(prompt[:1], 0)
    print(time.perf_counter() - began, flush=True)

    prompt = prompt[: CONTEXT - DECODED]
    for _ in range(WARM_UP):
        step(prompt, 0)
    for line in sys.stdin:
        print(peak_rss() if line.strip() == "peak_rss" else _seconds(step, prompt, line.strip()), flush=True)
    return 0


def _gguf(file: Path, threads: int) -> Step:
    from tasks.runtimes.llama import Session

    session = Session(file, threads=threads, cells=CONTEXT)

    def step(tokens: Sequence[int], position: int) -> int:
        if position == 0:
            session.clear()
        wanted = [False] * (len(tokens) - 1) + [True]
        logits = session.decode(tokens, range(position, position + len(tokens)), [0] * len(tokens), wanted)
        return int(logits[0].argmax())

    return step


def _onnx(folder: Path, threads: int) -> Step:
    from tasks.runtimes.onnx_genai import Decoded, load

    sequence = Decoded(load(folder, threads), CONTEXT)

    def step(tokens: Sequence[int], position: int) -> int:
        sequence.cut(position)
        sequence.append(tokens)
        return sequence.next_token()

    return step


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


def peak_rss() -> int:
    """Bytes of memory this process held at most (VmHWM of proc(5), in kibibytes there)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if not found:
        raise SystemExit("/proc/self/status has no VmHWM: peak memory can only be measured on Linux")
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())

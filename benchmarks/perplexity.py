"""Our perplexity and KL divergence against llama.cpp's own llama-perplexity: do they agree, and how fast.

Both score the same windows of the same text with the same two files, an F16 reference and a quantized file.
llama-perplexity is built from the source package that the installed llama-cpp-python was compiled from, with
the same options, so both sides run the same kernels. It needs two passes and a file of the reference's
logits; ours sees both models window by window. Timed is the scoring alone: no start, no loading of models,
no tokenizing. Rounds alternate and the medians count. Prints one JSON object; exit code 1 when the numbers
differ by more than 1e-3 or ours is slower than 0.8 of theirs.

    python benchmarks/perplexity.py [--reference F16.gguf --file QUANTIZED.gguf]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
AGREEMENT, SPEED = 1e-3, 0.8
# As the package's own build has them; the rest is llama.cpp's default (native instructions, OpenMP, Release).
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=ROOT / "build" / "convert" / "student.gguf")
    parser.add_argument("--file", type=Path, default=ROOT / "build" / "quantize" / "q4_0" / "model.gguf")
    parser.add_argument("--text", type=Path, help="plain text (default: what people say in data/home)")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)  # the child that is timed
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(score(args)))
        return 0

    program = llama_perplexity()
    with tempfile.TemporaryDirectory(prefix="perplexity.", dir=CACHE) as folder:
        if not args.text:
            args.text = Path(folder) / "text.txt"
            args.text.write_text(utterances(), encoding="utf-8")
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(run_ours(args))
            theirs.append(run_theirs(args, program, Path(folder) / "logits"))
    tokens = 2 * args.windows * args.context  # both models see every token
    speed = {
        name: tokens / statistics.median(r["seconds"] for r in runs)
        for name, runs in (("ours", ours), ("llama_perplexity", theirs))
    }
    numbers = {
        name: {key: value for key, value in runs[0].items() if key != "seconds"}
        for name, runs in (("ours", ours), ("llama_perplexity", theirs))
    }
    differences = {
        key: abs(ours[0][key] - theirs[0][key]) / theirs[0][key]
        for key in ("perplexity", "reference_perplexity", "mean_kld")
    }
    ratio = speed["ours"] / speed["llama_perplexity"]
    report = {
        "benchmark": "perplexity", "llama_cpp_python": version("llama-cpp-python"), "threads": args.threads,
        "windows": args.windows, "context": args.context, "rounds": args.rounds, "file": args.file.name,
        "numbers": numbers, "relative_difference": differences, "tokens_per_s": speed, "speed_ratio": ratio,
        "agrees": max(differences.values()) <= AGREEMENT, "fast_enough": ratio >= SPEED,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    return 0 if report["agrees"] and report["fast_enough"] else 1


def score(args: argparse.Namespace) -> dict[str, float]:
    """What the validate stage computes, timed without loading the models."""
    import torch

    from tasks.runtimes import llama
    from tasks.validate import likelihood

    torch.set_num_threads(args.threads)
    with (
        llama.window_logits(args.reference, args.context, args.threads) as base,
        llama.window_logits(args.file, args.context, args.threads) as file,
    ):
        tokens = base.session.tokenize(args.text.read_text(encoding="utf-8"))
        windows = likelihood.split(tokens, args.context, args.windows, base.session.window_start())
        if len(windows) < args.windows:
            sys.exit(f"error: {args.text} makes only {len(windows)} windows of {args.context} tokens")
        began = time.perf_counter()
        found = likelihood.compare(base, file, windows)
        seconds = time.perf_counter() - began
    return {
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
        "mean_kld": found.mean_kld,
        "same_top_token": found.same_top_token,
        "seconds": seconds,
    }


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--ours"]
    for name in ("reference", "file", "text", "windows", "context", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_theirs(args: argparse.Namespace, program: Path, logits: Path) -> dict[str, float]:
    """Two passes: the reference's logits into a file, then the quantized file against them."""
    common = ["-f", args.text, "-c", args.context, "--chunks", args.windows, "-t", args.threads]
    first, seconds = timed(
        [program, "-m", args.reference, *common, "--save-all-logits", logits], "calculating perplexity"
    )
    second, more = timed(
        [program, "-m", args.file, *common, "--kl-divergence", "--kl-divergence-base", logits], "computing over"
    )
    logits.unlink()
    return {
        "perplexity": number(r"Mean PPL\(Q\)\s*:\s*([\d.]+)", second),
        "reference_perplexity": number(r"Final estimate: PPL = ([\d.]+)", first),
        "mean_kld": number(r"Mean\s+KLD:\s*([\d.]+)", second),
        "same_top_token": number(r"Same top p:\s*([\d.]+)", second) / 100,
        "seconds": seconds + more,
    }


def timed(command: list[object], start: str) -> tuple[str, float]:
    """Output of a command, and the seconds from the line that says `start` to its end."""
    lines, began = [], None
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if began is None and start in line:
                began = time.perf_counter()
    ended = time.perf_counter()
    if process.returncode or began is None:
        sys.exit("error: llama-perplexity failed:\n" + "".join(lines[-5:]))
    return "".join(lines), ended - began


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        sys.exit(f"error: llama-perplexity printed no {pattern}")
    return float(found[1])


def utterances() -> str:
    """What people say in the shipped data, a line each: short, plain English that makes enough windows."""
    from tasks.frame import jsonl

    rows = [row for name in ("unlabelled", "train") for row in jsonl.read(ROOT / "data" / "home" / f"{name}.jsonl")]
    return "\n".join(m["content"] for row in rows for m in row["messages"] if m["role"] == "user") + "\n"


def llama_perplexity() -> Path:
    """The program, built once (some minutes) from the installed package's own source."""
    release = version("llama-cpp-python")
    home = CACHE / f"llama-perplexity-{release}"
    program = home / "build" / "bin" / "llama-perplexity"
    if program.is_file():
        return program
    CACHE.mkdir(exist_ok=True)
    archive = CACHE / f"llama_cpp_python-{release}.tar.gz"
    if not archive.is_file():
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
                "-d",
                CACHE,
                f"llama-cpp-python=={release}",
            ]
        )
    top = f"llama_cpp_python-{release}/vendor/llama.cpp"
    with tarfile.open(archive) as tar:
        tar.extractall(home, [each for each in tar if each.name.startswith(f"{top}/")], filter="data")
    run(["cmake", "-S", home / top, "-B", home / "build", *FLAGS])
    run(
        ["cmake", "--build", home / "build", "--target", "llama-perplexity", "--parallel", len(os.sched_getaffinity(0))]
    )
    return program


def run(command: list[object]) -> None:
    """A build step; its output goes to standard error, so that standard output stays one JSON object."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""OpenVINO folders in an environment of their own: greedy answers row by row, logits of windows."""

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.frame import confined
from tasks.models import sizes
from tasks.models.chat import Messages
from tasks.runtimes import environments, one_sequence
from tasks.runtimes.protocol import Hopeless, Logits, PromptReader, Step, WindowLogits
from tasks.runtimes.worker import Worker
from tasks.variants import RUNTIMES


def _loaded(folder: Path, threads: int) -> Worker:
    worker = Worker(RUNTIMES["openvino"])
    worker.call("load", str(folder.resolve()), threads)
    return worker


def export(source: Path, made: Path, options: Sequence[str], scratch: Path) -> tuple[int, str]:
    """Have its exporter write the folder `made` of a Hugging Face folder; returns its exit code and what it said.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    python = environments.interpreter(RUNTIMES["openvino"])
    command: list[str | Path] = [
        python,
        "-I",
        "-m",
        "optimum.commands.optimum_cli",
        "export",
        "openvino",
        "--model",
        source.resolve(),
    ]
    done = subprocess.run(
        [*command, "--task", "text-generation-with-past", *options, made], cwd=scratch, env=confined.environment(scratch),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def answers(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    limit: int,
    threads: int,
    advance: Callable[[int], None],
    hopeless: Hopeless = lambda row, answer: False,
) -> list[list[int]]:
    """What greedy decoding generates for each prompt: see `one_sequence.answers`."""
    with _loaded(folder, threads) as worker:

        def best(tokens: Sequence[int], position: int, last: int) -> list[int]:
            found: list[int] = worker.call("best", list(tokens), position, last)
            return found

        return one_sequence.answers(best, prompts, drafts, stops=stops, limit=limit, advance=advance, hopeless=hopeless)


@contextmanager
def window_logits(folder: Path, context: int, threads: int) -> Iterator[WindowLogits]:
    """Yield `logits(window, first)`: those of every position from `first` on but the last, (n, vocabulary)."""
    with _loaded(folder, threads) as worker:

        def logits(window: Sequence[int], first: int) -> Logits:
            return worker.call("logits", list(window), first)

        yield logits


def stepper(folder: Path, threads: int, cells: int) -> Step:
    """What is timed: one sequence."""
    worker = _loaded(folder, threads)

    def step(tokens: Sequence[int], position: int) -> int:
        (token,) = worker.call("best", list(tokens), position, 1)
        return int(token)

    return step


def prompt_reader(folder: Path) -> PromptReader:
    """OpenVINO GenAI's tokenizer with its own template engine."""
    worker = Worker(RUNTIMES["openvino"])
    worker.call("load_tokenizer", str(folder.resolve()))

    def ids(messages: Messages) -> list[int]:
        found: list[int] = worker.call("prompt_ids", list(messages))
        return found

    return PromptReader(ids, frozenset(worker.call("stop_ids", str(folder.resolve()))))


OVERHEAD = 160_000_000  # bytes: the library itself


def minimum_memory(weights: int, config: Mapping[str, Any], context: int) -> int:
    """Bytes resident while one conversation fills the context: weights, which are mapped and repacked as they load, a
    key-value cache in float32, and for the whole prompt at once logits.

    Raises:
        ArtifactError: the configuration lacks one of the sizes.
    """
    heads, vocabulary = sizes.widths(config, "num_attention_heads", "vocab_size")
    scratch = 4 * context * (heads * context + vocabulary)
    return 2 * weights + 4 * sizes.cached_values(config, context) + scratch + OVERHEAD

"""ONNX folders in ONNX Runtime GenAI: greedy answers row by row, logits of windows."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, ConfigError, StageError
from tasks.frame.stage import read_json
from tasks.models import sizes
from tasks.models.chat import Messages
from tasks.runtimes import one_sequence
from tasks.runtimes.protocol import Hopeless, Logits, PromptReader, Step, WindowLogits


def load(folder: Path, threads: int) -> Any:
    """An `onnxruntime_genai.Model`.

    Raises:
        ArtifactError: the runtime cannot load it.
    """
    import onnxruntime_genai as og

    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    try:
        config = og.Config(str(folder))
        config.overlay(json.dumps(options))
        return og.Model(config)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: ONNX Runtime GenAI cannot load it: {error}: make the folder again") from error


class Decoded:
    """One growing sequence of at most `most` tokens, which can be cut back.

    Raises:
        ConfigError: the model was not made for so many.
    """

    def __init__(self, model: Any, most: int) -> None:
        import onnxruntime_genai as og

        params = og.GeneratorParams(model)
        params.set_search_options(max_length=most, do_sample=False)
        try:
            self._generator = og.Generator(model, params)
        except RuntimeError as error:
            raise ConfigError(
                f"ONNX Runtime GenAI cannot hold {most} tokens: {error}: lower validate.context or task.max_new_tokens"
            ) from error

    def append(self, tokens: Sequence[int]) -> None:
        """Compute these tokens.

        Raises:
            StageError: the runtime refuses them.
        """
        import numpy as np

        try:
            self._generator.append_tokens(np.array(tokens, np.int32))
        except RuntimeError as error:
            raise StageError(f"ONNX Runtime GenAI stopped on {len(tokens)} tokens: {error}") from error

    def logits(self) -> Logits:
        """(n, vocabulary) of the n tokens appended last."""
        logits: Logits = self._generator.get_output("logits")[0]
        return logits

    def next_token(self) -> int:
        """The most likely next token; copies one row of logits only."""
        return int(self._generator.get_logits().argmax())

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._generator.rewind_to(length)


@contextmanager
def window_logits(folder: Path, context: int, threads: int) -> Iterator[WindowLogits]:
    """Yield `logits(window, first)`: those of every position from `first` on but the last, (n, vocabulary)."""
    model = load(folder, threads)
    sequence = Decoded(model, context)

    def logits(window: Sequence[int], first: int) -> Logits:
        sequence.cut(0)
        sequence.append(window)
        return sequence.logits()[first:-1]

    yield logits


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
    model = load(folder, threads)
    longest = max(len(prompt) + max(len(draft), limit) for prompt, draft in zip(prompts, drafts, strict=True))
    sequence = Decoded(model, longest + 1)

    def best(tokens: Sequence[int], position: int, last: int) -> list[int]:
        sequence.cut(position)
        sequence.append(tokens)
        if last == 1:
            return [sequence.next_token()]
        found: list[int] = sequence.logits()[-last:].argmax(axis=1).tolist()
        return found

    return one_sequence.answers(best, prompts, drafts, stops=stops, limit=limit, advance=advance, hopeless=hopeless)


def stepper(folder: Path, threads: int, cells: int) -> Step:
    """What is timed: one sequence of at most `cells` tokens."""
    sequence = Decoded(load(folder, threads), cells)

    def step(tokens: Sequence[int], position: int) -> int:
        sequence.cut(position)
        sequence.append(tokens)
        return sequence.next_token()

    return step


def prompt_reader(folder: Path) -> PromptReader:
    """ONNX Runtime GenAI's tokenizer with its own template engine.

    Raises:
        ArtifactError: the folder cannot be loaded.
    """
    import onnxruntime_genai as og

    try:
        tokenizer = og.Tokenizer(og.Model(str(folder)))
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: ONNX Runtime GenAI cannot load it ({error}): run `quantize` again") from error

    def ids(messages: Messages) -> list[int]:
        # No template is handed in: the folder's own is what a person who runs it gets.
        prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return [int(i) for i in tokenizer.encode(prompt)]

    listed = read_json(folder / "genai_config.json")["model"].get("eos_token_id")
    return PromptReader(ids, frozenset(listed if isinstance(listed, list) else [listed]))


OVERHEAD = 64_000_000  # bytes, as for llama.cpp, measured with onnxruntime-genai 0.14.1 on x86-64


def minimum_memory(weights: int, config: Mapping[str, Any], context: int) -> int:
    """Bytes resident while one conversation fills the context: weights that are held twice while they load, a key-value
    cache in float32 (on the CPU), and for the whole prompt at once attention scores and logits.

    Raises:
        ArtifactError: the configuration lacks one of the sizes.
    """
    heads, vocabulary = sizes.widths(config, "num_attention_heads", "vocab_size")
    scratch = 4 * context * (heads * context + vocabulary)
    return 2 * weights + 4 * sizes.cached_values(config, context) + scratch + OVERHEAD

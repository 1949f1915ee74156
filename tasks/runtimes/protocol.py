"""What a runtime's module offers. Files are as the quantizer wrote them; token ids are the tokenizer's."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Logits = Any  # a float32 NumPy array (tokens, vocabulary)
Messages = Sequence[Mapping[str, str]]
Hopeless = Callable[[int, Sequence[int]], bool]  # of a row and the beginning of its answer: no end can make it right
# logits(window, first): of every position from `first` on but the last, (n, vocabulary)
WindowLogits = Callable[[Sequence[int], int], Logits]
# step(tokens, position) -> the most likely next token; positions before `position` are kept
Step = Callable[[Sequence[int], int], int]


@dataclass(frozen=True)
class PromptReader:
    """How a runtime reads a conversation by the file's own chat template."""

    ids: Callable[[Any], list[int]]
    stop_ids: frozenset[int]  # generation ends at these
    adds_bos: bool = False  # llama.cpp's own server and Ollama put the bos token before a rendered prompt


class RuntimeModule(Protocol):
    """A module of this room."""

    def answers(
        self,
        file: Path,
        prompts: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        *,
        stops: Sequence[int],
        limit: int,
        threads: int,
        advance: Callable[[int], None],
        hopeless: Hopeless,
    ) -> list[list[int]]:
        """What greedy decoding generates for each prompt, without its stop token, at most `limit` tokens. Drafts only
        speed it up, and a hopeless answer is cut.
        """

    def window_logits(self, file: Path, context: int, threads: int) -> AbstractContextManager[WindowLogits]:
        """The file loaded for windows of at most `context` tokens."""

    def stepper(self, file: Path, threads: int, cells: int) -> Step:
        """The file loaded for one sequence of at most `cells` tokens: what is timed."""

    def prompt_reader(self, file: Path) -> PromptReader:
        """The file's own template and tokenizer."""

    def minimum_memory(self, weights: int, config: Mapping[str, Any], context: int) -> int:
        """Bytes of memory for a file of `weights` bytes with `context` tokens, from a Hugging Face configuration."""

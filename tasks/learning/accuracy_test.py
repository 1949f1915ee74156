"""A model in torch takes the test: its greedy answers to the test rows, with accuracy, size and classes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.frame import events
from tasks.learning.generation import answers
from tasks.models import loading
from tasks.models.chat import encode_all, read_rows
from tasks.models.params import Task
from tasks.models.scoring import accuracy, judged, load, per_group

SAMPLE = 400  # test rows that tell what a model was as acquired, and pruned: no verdict rests on them


@dataclass(frozen=True)
class Taken:
    """What a model answered, whether each answer is right, and the facts that reports show."""

    answers: list[str]
    correct: list[bool]
    facts: dict[str, Any]


class AccuracyTest:
    """The test split of what `acquire` made, in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], task: Task, source: Path) -> None:
        rows = read_rows(source / "data" / "test.jsonl")
        self._tokenizer, self._stops, self._limit = tokenizer, stops, task.max_new_tokens
        self._encoded = encode_all(tokenizer, rows, task.max_length)
        self._metric = load(task.metric, source)
        self.references = [row[-1]["content"] for row in rows]

    def take(self, name: str, model: Any, most: int = sys.maxsize) -> Taken:
        """Let a model answer the test split, or `most` of its rows, evenly spread."""
        total = len(self.references)
        chosen = [i * total // most for i in range(most)] if most < total else list(range(total))
        references = [self.references[i] for i in chosen]
        encoded = [self._encoded[i] for i in chosen]
        said = answers(
            model, self._tokenizer, encoded, references, self._stops, self._limit, self._metric, f"test {name}"
        )
        correct = judged(self._metric, said, references, "test.jsonl")
        facts = {
            "accuracy": accuracy(correct),
            "rows": len(chosen),
            "parameters": loading.count(model),
            "layers": model.config.num_hidden_layers,
            "per_group": per_group(references, correct),
        }
        which = "the acquired model, before any training" if name == "base" else name
        events.note(f"{which}: accuracy {accuracy(correct):.3f}, {loading.count(model) / 1e6:.1f} M parameters")
        return Taken(said, correct, facts)

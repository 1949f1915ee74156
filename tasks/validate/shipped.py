"""All that a metric may look at: the shipped file with its runtime, what it is held against, and the test rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.frame.cores import threads
from tasks.frame.events import progress
from tasks.models import chat, scoring
from tasks.models.params import Task
from tasks.runtimes.protocol import RuntimeModule
from tasks.validate.params import Validate
from tasks.variants import Variant


@dataclass(frozen=True)
class Shipped:
    """One variant's file. `reference` is the student's F16 GGUF, `yardstick` the teacher's."""

    variant: Variant
    file: Path
    reference: Path
    yardstick: Path
    rows: Sequence[chat.Messages]  # of the test split, each with its reference answer
    taught: Sequence[bool]  # whether the teacher was right on each
    text: Path  # for perplexity, where it came with the data
    tokenizer: Any
    stops: Sequence[int]  # token ids that end a turn
    scorer: scoring.Metric
    task: Task
    settings: Validate

    @property
    def runtime(self) -> RuntimeModule:
        module: RuntimeModule = self.variant.runtime.module
        return module

    @cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """Reference, greedy answer, whether they agree, and whether the teacher's does, for every test row. An answer that
        can no longer match is cut where that is certain.
        """
        references = [row[-1]["content"] for row in self.rows]
        drafts = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.stops[0]] for text in references]

        def text(ids: Sequence[int]) -> str:
            decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True)
            return decoded

        def hopeless(row: int, answer: Sequence[int]) -> bool:
            return scoring.hopeless(self.scorer, text(answer), references[row])

        with progress("answer test rows", len(self.rows), "rows") as advance:
            ids = self.runtime.answers(
                self.file, [chat.prompt_ids(self.tokenizer, row[:-1]) for row in self.rows], drafts,
                stops=self.stops, limit=self.task.max_new_tokens, threads=threads(), advance=advance,
                hopeless=hopeless,
            )  # fmt: skip
        answers = list(map(text, ids))
        correct = scoring.judged(self.scorer, answers, references, "test.jsonl")
        return [
            {"reference": reference, "answer": answer, "correct": right, "teacher_correct": teacher}
            for reference, answer, right, teacher in zip(references, answers, correct, self.taught, strict=True)
        ]


def size(file: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if file.is_file():
        return file.stat().st_size
    return sum(each.stat().st_size for each in file.rglob("*") if each.is_file())

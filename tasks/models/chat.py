"""Chat rows and their tokens: `{"messages": [{"role", "content"}, ...]}`, one JSON object a line.

Rows were validated by `acquire`; here they are trusted. The loss mask covers what the assistant says and
its end-of-turn token, never the prompt, the template or padding, nor an answer with `"weight": 0`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError
from tasks.frame import jsonl
from tasks.models import dated

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """One row: `ids` of the whole conversation; `target[i]` says whether ids[i] is learned."""

    ids: list[int]
    target: list[bool]

    @property
    def answer_start(self) -> int:
        """Index of the first token of the last run of targets."""
        last = len(self.target) - 1 - self.target[::-1].index(True)
        start = last
        while start > 0 and self.target[start - 1]:
            start -= 1
        return start


def read_rows(path: Path) -> list[Messages]:
    """The conversations of a JSONL file that `acquire` wrote."""
    return [row["messages"] for row in jsonl.read(path)]


def write_encoded(path: Path, rows: Sequence[Encoded]) -> None:
    """Keep rows as token ids."""
    jsonl.write(path, ({"ids": row.ids, "target": row.target} for row in rows))


def read_encoded(path: Path) -> list[Encoded]:
    """The rows that `write_encoded` kept."""
    return [Encoded(row["ids"], row["target"]) for row in jsonl.read(path)]


def encoded_split(tokenizer: Any, acquired: Path, split: str, max_length: int) -> list[Encoded]:
    """The rows of one split of what `acquire` made, as token ids.

    Raises:
        ConfigError: a row is longer than `max_length` tokens.
    """
    return encode_all(tokenizer, read_rows(acquired / "data" / f"{split}.jsonl"), max_length)


def prompt_ids(tokenizer: Any, messages: Messages, *, today: bool = False) -> list[int]:
    """Ids of a conversation that waits for the assistant, as every runtime must produce them.

    A template that writes the day is given one that never changes, or the present one.
    """
    day = {} if today else dated.fixed(tokenizer)
    ids: list[int] = tokenizer.apply_chat_template(
        plain(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **day
    )
    return ids


def plain(messages: Messages) -> Messages:
    """Role and content alone, as a chat template expects them."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def answer_ids(tokenizer: Any, message: Mapping[str, Any]) -> list[int]:
    """Ids of what the assistant says, with the end of its turn."""
    ids: list[int] = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
    return [*ids, end_of_turn(tokenizer)]  # type: ignore[list-item]


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the token with which the chat template ends what the assistant says; the eos token where it has none there.

    The two differ in many models: Gemma's turns end with `<end_of_turn>`, Phi's with `<|end|>`.
    """
    return _end_of_turn(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=4)
def _end_of_turn(tokenizer: Any, template: str) -> int | None:
    from jinja2 import TemplateError

    mark = "mark-of-an-answer"
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
    eos: int | None = tokenizer.eos_token_id
    try:
        after = tokenizer.apply_chat_template(talk, tokenize=False).partition(mark)[2].lstrip()
    except TemplateError:
        return eos
    first: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    return first[0] if first and first[0] in tokenizer.added_tokens_decoder else eos


def encode(tokenizer: Any, messages: Messages, max_length: int) -> Encoded:
    """Tokens and loss mask of a whole conversation that ends with the assistant.

    Raises:
        ConfigError: the row is longer than `max_length`.
    """
    ids: list[int] = []
    target: list[bool] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = prompt_ids(tokenizer, messages[:index])
        answer, learned = answer_ids(tokenizer, message), message.get("weight") != 0
        # A template that rewrites earlier turns (dropped reasoning, say) makes the prompt the truth.
        known = len(ids) if prompt[: len(ids)] == ids else 0
        ids, target = prompt + answer, target[:known] + [False] * (len(prompt) - known) + [learned] * len(answer)
    if len(ids) > max_length:
        raise ConfigError(
            f"a row has {len(ids)} tokens, more than task.max_length ({max_length}): raise it or shorten the row: {str(messages)[:120]}"
        )
    return Encoded(ids, target)


def encode_all(tokenizer: Any, rows: Sequence[Messages], max_length: int) -> list[Encoded]:
    """Encode every row."""
    return [encode(tokenizer, row, max_length) for row in rows]

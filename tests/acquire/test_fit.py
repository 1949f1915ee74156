"""Rows against the limits of the task and the window of the model, told by file and line before any work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.acquire import fit, rows
from tasks.errors import ConfigError
from tasks.models import chat, loading
from tasks.models.params import Task


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer_folder: Path) -> Any:
    return loading.load_tokenizer(real_tokenizer_folder)


def row(where: str, asked: str = "where is it", said: str = "here") -> rows.Row:
    return rows.Row(where, [{"role": "user", "content": asked}, {"role": "assistant", "content": said}])


def check(tokenizer: Any, splits: dict[str, list[rows.Row]], window: int | None = 512, **limits: int) -> None:
    config = SimpleNamespace(vocab_size=len(tokenizer), max_position_embeddings=window)
    fit.check(tokenizer, config, splits, Task(**{"max_length": 128, "max_new_tokens": 16, **limits}))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_answer_that_may_not_be_given_whole_is_named_with_the_limit_that_would_do(
    tokenizer: Any, split: str
) -> None:
    said = "one two three four five six seven eight nine ten"
    tokens = len(tokenizer(said)["input_ids"])
    splits = {"train": [row("train:1")], split: [row(f"{split}:1"), row(f"{split}:2", said=said)]}
    check(tokenizer, splits, max_new_tokens=tokens)
    with pytest.raises(ConfigError, match=rf"task\.max_new_tokens .* {tokens + 1}:(?s:.*){split}:2: ") as caught:
        check(tokenizer, splits, max_new_tokens=tokens - 1)
    assert f"{split}:1: " not in str(caught.value)


def test_rows_longer_than_the_window_are_refused_whatever_the_limit_is(tokenizer: Any) -> None:
    splits = {"train": [row("train:1"), row("train:2", asked="again and " * 40)]}
    length = len(chat.encode(tokenizer, splits["train"][1].messages, 512).ids)
    check(tokenizer, splits, window=length)
    check(tokenizer, splits, window=None)
    with pytest.raises(ConfigError, match=rf"window .*{length - 1} tokens(?s:.*)train:2: ") as caught:
        check(tokenizer, splits, window=length - 1)
    assert "max_length" not in str(caught.value)


def test_an_unlabelled_prompt_has_no_answer_to_be_long(tokenizer: Any) -> None:
    prompt = rows.Row("u:1", [{"role": "user", "content": "one two three four five six seven eight nine ten"}])
    check(tokenizer, {"unlabelled": [prompt]}, max_new_tokens=1)


def test_a_huge_row_is_refused_without_being_cut_into_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "prompt_ids", None)  # would be a TypeError
    with pytest.raises(ConfigError, match="train:1: 4,000,0"):
        check(tokenizer, {"train": [row("train:1", asked="x y " * 1_000_000)]})


def test_all_kinds_of_problems_are_told_at_once(tokenizer: Any) -> None:
    splits = {"train": [row("train:1", asked="again and " * 80), row("train:2", said="word " * 20)]}
    with pytest.raises(ConfigError, match=r"max_length(?s:.*)max_new_tokens(?s:.*)train:1(?s:.*)train:2"):
        check(tokenizer, splits)


def test_an_answer_of_weight_0_is_read_and_not_learned(tokenizer: Any) -> None:
    def turns(**extra: int) -> chat.Messages:
        first = {"role": "assistant", "content": "wrong", **extra}
        asked = {"role": "user", "content": "where is it"}
        return [asked, first, asked, {"role": "assistant", "content": "here"}]

    plain, weighted = (chat.encode(tokenizer, each, 128) for each in (turns(), turns(weight=0)))
    assert plain.ids == weighted.ids
    dropped = [token for token, a, b in zip(plain.ids, plain.target, weighted.target, strict=True) if a and not b]
    assert tokenizer.decode(dropped, skip_special_tokens=True) == "wrong"
    assert weighted.target[weighted.answer_start :] == plain.target[plain.answer_start :]

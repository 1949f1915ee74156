"""The data set that ships is what its generator writes, and its splits share neither phrasing nor slot value."""

import itertools
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

from tasks.acquire import near_duplicates

DATA = ROOT / "data"
SPLITS = ("train", "validation", "test")
KEYS = {
    "temperature": ["action", "room", "value"],
    "light": ["action", "room", "state"],
    "dim": ["action", "room", "value"],
    "timer": ["action", "value", "unit"],
    "alarm": ["action", "time"],
    "play": ["action", "music", "room"],
    "lock": ["action", "door", "state"],
    "add": ["action", "item"],
    "call": ["action", "name"],
    "weather": ["action", "place", "day"],
    "blinds": ["action", "room", "state"],
    "none": ["action"],
}
CLOSED = {"action", "state", "unit"}  # a few fixed words each, in every split


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    """The names that data/generate.py defines (run by path, so that no byte code is left in data/)."""
    return runpy.run_path(str(DATA / "generate.py"))


@pytest.fixture(scope="module")
def messages() -> dict[str, list[list[dict[str, str]]]]:
    return {
        path.stem: [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (DATA / "home").glob("*.jsonl")
    }


@pytest.fixture(scope="module")
def answers(messages: dict[str, list]) -> dict[str, list[dict[str, Any]]]:
    return {split: [json.loads(row[-1]["content"]) for row in messages[split]] for split in SPLITS}


def said(row: list[dict[str, str]]) -> str:
    return row[1]["content"]


@pytest.mark.slow
def test_generating_again_gives_the_same_bytes(generator: dict[str, Any], tmp_path: Path) -> None:
    generate: Callable[[Path], dict[str, int]] = generator["generate"]
    counts = generate(tmp_path)
    assert counts == {"test": 1600, "validation": 600, "train": 10000, "unlabelled": 2000}
    for split in counts:
        again, shipped = (tmp_path / f"{split}.jsonl").read_bytes(), (DATA / "home" / f"{split}.jsonl").read_bytes()
        assert again == shipped, f"data/home/{split}.jsonl is not what data/generate.py writes: run it"


def test_rows_are_one_system_one_user_and_one_json_answer(messages: dict[str, list]) -> None:
    assert {split: len(rows) for split, rows in messages.items()} == {
        "train": 10000, "validation": 600, "test": 1600, "unlabelled": 2000,
    }  # fmt: skip
    for split, rows in messages.items():
        roles = ["system", "user"] + ["assistant"] * (split != "unlabelled")
        for row in rows:
            assert [message["role"] for message in row] == roles
            assert row[0]["content"] == "Reply with one JSON action."
            assert said(row) == said(row).strip() != ""


def test_answers_have_the_keys_of_their_action_in_order(
    messages: dict[str, list], answers: dict[str, list[dict[str, Any]]]
) -> None:
    for split in SPLITS:
        for row, answer in zip(messages[split], answers[split], strict=True):
            expected = [key for key in KEYS[answer["action"]] if key != "room" or "room" in answer]
            assert list(answer) == expected
            assert row[2]["content"] == json.dumps(answer, separators=(",", ":"))
            assert "room" in answer or "room" not in KEYS[answer["action"]] or answer["action"] == "play"


def test_word_values_are_copied_as_they_were_said(messages: dict[str, list], answers: dict[str, list]) -> None:
    for split in SPLITS:
        for row, answer in zip(messages[split], answers[split], strict=True):
            for key in answer.keys() & {"room", "door", "name", "item", "music", "place", "day"}:
                assert answer[key] in said(row), (said(row), answer)


def test_numbers_and_times_can_be_read_off_the_message(messages: dict[str, list], answers: dict[str, list]) -> None:
    digits = 0
    for row, answer in itertools.chain.from_iterable(zip(messages[s], answers[s], strict=True) for s in SPLITS):
        if any(char.isdigit() for char in said(row)) and answer["action"] in ("temperature", "dim", "timer"):
            assert str(answer["value"]) in said(row), (said(row), answer)
            digits += 1
        if answer["action"] == "alarm":
            hour, minute = answer["time"].split(":")
            assert 1 <= int(hour) <= 23
            assert 0 <= int(minute) < 60
            if re.search(r"\d:", said(row)):
                assert f":{minute}" in said(row)
    assert digits > 300


def test_actions_are_balanced_and_none_is_fifteen_percent(answers: dict[str, list]) -> None:
    for split in SPLITS:
        counts = Counter(answer["action"] for answer in answers[split])
        assert set(counts) == set(KEYS)
        assert counts.pop("none") == 0.15 * len(answers[split])
        assert max(counts.values()) - min(counts.values()) <= 1


def test_every_action_has_its_phrasings_and_no_two_splits_share_one(generator: dict[str, Any]) -> None:
    table = generator["phrasings"]()
    for action in KEYS:
        found = {split: [template for _, template in table[split][action]] for split in SPLITS}
        assert len(found["train"]) >= 25
        assert sum(map(len, found.values())) >= 40
        assert len(found["test"]) >= 10
        assert len(found["validation"]) >= 5
    every = [(split, template) for split in SPLITS for rows in table[split].values() for _, template in rows]
    assert len({template for _, template in every}) == len(every)


def test_no_held_out_phrasing_is_a_politer_form_of_another(generator: dict[str, Any]) -> None:
    """ "can you lock the {door}" must not be tested when train has "lock the {door}", which may be said politely."""
    around = generator["GREETINGS"] + generator["ASKS"] + generator["ENDINGS"]
    around += generator["LEADS"] + generator["REQUEST_LEADS"] + generator["TAILS"]

    def bare(text: str) -> str:
        shorter = text.rstrip("?").replace("{degrees}", "{number}")
        for extra, gap in itertools.product(around, (" ", ", ")):
            shorter = shorter.removeprefix(extra + gap).removesuffix(gap + extra)
        return shorter if shorter == text else bare(shorter)

    found: dict[str, str] = {}
    for rows in itertools.chain.from_iterable(part.values() for part in generator["phrasings"]().values()):
        for _, template in rows:
            for text in {bare(re.sub(r"\((\w+)\|(\w+)\)", side, template)) for side in (r"\1", r"\2")}:
                assert text not in found, f"{template!r} and {found[text]!r}"
                found[text] = template


def test_no_slot_value_is_in_two_splits(generator: dict[str, Any], answers: dict[str, list]) -> None:
    table = generator["slots"]()
    for slot in table["train"]:
        values = [value for split in (*SPLITS, "extra") for value in table[split][slot]]
        assert len(values) == len(set(values)), slot
        assert all(table[split][slot] for split in table), slot
    for first, second in itertools.combinations(SPLITS, 2):
        for key in {key for keys in KEYS.values() for key in keys} - CLOSED:
            seen = [{answer[key] for answer in answers[split] if key in answer} for split in (first, second)]
            assert all(seen), key
            assert not seen[0] & seen[1], (key, first, second)


def test_no_held_out_word_value_occurs_in_train_or_unlabelled(
    generator: dict[str, Any], messages: dict[str, list]
) -> None:
    table = generator["slots"]()
    trained = "\n".join(f" {generator['plain'](said(row))} " for row in messages["train"] + messages["unlabelled"])
    held_out = [
        value for split in ("validation", "test") for values in table[split].values() for value in values
        if isinstance(value, str)
    ]  # fmt: skip
    assert len(held_out) > 150
    assert [value for value in held_out if f" {value} " in trained] == []


def test_unlabelled_prompts_bring_values_that_train_does_not_have(
    generator: dict[str, Any], messages: dict[str, list]
) -> None:
    extra = generator["slots"]()["extra"]["room"]
    for room in extra:
        assert any(room in said(row) for row in messages["unlabelled"])
        assert not any(room in said(row) for row in messages["train"])


def test_no_message_comes_twice_nor_nearly_twice_across_splits(messages: dict[str, list]) -> None:
    where = {split: [near_duplicates.normalise(said(row)) for row in rows] for split, rows in messages.items()}
    counts = Counter(itertools.chain.from_iterable(where.values()))
    assert [text for text, count in counts.items() if count > 1] == []
    split_of = {text: split for split, texts in where.items() for text in texts}
    texts = list(split_of)
    close = [(texts[a], texts[b]) for a, b, _ in near_duplicates.pairs(texts, 0.9)]
    may = {("train", "unlabelled"), ("unlabelled", "train")}
    assert [
        pair for pair in close
        if split_of[pair[0]] != split_of[pair[1]] and (split_of[pair[0]], split_of[pair[1]]) not in may
    ] == []  # fmt: skip

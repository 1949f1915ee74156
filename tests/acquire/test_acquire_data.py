"""The data half of acquire: forms, line numbers, splitting, leaks."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from checkout import DEFAULTS, ROOT
from conftest import ROOMS, tiny_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import params
from tasks.acquire import data_sources, near_duplicates, rows
from tasks.acquire import stage as acquire
from tasks.acquire.params import LocalData
from tasks.errors import ConfigError
from tasks.models import scoring

USER = {"role": "user", "content": "turn it on"}
ANSWER = {"role": "assistant", "content": '{"action": "on"}'}
SYSTEM = {"role": "system", "content": "Reply with JSON."}


def read(path: Path, metric: str = "json", role: str = "train") -> list[rows.Row]:
    return rows.load({role: path}, {role: "data/train.jsonl"}, metric)[role]


def chat(*messages: dict) -> bytes:
    return json.dumps({"messages": messages}).encode()


def made(name: str, *prompts: str, answer: str = "{}") -> list[rows.Row]:
    """Rows of a split; `name:1` is the place of the first."""
    messages = [[{"role": "user", "content": p}, {"role": "assistant", "content": answer}] for p in prompts]
    return [rows.Row(f"{name}:{i}", each) for i, each in enumerate(messages, 1)]


def test_both_forms_give_messages(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [
        b"\xef\xbb\xbf" + chat(SYSTEM, USER, ANSWER),
        b'{"prompt": "turn it on", "completion": "{}", "id": 7}',
        b"",
        chat(USER, ANSWER, USER, ANSWER) + b"\r",
    ]
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    assert found[0].messages == [SYSTEM, USER, ANSWER]
    assert found[0].prompt == [SYSTEM, USER]
    assert found[1].messages == [USER, {"role": "assistant", "content": "{}"}]
    assert [row.where for row in found] == ["data/train.jsonl:1", "data/train.jsonl:2", "data/train.jsonl:4"]


def test_unlabelled_rows_end_with_the_user(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_bytes(chat(SYSTEM, USER) + b'\n{"prompt": "open it"}\n')
    found = read(path, role="unlabelled")
    assert [row.prompt[-1]["content"] for row in found] == ["turn it on", "open it"]
    path.write_bytes(chat(USER, ANSWER))
    with pytest.raises(ConfigError, match="end with the user"):
        read(path, role="unlabelled")


def test_of_each_split_no_more_rows_are_used_than_told(tmp_path: Path) -> None:
    for split, rooms in {"train": ROOMS[:6], "validation": ROOMS[6:8], "test": ROOMS[8:]}.items():
        write_jsonl(tmp_path / "data" / "rows" / f"{split}.jsonl", tiny_rows(rooms))
    given = ["acquire.data.path=data/rows", "acquire.most={train: 4, test: 99}", "acquire.near_duplicate=1.0"]
    checked = params.load(DEFAULTS, given)
    data = data_sources.local(checked.acquire.data, tmp_path, tmp_path)
    found = acquire._splits(checked, data)
    assert {name: len(members) for name, members in found.items()} == {"train": 4, "validation": 6, "test": 6}
    assert [row.where for row in found["train"]] == [f"data/rows/train.jsonl:{line}" for line in range(1, 5)]


BROKEN = {
    "not JSON": (b'{"messages": [', "not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8 (byte 14"),
    "not an object": (b"[1]", "a list, not an object"),
    "no messages": (b'{"text": "hi"}', "no messages"),
    "prompt without completion": (b'{"prompt": "hi"}', "no messages"),
    "messages not a list": (b'{"messages": 7}', "not a list"),
    "messages a text": (b'{"messages": "hi"}', "not JSON"),
    "empty messages": (b'{"messages": []}', "not a list with entries"),
    "message not an object": (b'{"messages": ["hi"]}', "role and content"),
    "tool call": (chat(USER, ANSWER | {"tool_calls": [{"id": 1}]}), "tool_calls"),
    "tools": (json.dumps({"messages": [USER, ANSWER], "tools": [{}]}).encode(), "tools"),
    "image": (json.dumps({"prompt": "see", "completion": "{}", "images": ["a.png"]}).encode(), "images"),
    "weight of a half": (chat(USER, ANSWER | {"weight": 0.5}), "weight '0.5'"),
    "nothing to learn": (chat(USER, ANSWER | {"weight": 0}), "weight 0"),
    "weighted row": (json.dumps({"messages": [USER, ANSWER], "weight": 0}).encode(), "weight 0"),
    "wrong completion": (b'{"prompt": "on", "completion": "{}", "label": false}', "label False"),
    "two systems": (json.dumps({"messages": [SYSTEM, USER, ANSWER], "system": "Be kind."}).encode(), "system"),
    "preferences": (b'{"prompt": "on", "chosen": "a", "rejected": "b"}', "preference"),
    "3,000 turns": (chat(*[USER, ANSWER] * 1500), "3,000 messages"),
    "a row of 5 MB": (chat({"role": "user", "content": "a" * 5_000_000}, ANSWER), "5.0 MB"),
    "unknown role": (chat({"role": "tool", "content": "x"}, ANSWER), "role 'tool'"),
    "role not text": (chat({"role": ["user"], "content": "x"}, ANSWER), "role \"['user']\""),
    "no content": (chat({"role": "user", "content": None}, ANSWER), "has no content, only role"),
    "content misspelt": (chat({"role": "user", "contnt": "x"}, ANSWER), "has no content, only contnt, role"),
    "no role": (chat({"content": "x"}, ANSWER), "has no role, only content"),
    "content not text": (chat({"role": "user", "content": 7}, ANSWER), "content that is not text"),
    "a part without text": (chat({"role": "user", "content": [{"type": "text"}]}, ANSWER), "content that is not text"),
    "a part that is an image": (chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), "(image_url)"),
    "blank": (chat({"role": "user", "content": " \n"}, ANSWER), "is blank"),
    "half a character": (chat({"role": "user", "content": "\ud83d"}, ANSWER), "lone surrogate"),
    "ends with user": (chat(USER), "does not end with the assistant"),
    "only a system message": (chat(SYSTEM), "does not end with the assistant"),
    "two system messages": (chat(SYSTEM, SYSTEM, USER, ANSWER), "two system messages"),
    "late system message": (chat(USER, SYSTEM, ANSWER), "does not come first"),
    "not alternating": (chat(USER, USER, ANSWER), "do not alternate"),
    "begins with the assistant": (chat(ANSWER), "do not alternate"),
    "answer not JSON": (chat(USER, {"role": "assistant", "content": "on"}), "task.metric is json"),
    "brackets too deep": (b"[" * 100_000, "brackets too deep"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, what: str) -> None:
    line, wording = BROKEN[what]
    path = tmp_path / "train.jsonl"
    path.write_bytes(chat(USER, ANSWER) + b"\n\n" + line + b"\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert "data/train.jsonl:3: " in str(caught.value)
    assert wording in str(caught.value)


def test_ten_problems_are_listed_at_once_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"{}\n" * 25)
    with pytest.raises(ConfigError) as caught:
        read(path)
    message = str(caught.value)
    assert "25 problems" in message
    assert "train.jsonl:10: " in message
    assert "train.jsonl:11: " not in message
    assert "15 more" in message


def test_an_empty_file_and_a_missing_one_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    files = {"train": tmp_path / "empty.jsonl", "test": tmp_path / "none.jsonl"}
    with pytest.raises(ConfigError, match=r"a\.jsonl: .*no rows\n +b\.jsonl: No such file"):
        rows.load(files, {"train": "a.jsonl", "test": "b.jsonl"}, "json")


def test_text_answers_need_no_json(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(chat(USER, {"role": "assistant", "content": "on"}))
    assert len(read(path, "text")) == 1


# --- near duplicates ---------------------------------------------------------------------------------


@given(
    texts=st.lists(st.text("abc ", min_size=1, max_size=24), max_size=12, unique=True),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 0.95, 1.0]),
)
@settings(deadline=None, max_examples=300)
def test_pairs_are_those_of_comparing_all_with_all(texts: list[str], threshold: float) -> None:
    grams = [near_duplicates.grams(text) for text in texts]
    similarity = {
        (i, j): len(grams[i] & grams[j]) / len(grams[i] | grams[j]) for j in range(len(texts)) for i in range(j)
    }
    expected = {pair: value for pair, value in similarity.items() if value >= threshold}
    found = list(near_duplicates.pairs(texts, threshold))
    assert {(i, j): value for i, j, value in found} == expected
    assert len(found) == len(expected)


@given(threshold=st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=100)
def test_bands_overlook_next_to_no_pair_at_the_threshold(threshold: float) -> None:
    of_a_band, bands = near_duplicates.banding(threshold)
    assert (1 - threshold**of_a_band) ** bands <= 1e-11
    assert of_a_band * bands <= 300


def test_the_same_pairs_as_by_comparing_all_with_all_in_the_data_that_ships() -> None:
    path = ROOT / "data" / "home" / "train.jsonl"
    texts = sorted({row.text for row in rows.load({"train": path}, {"train": "train"}, "json")["train"]})[:1500]
    grams = [near_duplicates.grams(text) for text in texts]
    expected = set()
    for j, one in enumerate(grams):
        for i, other in enumerate(grams[:j]):
            if 0.8 * max(len(one), len(other)) <= min(len(one), len(other)):
                common = len(one & other)
                if common >= 0.8 * (len(one) + len(other) - common):
                    expected.add((i, j))
    assert {(i, j) for i, j, _ in near_duplicates.pairs(texts, 0.8)} == expected
    assert len(expected) > 5


def test_what_all_prompts_begin_and_end_with_does_not_make_them_alike() -> None:
    said = phrases(24, seed=2)
    words = "Name the queue of this ticket with one word, as in these examples of what was sorted before. "
    prompts = [f"{words * 20}Ticket: {text} -> queue of it in one word:" for text in said]
    rest = near_duplicates.without_template([near_duplicates.normalise(prompt) for prompt in prompts])
    assert max(map(len, rest)) < 60
    rows.refuse_leaks({"train": made("train", *prompts[:20]), "test": made("test", *prompts[20:])}, 0.95)
    again = [*prompts[:20], prompts[-1].replace("Ticket", "Ticket ")]
    leak(train=made("train", *again), test=made("test", *prompts[20:]), near=0.8)


def test_like_prompts_are_linked_once_and_not_each_with_each() -> None:
    template = " ".join(phrases(10, seed=5))
    texts = [near_duplicates.normalise(f"{'so ' * (i % 2)}{template} {i}") for i in range(60)]
    linked = {0}
    links = [linked.add(j) or j for _, j, _ in near_duplicates.pairs(texts, 0.9, lambda i, j: {i, j} <= linked)]
    assert links == list(range(1, 60))
    whole = labelled(texts, ["on"] * 60)
    rows.refuse_leaks({"train": whole}, 0.9)
    with pytest.raises(ConfigError, match="1 groups"):
        rows.split(whole, [], validation=0.1, test=0.1, near=0.9, seed=0)
    leak(train=whole[:50], test=whole[50:], near=0.9)


def test_few_prompts_are_compared_whole() -> None:
    texts = ["set the heating to twenty", "set the heating to twenty one"]
    assert near_duplicates.without_template(texts) == texts


def test_normalised_text_ignores_case_spacing_and_width() -> None:
    assert near_duplicates.normalise(" Turn\tthe ＬＡＭＰ  on\n") == "turn the lamp on"


# --- leaks -------------------------------------------------------------------------------------------


def leak(near: float = 0.8, **splits: list[rows.Row]) -> str:
    with pytest.raises(ConfigError) as caught:
        rows.refuse_leaks(splits, near)
    return str(caught.value)


def test_a_repeated_prompt_is_named_in_both_places() -> None:
    train = made("data/train.jsonl", "open the door", "close the door")
    test = made("data/test.jsonl", "play some music", "Close  the door", answer='{"other": 1}')
    assert "data/test.jsonl:2 repeats data/train.jsonl:2" in leak(train=train, test=test)


def test_a_nearly_repeated_prompt_is_named_with_its_similarity() -> None:
    train = made("train", "please set the heating in the living room to twenty degrees")
    test = made("test", "please set the heating in the living room to twenty degrees!")
    assert re.search(r"test:1 .* 0\.98\) train:1", leak(train=train, test=test))
    rows.refuse_leaks({"train": train, "test": test}, 1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train", "validation"),
        ("train", "test"),
        ("validation", "test"),
        ("unlabelled", "test"),
        ("unlabelled", "validation"),
    ],
)
def test_these_splits_share_no_prompt(one: str, other: str) -> None:
    message = leak(**{one: made(one, "the very same prompt"), other: made(other, "the very same prompt")})
    assert f"{one}:1" in message
    assert f"{other}:1" in message


def test_unlabelled_prompts_may_repeat_training_prompts() -> None:
    same = "the very same prompt"
    rows.refuse_leaks({"train": made("train", same, same), "unlabelled": made("unlabelled", same)}, 0.8)


def test_earlier_turns_tell_short_last_messages_apart() -> None:
    def row(where: str, first: str) -> rows.Row:
        turns = [("user", first), ("assistant", "Shall I?"), ("user", "yes please"), ("assistant", "{}")]
        return rows.Row(where, [{"role": role, "content": content} for role, content in turns])

    rows.refuse_leaks({"train": [row("a:1", "open the door")], "test": [row("b:1", "play some music")]}, 0.95)
    leak(train=[row("a:1", "open the door")], test=[row("b:1", "open the door")])


# --- splitting one file ------------------------------------------------------------------------------


def phrases(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop ", k=40)) for _ in range(count)]


def labelled(prompts: list[str], labels: list[str]) -> list[rows.Row]:
    answers = [json.dumps({"action": label}) for label in labels]
    pairs = zip(prompts, answers, strict=True)
    return [made(f"all.jsonl:{i}", prompt, answer=answer)[0] for i, (prompt, answer) in enumerate(pairs)]


def test_a_split_is_seeded_stratified_and_complete() -> None:
    prompts = phrases(400)
    whole = labelled(prompts, ["on"] * 200 + ["off"] * 160 + ["rare"] * 40)
    found = rows.split(whole, [], validation=0.1, test=0.2, near=0.9, seed=3)
    assert found == rows.split(whole, [], validation=0.1, test=0.2, near=0.9, seed=3)
    assert found != rows.split(whole, [], validation=0.1, test=0.2, near=0.9, seed=4)
    assert {name: len(members) for name, members in found.items()} == {"train": 280, "validation": 40, "test": 80}
    classes = Counter(scoring.group(row.messages[-1]["content"]) for row in found["test"])
    assert classes == {"on": 40, "off": 32, "rare": 8}
    assert sorted(row.where for part in found.values() for row in part) == sorted(row.where for row in whole)


def test_many_small_classes_still_fill_the_shares() -> None:
    prompts = phrases(300)
    found = rows.split(labelled(prompts, prompts), [], validation=0.1, test=0.2, near=0.9, seed=0)
    assert {name: len(members) for name, members in found.items()} == {"train": 210, "validation": 30, "test": 60}


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_near_duplicates_never_straddle_splits(seed: int) -> None:
    base = phrases(40)
    prompts = [prompt + tail for prompt in base for tail in ("", "!", " now")]
    whole = labelled(prompts, ["on", "off", "dim"] * 40)
    found = rows.split(whole, [], validation=0.15, test=0.2, near=0.8, seed=seed)
    rows.refuse_leaks(found, 0.8)
    assert all(found.values())


def test_prompts_that_the_unlabelled_repeat_go_to_train() -> None:
    prompts = phrases(60)
    whole, unlabelled = labelled(prompts, ["on"] * 60), made("u", *prompts[:30])
    found = rows.split(whole, unlabelled, validation=0.1, test=0.2, near=0.9, seed=0)
    rows.refuse_leaks(found | {"unlabelled": unlabelled}, 0.9)
    assert {row.text for row in found["train"]} >= {near_duplicates.normalise(prompt) for prompt in prompts[:30]}


def test_too_few_unlike_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"all\.jsonl.*: 5 .* 1 .*validation"):
        rows.split(labelled(["the same prompt"] * 5, ["on"] * 5), [], validation=0.1, test=0.2, near=0.9, seed=0)
    with pytest.raises(ConfigError, match=r"acquire\.data: .*\(0\.5\) .*\(0\.5\)"):
        rows.split(labelled(["a prompt"], ["on"]), [], validation=0.5, test=0.5, near=0.9, seed=0)


# --- sources and files -------------------------------------------------------------------------------


def local(root: Path, **fields: object) -> data_sources.FoundData:
    return data_sources.local(LocalData(source="local", **fields), root, root)


def test_a_folder_gives_its_files_and_a_file_is_to_be_split(tmp_path: Path) -> None:
    for name in ("train", "validation", "test", "unlabelled"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", tiny_rows(ROOMS[:1]))
    found = local(tmp_path, path=Path("data"))
    assert found.shown["unlabelled"] == "data/unlabelled.jsonl"
    assert set(found.files) == {"train", "validation", "test", "unlabelled"}
    assert set(local(tmp_path, path=Path("data/train.jsonl")).files) == {"all"}
    with pytest.raises(ConfigError, match=r"acquire\.data\.unlabelled: data .*unlabelled\.jsonl"):
        local(tmp_path, path=Path("data"), unlabelled=Path("data/test.jsonl"))
    (tmp_path / "data" / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no test\.jsonl"):
        local(tmp_path, path=Path("data"))
    with pytest.raises(ConfigError, match=r"acquire\.data\.path: none "):
        local(tmp_path, path=Path("none"))


def test_written_rows_are_canonical_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"id": 1, "completion": "{}", "prompt": "\\u00e9t\\u00e9\\u2028"}\n')
    digests = rows.write({"train": read(tmp_path / "in.jsonl"), "test": []}, tmp_path / "out")
    assert list(digests) == ["train.jsonl"]
    raw = (tmp_path / "out" / "train.jsonl").read_bytes()
    expected = '{"messages": [{"role": "user", "content": "été\u2028"}, {"role": "assistant", "content": "{}"}]}\n'
    assert raw == expected.encode()
    assert read(tmp_path / "out" / "train.jsonl")[0].text == "été"

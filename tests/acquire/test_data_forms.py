"""The forms of rows and the containers of files that people bring, each read as what it says."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOMS, tiny_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.acquire import containers, data_sources, forms, rows, watched
from tasks.acquire import stage as acquire
from tasks.acquire.params import Acquire, LocalData
from tasks.errors import ConfigError
from tasks.frame import events

ASKED, SAID = "turn it on", '{"action": "on"}'
USER, ANSWER = {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}
SYSTEM = {"role": "system", "content": "Reply with JSON."}
FORMS: dict[str, tuple[dict[str, Any], list[dict]]] = {
    "a system beside messages": ({"system": SYSTEM["content"], "messages": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "the same system twice": ({"system": SYSTEM["content"], "messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "developer": ({"messages": [SYSTEM | {"role": "developer"}, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "null and empty keys": (
        {"messages": [USER | {"name": None, "tool_calls": []}, ANSWER | {"function_call": None}], "tools": None, "system": ""},
        [USER, ANSWER],
    ),
    "weights": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}], "weight": 1},
        [USER, ANSWER | {"weight": 0}, USER, ANSWER],
    ),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER]},
        [{"role": "user", "content": "a\nb"}, ANSWER],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": SYSTEM["content"]}, {"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
        [SYSTEM, USER, ANSWER],
    ),
    "messages as a cell": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    "TRL's texts": ({"prompt": ASKED, "completion": SAID}, [USER, ANSWER]),
    "TRL's lists": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "Alpaca": ({"instruction": "Turn on:", "input": "the lamp", "output": SAID}, [{"role": "user", "content": "Turn on:\n\nthe lamp"}, ANSWER]),
    "Alpaca without input": ({"instruction": ASKED, "input": "", "output": SAID}, [USER, ANSWER]),
    "Alpaca with history": (
        {"instruction": ASKED, "output": SAID, "history": [["hi", "hello"]]},
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, USER, ANSWER],
    ),
    "text and label": ({"text": ASKED, "label": 3}, [USER, {"role": "assistant", "content": "3"}]),
    "a column of pandas": ({"prompt": ASKED, "completion": SAID, "input": float("nan")}, [USER, ANSWER]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_with_nothing_lost(form: str) -> None:
    row, expected = FORMS[form]
    unused: Counter[str] = Counter()
    assert forms.messages(row, True, unused) == expected
    assert not unused


@pytest.mark.parametrize(
    "row", [{"prompt": ASKED}, {"instruction": ASKED, "input": ""}, {"text": ASKED}, {"messages": [USER]}], ids=str
)
def test_what_is_asked_is_enough_for_an_unlabelled_row(row: dict) -> None:
    assert forms.messages(row, False, Counter()) == [USER]


@given(
    row=st.dictionaries(
        st.sampled_from(["messages", "prompt", "completion", "system", "weight", "text", "label", "history", "instruction", "output"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "weight", "from", "value"]), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    labelled=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_any_row_is_messages_of_text_or_a_sentence(row: dict, labelled: bool) -> None:
    found = forms.messages(row, labelled, Counter())
    if not isinstance(found, str):
        assert all(isinstance(message["content"], str) and message["role"] in forms.ROLES for message in found)


def test_keys_that_are_left_out_are_told_once_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(events, "note", told.append)
    many = [{"prompt": f"{ASKED} {i}", "completion": SAID, "id": i, "source": None} for i in range(1200)]
    write_jsonl(tmp_path / "a.jsonl", [*many, {"messages": [USER | {"name": "Ann"}, ANSWER]}])
    rows.load({"all": tmp_path / "a.jsonl"}, {"all": "a.jsonl"}, "json")
    (line,) = told
    assert "id (1,200)" in line
    assert "messages.name (1)" in line
    assert "source" not in line


# --- containers --------------------------------------------------------------------------------------

TABLE = [{"prompt": "one, two\nthree", "completion": "é\u2028"}, {"prompt": 'say "four"', "completion": "4"}]


def packed(path: Path) -> Path:
    """TABLE in the container that the name tells."""
    name = path.name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TABLE)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", encoding="utf-8-sig" if "excel" in name else "utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, list(TABLE[0]), delimiter=";" if "excel" in name else "\t" if "tsv" in name else ","
            )
            writer.writeheader()
            writer.writerows(TABLE)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(TABLE, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text(text, encoding=path.stem)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.parquet", "a.csv", "excel.csv", "a.tsv", "a.jsonl.gz", "a.json", "utf-16.jsonl", "utf-16-le.jsonl", "utf-8-sig.jsonl"],
)  # fmt: skip
def test_every_container_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    found = list(containers.read(packed(tmp_path / name), name))
    assert [row for _, row in found] == TABLE
    assert len({where for where, _ in found}) == 2


def test_a_csv_row_is_named_by_the_line_on_which_it_begins(tmp_path: Path) -> None:
    assert [where for where, _ in containers.read(packed(tmp_path / "a.csv"), "a.csv")] == ["a.csv:2", "a.csv:4"]


def test_class_numbers_of_a_parquet_file_are_read_as_their_names(tmp_path: Path) -> None:
    told = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["off", "on"]}}}}
    table = pyarrow.Table.from_pylist([{"text": ASKED, "label": 1}])
    table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row for _, row in containers.read(tmp_path / "a.parquet", "a")] == [{"text": ASKED, "label": "on"}]


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(b'{"prompt": "a"}\n' * 100)[:40],
    "cut.parquet": b"PAR1\x15\x04",
    "cut.json": b'[\n{"prompt": "a"},\n',
    "pretty.jsonl": b'{\n "prompt": "a",\n "completion": "b"\n}\n{\n "prompt": "c"\n}\n',
    "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "book.xlsx": b"PK\x03\x04rest",
    "page.jsonl": b"<!DOCTYPE html>\n<p>Not found</p>\n" * 30,
    "latin.csv": "prompt,completion\nà,b\n".encode("latin-1"),
    "odd.csv": b"prompt,prompt\na,b\n",
    "quote.csv": b'prompt,completion\n"a,b\n',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_file_of_rows_is_one_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    ((_, problem),) = containers.read(tmp_path / name, name)
    assert isinstance(problem, str)
    assert len(problem) < 300


@given(content=st.binary(max_size=64), name=st.sampled_from(["a.jsonl", "a.json", "a.csv"]))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_rows_or_problems(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    assert all(isinstance(row, dict | str) for _, row in containers.read(path, name))


def test_the_text_for_perplexity_is_no_pointer_and_loses_its_mark(tmp_path: Path) -> None:
    source, target = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_bytes(DAMAGED["pointer.jsonl"])
    with pytest.raises(ConfigError, match=r"a\.txt"):
        acquire._copy_text(source, target)
    source.write_bytes(b"\xef\xbb\xbfSome text.\r\n")
    acquire._copy_text(source, target)
    assert target.read_bytes() == b"Some text.\n"


# --- which file is which split -----------------------------------------------------------------------


def local(root: Path) -> data_sources.FoundData:
    return data_sources.local(LocalData(source="local", path=Path("data")), root, root)


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["train.csv", "validation.parquet", "test.json", "notes.txt"], {"train", "validation", "test"}),
        ([f"data/{name}-00000-of-00001.parquet" for name in rows.SPLITS], {"train", "validation", "test"}),
        (["train.jsonl", "README.md"], {"all"}),
        (["train.jsonl", "unlabelled.jsonl"], {"all", "unlabelled"}),
        (["tickets.json", "dataset_infos.json"], {"all"}),
    ],
)
def test_the_files_of_a_folder_tell_their_split(tmp_path: Path, names: list[str], roles: set[str]) -> None:
    for name in names:
        write_jsonl(tmp_path / "data" / name, tiny_rows(ROOMS[:1]))
    assert set(local(tmp_path).files) == roles
    assert all(path.is_file() for path in local(tmp_path).files.values())


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["a.jsonl", "b.jsonl"],
        ["train.jsonl", "test.jsonl"],
        ["train.csv", "train.jsonl", "validation.csv", "test.csv"],
    ],
)
def test_a_folder_that_leaves_a_split_open_is_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "data").mkdir()
    for name in names:
        write_jsonl(tmp_path / "data" / name, tiny_rows(ROOMS[:1]))
    with pytest.raises(ConfigError):
        local(tmp_path)


# --- what DVC watches --------------------------------------------------------------------------------


def watching(root: Path, place: Path = Path("data")) -> None:
    told = {
        "watch": place,
        "model": {"source": "local", "path": place / "model"},
        "data": {"source": "local", "path": place / "rows"},
    }
    watched.check(Acquire.model_validate(told), root)


@pytest.mark.parametrize("place", ["data/rows", "data/rows/data", "data/model/extra"])
def test_a_linked_folder_in_an_input_is_refused_and_a_linked_file_is_not(tmp_path: Path, place: str) -> None:
    (tmp_path / "outside").mkdir()
    write_jsonl(tmp_path / "outside.jsonl", tiny_rows(ROOMS[:1]))
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (tmp_path / "data" / "unused").symlink_to(tmp_path / "outside")
    watching(tmp_path)
    (tmp_path / place).symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=place):
        watching(tmp_path)
    with pytest.raises(ConfigError, match=place):  # a watched folder outside the workspace
        watching(tmp_path / "elsewhere", tmp_path / "data")


def test_a_pipe_and_a_broken_link_are_refused(tmp_path: Path) -> None:
    import os

    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "pipe")
    (tmp_path / "data" / "gone").symlink_to("nowhere")
    with pytest.raises(ConfigError) as caught:
        watching(tmp_path)
    assert "data/pipe" in str(caught.value)
    assert "data/gone" in str(caught.value)

"""One reader and one writer of JSON lines: a line ends at a newline and nowhere else."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import ArtifactError
from tasks.frame import jsonl
from tasks.models import chat
from tasks.validate import stage as validate

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"  # where str.splitlines breaks a text
texts = st.text(st.one_of(st.sampled_from(SEPARATORS + '\n"\\'), st.characters(exclude_categories=["Cs"])), max_size=8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jsonl") / "rows.jsonl"


@given(values=st.lists(st.dictionaries(texts, texts, max_size=2), max_size=4))
@settings(deadline=None, max_examples=100)
def test_what_is_written_is_read_back(path: Path, values: list) -> None:
    jsonl.write(path, values)
    assert jsonl.read(path) == values
    assert path.read_bytes().count(b"\n") == len(values)


def test_files_of_other_editors_are_read() -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\r\n'
    assert [number for number, _ in jsonl.lines(content)] == [1, 4]


def test_a_damaged_line_is_named(path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n{"a": \n')
    with pytest.raises(ArtifactError, match=r"rows\.jsonl:2"):
        jsonl.read(path)


def test_answers_with_line_separators_pass_from_stage_to_stage(tmp_path: Path) -> None:
    answer = f"one{SEPARATORS}two"
    rows = [[{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]] * 2
    jsonl.write(tmp_path / "test.jsonl", ({"messages": row} for row in rows))
    assert chat.read_rows(tmp_path / "test.jsonl") == rows
    told = [{"reference": answer, "teacher_correct": correct} for correct in (True, False)]
    jsonl.write(tmp_path / "predictions.jsonl", told)
    assert validate._teacher(tmp_path / "predictions.jsonl", rows) == [True, False]

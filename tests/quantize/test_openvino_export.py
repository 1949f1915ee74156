"""What OpenVINO's exporter is given, and what is foreseen of it; it runs for real in tests/runtimes/test_openvino.py."""

import json
import re
from pathlib import Path

import pytest
from package_inputs import digits_apart

from tasks.errors import ConfigError
from tasks.models import loading
from tasks.quantize import openvino_export
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import OpenVino
from tasks.runtimes import environments

TEXTS = ("room  5,\n\n7\tand 9 or ½", "  a  1  \n", "it's 12345 x٣٤ 5", "", " \t\r\n", "no digits  at all\n ", "1 2  3")


@pytest.mark.parametrize("spelled_out", [False, True])
def test_one_pattern_parts_a_text_as_digits_and_words_in_turn_do(
    real_tokenizer_folder: Path, tmp_path: Path, *, spelled_out: bool
) -> None:
    from tokenizers import Tokenizer

    student = tmp_path / "student"
    tokenizer = loading.load_tokenizer(real_tokenizer_folder)
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart(spelled_out=spelled_out)
    tokenizer.save_pretrained(student)
    (tmp_path / "scratch").mkdir()
    copy = openvino_export._readable(student, tmp_path / "scratch")
    assert copy != student
    before, after = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (student, copy))
    assert json.loads((copy / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]["type"] == "Split"
    for text in TEXTS:
        assert before.encode(text).ids == after.encode(text).ids, text


def test_another_tokenizer_stays_as_it_is(real_tokenizer_folder: Path, tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = loading.load_tokenizer(real_tokenizer_folder)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(tmp_path / "student")
    assert openvino_export._readable(tmp_path / "student", tmp_path) == tmp_path / "student"
    assert openvino_export._readable(tmp_path, tmp_path) == tmp_path  # without a tokenizer.json


def test_without_its_environment_the_command_that_makes_it_is_told(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "folder", lambda runtime: tmp_path / runtime.name)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=re.escape("slmops runtimes install openvino")):
        openvino_export.quantize(
            "openvino-int8", OpenVino(), Inputs(tiny_model_folder, tmp_path, tmp_path), tmp_path / "out"
        )
    assert not [each for each in tmp_path.rglob("*") if each.name == "model"]

"""HF folder -> F16 GGUF by the official converter: equal bytes wherever it runs, clear errors."""

import json
import sys
from pathlib import Path

import pytest
from gguf_inputs import converted, stage_input

from tasks.convert.stage import CONVERTER, convert
from tasks.errors import ArtifactError, BrokenRuntimeError, StageError
from tasks.frame import manifest


def test_two_conversions_in_different_folders_give_equal_bytes(tiny_model_folder: Path, tmp_path: Path) -> None:
    first = converted(tiny_model_folder)
    source, out = stage_input(tiny_model_folder, tmp_path / "elsewhere" / "run 2"), tmp_path / "out"
    out.mkdir()
    metrics = convert(None, teacher=source, student=source, out=out)
    digests = {manifest.sha256(folder / f"{name}.gguf") for folder in (first, out) for name in ("teacher", "student")}
    assert len(digests) == 1
    assert metrics == {f"{name}_bytes": (out / f"{name}.gguf").stat().st_size for name in ("teacher", "student")}


def test_the_weights_are_the_models(tiny_model_folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file

    reader = GGUFReader(converted(tiny_model_folder) / "student.gguf")
    ours = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    theirs = load_file(tiny_model_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(torch.from_numpy(ours.data.copy()), theirs.to(torch.float16))


def test_a_missing_converter_names_set_up(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stage_input(tiny_model_folder, tmp_path / "source")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(StageError, match="make setup"):
        convert(None, teacher=source, student=source, out=tmp_path)


def test_a_converter_that_crashes_is_told_as_that(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stage_input(tiny_model_folder, tmp_path / "source")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / CONVERTER).parent.mkdir(parents=True)
    (tmp_path / CONVERTER).write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(BrokenRuntimeError, match="SIGSEGV"):
        convert(None, teacher=source, student=source, out=tmp_path)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"teacher/model/config\.json"):
        convert(None, teacher=tmp_path / "teacher", student=tmp_path / "student", out=tmp_path)


def test_an_unknown_architecture_is_told_in_the_converters_words(tiny_model_folder: Path, tmp_path: Path) -> None:
    source, out = stage_input(tiny_model_folder, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    config = json.loads((source / "model" / "config.json").read_text())
    (source / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(StageError, match=r"teacher .*NobodysForCausalLM is not supported"):
        convert(None, teacher=source, student=source, out=out)

"""The self-test of the runtimes: it holds here, and it sees what is wrong."""

import json
import os
import signal
from pathlib import Path

import pytest

from tasks import selftest
from tasks.errors import BrokenRuntimeError, ConfigError
from tasks.selftest import llama, tiny
from tasks.variants import LLAMA, QUANTIZERS, RUNTIMES, Runtime

ONNX_GENAI = RUNTIMES["onnx_genai"]
SHAPE = tiny.SHAPES[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is written down what held: of this test alone."""
    monkeypatch.setattr(selftest.sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def answers(monkeypatch: pytest.MonkeyPatch, lines: list[dict], code: int = 0, said: str = "") -> list[str]:
    """Let the process of the self-test give these answers; returns the libraries that were asked for."""
    asked: list[str] = []

    def child(runtime: Runtime, folder: Path) -> tuple[list[str], int, str]:
        asked.append(runtime.name)
        return [json.dumps(line) for line in lines], code, said

    monkeypatch.setattr(selftest, "_child", child)
    return asked


RIGHT = [{"kernels": "AMX_INT8"}, {"what": "q8_0"}, {"what": "q8_0", "distance": [0.02, 0.03], "limit": [0.04, 0.1]}]


def test_every_width_of_row_occurs() -> None:
    assert {width for shape in tiny.SHAPES for width in (shape.hidden, shape.inner)} == {256, 576, 1024, 1536}


def test_llama_cpp_computes_what_torch_does_in_every_type_of_the_params(tmp_path: Path) -> None:
    types = QUANTIZERS["ggml_types"].variants
    done = [(step.what, step.compute(), step.limit) for step in llama.steps(tmp_path)]
    assert len(done) == len(types) * len(tiny.SHAPES) * 3  # prompt at once, by micro-batches, token by token
    for what, found, limit in done:
        assert found.whole <= limit.whole, what
        assert found.worst <= limit.worst, what
    # Rounding is there: a comparison of torch with itself would find none.
    assert min(found.whole for _, found, _ in done) > 0


def test_a_damaged_block_in_a_file_is_seen(tmp_path: Path) -> None:
    """What a wrong kernel does to one row in 256 of one matrix."""
    import gguf

    made = tiny.model(SHAPE)
    ids = tiny.tokens()
    file = llama.quantized(llama.write(made, SHAPE, tmp_path / "f16.gguf"), "q8_0")
    wanted = tiny.reference(made, llama.weights(file, SHAPE), ids)
    reader = gguf.GGUFReader(file, "r+")
    rows = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight").data
    rows[7] = rows[8]
    del reader, rows
    with llama.loaded(file) as run:
        found = tiny.distance(run(ids, tiny.PROMPT), wanted)
    assert found.whole > tiny.EIGHT_BITS.whole


@pytest.mark.parametrize("broken", ["one position", "one logit of all", "not a number", "every tile of the last rows"])
def test_broken_logits_are_seen(broken: str) -> None:
    import numpy as np

    wanted = np.random.default_rng(0).normal(size=(tiny.PROMPT, tiny.VOCABULARY)).astype(np.float32)
    found = wanted.copy()
    if broken == "one position":
        found[-1] = wanted[0]
    elif broken == "one logit of all":
        found[:, 5] = 0.0
    elif broken == "not a number":
        found[3, 3] = np.nan
    else:
        found[:, -16:] = 0.0
    off = tiny.distance(found, wanted)
    assert off.whole > tiny.EIGHT_BITS.whole or off.worst > tiny.EIGHT_BITS.worst
    assert tiny.distance(wanted * 1.01, wanted).whole == pytest.approx(0.01, rel=1e-3)


def test_onnx_runtime_computes_what_torch_does_in_a_process_of_its_own(tmp_path: Path) -> None:
    lines, code, said = selftest._child(ONNX_GENAI, tmp_path)
    assert code == 0, said
    done = [line for line in map(json.loads, lines) if "distance" in line]
    assert len(done) == len(tiny.SHAPES) * 2  # prompt at once, token by token
    for line in done:
        assert 0 < line["distance"][0] <= line["limit"][0], line
        assert line["distance"][1] <= line["limit"][1], line


def test_what_held_is_written_down_and_not_tested_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, RIGHT)
    for _ in range(2):
        selftest.ensure(selftest.used("validate", "q8_0"))
    assert asked == ["llama"]
    [record] = place.glob("share/slmops/*.json")
    assert json.loads(record.read_text())["checks"] == 1
    # Another processor, and it is asked again.
    monkeypatch.setattr(selftest, "processor", lambda: "another one")
    selftest.ensure(selftest.used("validate", "q8_0"))
    assert asked == ["llama", "llama"]


def test_a_read_only_environment_has_its_record_in_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = answers(monkeypatch, RIGHT)
    for _ in range(2):
        selftest.ensure((LLAMA,))
    assert (asked, len(list((tmp_path / "cache").rglob("*.json")))) == (["llama"], 1)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # nowhere to write: tested each time
    for _ in range(2):
        selftest.ensure((LLAMA,))
    assert len(asked) == 3


def test_a_wrong_result_is_told_with_library_kernels_and_remedy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"what": "q4_0, rows of 576", "distance": [0.45, 1.4], "limit": [0.04, 0.1]}
    answers(monkeypatch, [*RIGHT, wrong])
    with pytest.raises(BrokenRuntimeError) as told:
        selftest.ensure((LLAMA,))
    for part in ("llama-cpp-python", "AMX_INT8", "1 of 2", "q4_0, rows of 576", "45.0%", "infra/setup.sh"):
        assert part in str(told.value)
    assert not list(place.rglob("*.json"))


def test_a_crash_is_told_with_its_signal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [*RIGHT[:2]], code=-signal.SIGSEGV)
    with pytest.raises(BrokenRuntimeError) as told:
        selftest.ensure((LLAMA,))
    for part in ("SIGSEGV", "llama-cpp-python", "AMX_INT8", "q8_0", "infra/setup.sh"):
        assert part in str(told.value)


def test_a_library_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="onnxruntime-genai"):
        selftest.ensure((ONNX_GENAI,))


def test_stages_without_a_runtime_test_nothing() -> None:
    assert selftest.used("finetune", None) == selftest.used("convert", None) == ()
    assert selftest.used("quantize", "onnx-int4") == (ONNX_GENAI,)
    assert selftest.used("validate", "onnx-int4") == (LLAMA, ONNX_GENAI)

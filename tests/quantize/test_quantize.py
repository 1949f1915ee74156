"""Every variant from one F16 file: equal bytes, provenance inside, checked by loading, clear errors."""

import inspect
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from checkout import DEFAULTS
from gguf_inputs import converted, quantized

from tasks import params
from tasks.errors import StageError
from tasks.frame import manifest
from tasks.quantize.stage import quantize
from tasks.runtimes.protocol import RuntimeModule
from tasks.variants import QUANTIZERS, RUNTIMES, VARIANTS, Quantizer, Runtime

PARAMS = params.load(DEFAULTS)


def make(tiny: Path, variant: str, out: Path) -> Path:
    out.mkdir(parents=True)
    quantized(tiny, "f16")  # so that there are rows
    source = converted(tiny).with_name("source")
    quantize(PARAMS, source=source, student=source, converted=converted(tiny), variant=variant, out=out)
    return out


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_quantizer_has_what_its_row_promises(quantizer: Quantizer) -> None:
    for name in ("quantize", "predicted_size", "obstacle"):
        assert callable(getattr(quantizer.module, name))
    assert all(VARIANTS[variant].quantizer is quantizer for variant in quantizer.variants)


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_a_runtime_has_what_its_row_promises(runtime: Runtime) -> None:
    def kinds(function: Callable[..., object]) -> list[object]:
        return [each.kind for each in inspect.signature(function).parameters.values()]

    promised = {name: each for name, each in vars(RuntimeModule).items() if callable(each) and name[0] != "_"}
    assert len(promised) >= 5
    for name, function in promised.items():
        assert kinds(getattr(runtime.module, name)) == kinds(function)[1:], name  # without self


@pytest.mark.parametrize(
    "variant", ["f16", "q8_0", "q5_1", "q5_0", "q4_k_m", "q4_0", pytest.param("auto-q4_0", marks=pytest.mark.slow)]
)
def test_equal_input_gives_equal_bytes(
    tiny_model_folder: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantized(tiny_model_folder, variant) / "model.gguf"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    second = make(tiny_model_folder, variant, tmp_path / "again") / "model.gguf"
    assert manifest.sha256(first) == manifest.sha256(second)


def test_sizes_fall_with_the_bits(tiny_model_folder: Path) -> None:
    sizes = [(quantized(tiny_model_folder, v) / "model.gguf").stat().st_size for v in ("f16", "q8_0", "q4_k_m", "q4_0")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_a_file_says_where_it_comes_from(tiny_model_folder: Path) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(quantized(tiny_model_folder, "q4_0") / "model.gguf").fields
    told = {name: field.contents() for name, field in fields.items() if name.startswith("slmops.")}
    assert told == {
        "slmops.source.sha256": manifest.sha256(converted(tiny_model_folder) / "student.gguf"),
        "slmops.quantizer": f"llama-cpp-python {version('llama-cpp-python')}",
        "slmops.type": "Q4_0",
    }
    assert fields["general.quantized_by"].contents() == "slmops"


def test_a_damaged_source_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    whole = converted(tiny_model_folder) / "student.gguf"
    (tmp_path / "student.gguf").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"student\.gguf: .*q8_0: .+"):
        quantize(PARAMS, source=tmp_path, student=tmp_path, converted=tmp_path, variant="q8_0", out=tmp_path / "out")


# --- onnx-int4 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same folder made twice, at once, in different places."""
    places = [tmp_path_factory.mktemp(name) / "onnx-int4" for name in ("first", "second place")]
    converted(tiny_model_folder)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda out: make(tiny_model_folder, "onnx-int4", out), places))


def test_onnx_has_equal_bytes_wherever_it_is_made(onnx: list[Path]) -> None:
    first, second = ({file.name: manifest.sha256(file) for file in (out / "model").iterdir()} for out in onnx)
    assert first == second


def test_onnx_leaves_nothing_beside_the_model(onnx: list[Path]) -> None:
    for out in onnx:
        assert [each.name for each in out.iterdir()] == ["model"]
        beside = {each.name for each in out.parent.iterdir()}
        assert beside <= {"onnx-int4", ".quiet.lock", ".quiet.turnstile"}


def test_onnx_runs_and_keeps_the_tokenizer(onnx: list[Path], tiny_model_folder: Path) -> None:
    import numpy as np
    import onnxruntime_genai as og

    folder = onnx[0] / "model"
    generator = og.Generator(og.Model(str(folder)), og.GeneratorParams(og.Model(str(folder))))
    generator.append_tokens(np.array([1, 2, 3], np.int32))
    assert np.isfinite(generator.get_output("logits")).all()
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_model_folder / name).read_bytes()


def test_onnx_stores_the_embedding_in_eight_bits(onnx: list[Path], tiny_model_folder: Path) -> None:
    config = json.loads((tiny_model_folder / "config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"]
    weights = (onnx[0] / "model" / "model.onnx.data").stat().st_size
    # 8 bits and a scale of 4 bytes in 32 for the embedding, 4 bits and as much for the head.
    assert weights < embedding * (1 + 4 / 32 + 0.5 + 4 / 32) * 1.2


@pytest.mark.slow
def test_onnx_failure_is_told_in_olives_words(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"onnx-int4: .*not currently supported"):
        quantize(
            PARAMS, source=tmp_path, student=tmp_path, converted=tmp_path, variant="onnx-int4", out=tmp_path / "out"
        )

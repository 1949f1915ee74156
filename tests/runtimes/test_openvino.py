"""OpenVINO, for real: its environment installed from its list, a model that learned six answers exported, run and packaged."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import DEFAULTS
from gguf_inputs import quantized
from package_inputs import ROWS, add_variant, inputs, settings, trained

from flows.release import ask
from tasks import params
from tasks.measure.speed import OverMemory, measure
from tasks.models import chat, loading
from tasks.package import bundle, parity
from tasks.package.stage import package
from tasks.profiles import Limits
from tasks.quantize.inputs import Inputs
from tasks.runtimes import environments, openvino
from tasks.selftest import check, tiny
from tasks.variants import RUNTIMES, VARIANTS

pytestmark = pytest.mark.slow
OPENVINO = RUNTIMES["openvino"]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if environments.missing(OPENVINO):
        environments.install(OPENVINO)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Path:
    return trained(tiny_model_folder)


@pytest.fixture(scope="module", params=["openvino-int8", "openvino-int4"])
def made(request: pytest.FixtureRequest, model: Path) -> Path:
    return VARIANTS[request.param].weights(quantized(model, request.param))


def test_it_holds_against_torch() -> None:
    assert check(OPENVINO)["checks"] == 2


def test_the_same_student_gives_the_same_bytes(model: Path, made: Path, tmp_path: Path) -> None:
    variant = made.parent.name
    again = tmp_path / variant
    again.mkdir()
    quantizer = VARIANTS[variant].quantizer
    quantizer.module.quantize(
        variant, params.load(DEFAULTS).quantize.of(quantizer.name), Inputs(model, model, model), again
    )
    files = {path.name: path.read_bytes() for path in (again / "model").iterdir()}
    assert files == {path.name: path.read_bytes() for path in made.iterdir()}
    assert not [name for name, content in files.items() if str(model).encode() in content]


def test_answers_are_those_that_were_learned_with_drafts_and_without(model: Path, made: Path) -> None:
    tokenizer = loading.load_tokenizer(model)
    stops = loading.stop_ids(model, tokenizer)
    prompts = [chat.prompt_ids(tokenizer, row[:-1]) for row in ROWS]
    right = [[*tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"], stops[0]] for row in ROWS]
    wrong = [[*draft[:3], 7, *draft[4:]] for draft in right]
    for drafts in (right, wrong):
        found = openvino.answers(made, prompts, drafts, stops=stops, limit=64, threads=1, advance=lambda _: None)
        assert [tokenizer.decode(ids) for ids in found] == [row[-1]["content"] for row in ROWS]


def test_logits_of_a_window_are_torchs(model: Path, made: Path) -> None:
    ids = chat.prompt_ids(loading.load_tokenizer(model), ROWS[0])
    with torch.no_grad():
        wanted = loading.load_model(model, "float32")(torch.tensor([ids])).logits[0].numpy()
    with openvino.window_logits(made, len(ids), 1) as logits:
        assert logits(ids, 3).shape == (len(ids) - 4, wanted.shape[1])
        off = [tiny.distance(logits(ids, 0), wanted[:-1]) for _ in range(2)]
    assert off[0] == off[1]
    assert off[0].whole < (0.03 if made.parent.name.endswith("int8") else 0.3)
    assert np.isfinite(off[0].worst)


def test_a_device_with_less_memory_ends_it(model: Path, made: Path) -> None:
    yardstick = VARIANTS["f16"].weights(quantized(model, "f16"))
    with pytest.raises(OverMemory) as over:
        measure(OPENVINO, made, yardstick, [5, 6, 7], 3, Limits(memory_mb=90, threads=1, context=64, runtimes=None))
    assert over.value.peak > 90e6


def test_a_bundle_answers_by_its_own_words_in_a_process_of_its_own(
    model: Path, made: Path, tmp_path: Path, tiny_params: dict
) -> None:
    folders = inputs(tmp_path / "build", model)
    add_variant(tmp_path / "build", made.parent.name, made, accuracy=0.9, size_bytes=5e6, decode_tokens_per_s=100.0)
    out = tmp_path / "out"
    out.mkdir()
    package(settings(tiny_params, [made.parent.name], targets=["openvino-genai"]), **folders, out=out)
    packed = bundle.verify(out)
    assert packed.runtimes == {"openvino-genai": environments.version(OPENVINO)}
    assert packed.targets["openvino-genai"].conversations_checked >= len(parity.CONVERSATIONS) - 1
    code = re.search(r"```python\n(.*?)```", (out / "openvino-genai/README.md").read_text(), re.S)
    assert code
    python = environments.interpreter(OPENVINO)
    done = subprocess.run(
        [python, "-c", code[1]], cwd=out / "openvino-genai", check=True, capture_output=True, text=True
    )
    answers = {row[-1]["content"] for row in ROWS}
    assert done.stdout.strip().splitlines()[-1] in answers
    assert ask.answer(out, ROWS[0][-2]["content"]) in answers

"""Speed and memory within the limits of a device, on tiny files."""

import json
import os
import shutil
from pathlib import Path

import pytest
from checkout import DEFAULTS, PROFILES
from conftest import ROOMS, tiny_rows, write_jsonl
from gguf_inputs import converted, quantized, stage_input

from tasks import params
from tasks.errors import ArtifactError, StageError
from tasks.measure import speed
from tasks.measure.params import Measure
from tasks.measure.stage import measure
from tasks.metrics import METRICS
from tasks.profiles import Limits
from tasks.stages import STAGES
from tasks.variants import LLAMA

ANY = Limits(memory_mb=None, threads=None, context=512, runtimes=None)
MEASURED = {metric.name for metric in METRICS.values() if metric.measured}


@pytest.fixture(scope="module")
def inputs(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("inputs")
    write_jsonl(home / "source" / "data" / "test.jsonl", tiny_rows(ROOMS[:4]))
    student = stage_input(tiny_model_folder, home / "student")
    shutil.copytree(PROFILES, home / "profiles")
    return {"root": home, "source": home / "source", "student": student, "converted": converted(tiny_model_folder)}


def profile(root: Path, **changes: object) -> str:
    """A device like a desktop, but for some values."""
    values = {"label": "Small", "memory_mb": None, "threads": None, "context": 512, "runtimes": None, "gates": []}
    (root / "profiles" / "small.yaml").write_text(json.dumps(values | changes))
    return "small"


def run(inputs: dict[str, Path], artifact: Path, variant: str, out: Path, device: str = "desktop") -> dict:
    out.mkdir(parents=True)
    settings = params.load(DEFAULTS).only(STAGES["measure"].sections)
    settings = settings.model_copy(update={"measure": Measure(repeats=3)})
    assert measure(settings, **inputs, artifact=artifact, variant=variant, profile=device, out=out) == {}
    return json.loads((out / "measurements.json").read_text())


@pytest.mark.parametrize("variant", ["q8_0", "onnx-int4"])
def test_every_measured_number_is_there(inputs: dict, tiny_model_folder: Path, tmp_path: Path, variant: str) -> None:
    made = run(inputs, quantized(tiny_model_folder, variant), variant, tmp_path / "out")
    assert set(made) >= MEASURED
    for each in (made, made["reference"]):
        assert 0 < each["ttft_p50_s"] <= each["ttft_p95_s"] <= each["ttft_p99_s"]
        for name in ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"):
            assert each[name] > 0
    assert made["decode_speedup"] > 0
    assert made["threads"] == len(os.sched_getaffinity(0))
    assert made["machine"]["cores"] > 0


def test_a_device_of_one_core_is_measured_on_one(inputs: dict, tiny_model_folder: Path, tmp_path: Path) -> None:
    device = profile(inputs["root"], threads=1, memory_mb=4000)
    made = run(inputs, quantized(tiny_model_folder, "q8_0"), "q8_0", tmp_path / "out", device)
    assert made["threads"] == 1
    assert made["peak_rss_bytes"] < 4e9
    limits = json.loads((tmp_path / "out" / "limits.json").read_text())
    assert limits == {"memory_mb": 4000, "threads": 1, "context": 512, "runtimes": None}


def test_a_file_that_wants_more_memory_than_the_device_has_is_a_result(
    inputs: dict, tiny_model_folder: Path, tmp_path: Path
) -> None:
    device = profile(inputs["root"], memory_mb=30)
    made = run(inputs, quantized(tiny_model_folder, "q8_0"), "q8_0", tmp_path / "out", device)
    assert "30 MB" in made["ended"]
    assert made["peak_rss_bytes"] > 30e6
    assert "decode_tokens_per_s" not in made


def test_a_device_without_the_runtime_measures_nothing(inputs: dict, tmp_path: Path) -> None:
    made = run(inputs, tmp_path / "none", "onnx-int4", tmp_path / "out", profile(inputs["root"], runtimes=["llama"]))
    assert set(made) == {"ended", "machine"}


def test_memory_for_the_devices_context_is_set_aside(inputs: dict) -> None:
    file = inputs["converted"] / "teacher.gguf"
    short, long = (
        speed.measure(LLAMA, file, file, [1, 2, 3], 3, ANY.model_copy(update={"context": tokens}))["peak_rss_bytes"]
        for tokens in (512, 65536)
    )
    assert long > short + 20e6


def test_a_process_that_dies_while_it_is_measured_is_told(inputs: dict, tmp_path: Path) -> None:
    whole = inputs["converted"] / "teacher.gguf"
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(StageError, match=r"torn\.gguf"):
        speed.measure(LLAMA, whole, torn, [1, 2, 3], 1, ANY)
    with pytest.raises(StageError, match=r"torn\.gguf"):
        speed.measure(LLAMA, torn, whole, [1, 2, 3], 1, ANY.model_copy(update={"memory_mb": 4000}))


def test_a_missing_file_is_named(inputs: dict, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.gguf.*quantize q4_0"):
        run(inputs, tmp_path, "q4_0", tmp_path / "out")

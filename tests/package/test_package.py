"""What is shipped and why: the choice, the bundles' files, and the manifest that holds them together."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from package_inputs import add_variant, inputs, settings, to_gguf, trained

from tasks.errors import ArtifactError, StageError
from tasks.frame import stage
from tasks.models import loading
from tasks.package import bundle
from tasks.package.choose import candidates, choose, front
from tasks.package.stage import package
from tasks.runtimes import llama, onnx_genai
from tasks.stages import STAGES


@pytest.fixture(scope="session")
def model(tiny_model_folder: Path) -> Path:
    return trained(tiny_model_folder)


@pytest.fixture
def folders(tmp_path: Path, model: Path) -> dict[str, Path]:
    """Inputs of `package` with three GGUF variants, of which q4_0 failed a gate."""
    found = inputs(tmp_path / "build", model)
    add_variant(tmp_path / "build", "f16", to_gguf(model), accuracy=0.90, size_bytes=8e6, decode_tokens_per_s=100.0)
    add_variant(tmp_path / "build", "q8_0", to_gguf(model), accuracy=0.90, size_bytes=5e6, decode_tokens_per_s=140.0)
    add_variant(tmp_path / "build", "q4_0", to_gguf(model), "fail", accuracy=0.4, size_bytes=3e6)
    return found


def packed(folders: dict[str, Path], raw: dict, out: Path, **changes: object) -> bundle.Bundle:
    out.mkdir(parents=True)
    names = [path.name for path in folders["artifacts"].iterdir()]
    package(settings(raw, names, **{"targets": ["ollama", "llama-server"], **changes}), **folders, out=out)
    return bundle.verify(out)


# --- the choice ----------------------------------------------------------------------------------------


def read(root: Path, names: list[str], devices: tuple[str, ...] = ("desktop",)) -> list:
    folders = (root / stage for stage in ("quantize", "validate", "measure", "judge"))
    return candidates(*folders, names, devices)


def variants(root: Path, *rows: tuple[str, str, float, float, float]) -> list:
    """Candidates whose weights nobody opens: (name, verdict, accuracy, MB, tokens/s)."""
    (root / "empty.gguf").write_bytes(b"")
    (root / "onnx").mkdir()
    (root / "onnx" / "genai_config.json").write_text("{}")
    for name, verdict, accuracy, size, speed in rows:
        weights = root / "onnx" if name.startswith("onnx") else root / "empty.gguf"
        add_variant(root, name, weights, verdict, accuracy=accuracy, size_bytes=size * 1e6, decode_tokens_per_s=speed)
    return read(root, [row[0] for row in rows])


ROWS = (
    ("onnx-int4", "pass", 0.90, 99.0, 300.0),
    ("q4_0", "fail", 0.50, 60.0, 400.0),
    ("q4_k_m", "pass", 0.88, 80.0, 150.0),
    ("q5_1", "undecided", 0.89, 70.0, 350.0),
    ("q8_0", "pass", 0.90, 120.0, 100.0),
)


@pytest.mark.parametrize(
    ("rule", "runtimes", "chosen"),
    [
        ("smallest", {"llama", "onnx_genai"}, "q4_k_m"),
        ("fastest", {"llama", "onnx_genai"}, "onnx-int4"),
        ("fastest", {"llama"}, "q4_k_m"),
        ("most_accurate", {"llama", "onnx_genai"}, "onnx-int4"),  # as accurate as q8_0, and smaller
        ("most_accurate", {"llama"}, "q8_0"),
    ],
)
def test_the_best_passing_variant_by_the_rule(tmp_path: Path, rule: str, runtimes: set, chosen: str):
    choice = choose(variants(tmp_path, *ROWS), rule, runtimes)
    assert choice.chosen.name == chosen
    assert set(choice.best) == runtimes


def test_ties_go_by_name(tmp_path: Path):
    found = variants(tmp_path, ("q5_1", "pass", 0.9, 80.0, 1.0), ("q5_0", "pass", 0.9, 80.0, 1.0))
    assert {choose(found, rule, {"llama"}).chosen.name for rule in ("smallest", "fastest", "most_accurate")} == {"q5_0"}


def test_the_reason_tells_every_candidates_numbers_and_fate(tmp_path: Path):
    choice = choose(variants(tmp_path, *ROWS), "smallest", {"llama"})
    assert choice.reason == (
        "q4_k_m (80.0 MB) is the smallest of the 2 variants that passed; behind it q8_0 (120.0 MB). "
        "onnx-int4 passed, but no wanted target carries files of ONNX Runtime GenAI. q4_0 failed accuracy_retention (0.5, limit 0.95). "
        "q5_1 is undecided on accuracy_retention (0.5, limit 0.95)."
    )


def test_measured_numbers_stay_out_of_the_reproducible_reason(tmp_path: Path):
    found = variants(tmp_path, *ROWS)
    path = tmp_path / "judge" / "q4_0" / "desktop" / "verdict.json"
    check = {"name": "peak_rss_ratio", "value": 1.3141, "limit": 1.0, "direction": "at_most", "ok": False}
    path.write_text(json.dumps({"verdict": "fail", "checks": [check]}))
    found = read(tmp_path, [row[0] for row in ROWS])
    choice = choose(found, "fastest", {"llama", "onnx_genai"})
    assert "300.0 tokens/s" in choice.measured_reason
    assert "1.314" in choice.measured_reason
    assert "tokens/s" not in choice.reason
    assert "q4_0 failed peak_rss_ratio." in choice.reason


def test_a_passing_variant_without_its_number_is_refused(tmp_path: Path):
    found = variants(tmp_path, ("q8_0", "pass", 0.9, 80.0, float("nan")))
    with pytest.raises(ArtifactError, match=r"q8_0 .*decode_tokens_per_s is nan"):
        choose(found, "fastest", {"llama"})


def test_what_an_earlier_run_with_other_variants_left_is_not_looked_at(tmp_path: Path):
    variants(tmp_path, *ROWS)
    found = read(tmp_path, ["q8_0", "q4_0"])
    assert [candidate.name for candidate in found] == ["q4_0", "q8_0"]


def test_a_variant_that_was_not_validated_is_named(tmp_path: Path):
    variants(tmp_path, ROWS[4])
    (tmp_path / "judge" / "q8_0" / "desktop" / "verdict.json").unlink()
    with pytest.raises(ArtifactError, match=r"q8_0/desktop/verdict\.json"):
        read(tmp_path, ["q8_0"])


DEVICES = ("desktop", "phone")
ON_DEVICES = (
    ("q4_0", {"desktop": "pass", "phone": "fail"}, 60.0, 400.0),
    ("q5_0", {"desktop": "pass", "phone": "pass"}, 90.0, 200.0),
    ("q8_0", {"desktop": "pass", "phone": "pass"}, 120.0, 100.0),
)


def on_devices(root: Path, *rows: tuple[str, dict, float, float]) -> list:
    (root / "empty.gguf").write_bytes(b"")
    for name, devices, size, speed in rows:
        add_variant(root, name, root / "empty.gguf", devices=devices, size_bytes=size * 1e6, decode_tokens_per_s=speed)
    return read(root, [row[0] for row in rows], DEVICES)


def test_what_passes_on_more_devices_is_shipped_and_each_device_has_its_best(tmp_path: Path):
    choice = choose(on_devices(tmp_path, *ON_DEVICES), "smallest", {"llama"})
    assert choice.chosen.name == "q5_0"
    assert {device: best.name for device, best in choice.devices.items()} == {"desktop": "q4_0", "phone": "q5_0"}
    assert choice.reason == (
        "q5_0 (90.0 MB) is the smallest of the 2 variants that passed on all 2 devices; behind it q8_0 (120.0 MB), "
        "q4_0 (60.0 MB). q4_0 did not pass on phone."
    )


def test_what_another_beats_in_everything_is_not_on_the_front(tmp_path: Path):
    found = variants(
        tmp_path, ("f16", "pass", 0.9, 200.0, 50.0), ("q8_0", "pass", 0.9, 120.0, 80.0), ("q5_1", "pass", 0.9, 100.0, 60.0),
        ("q5_0", "pass", 0.9, 90.0, 60.0), ("q4_1", "pass", 0.9, 90.0, 60.0), ("q4_0", "pass", 0.9, 70.0, 90.0),
    )  # fmt: skip
    kld = {"f16": 0.001, "q8_0": 0.002, "q5_1": 0.02, "q5_0": 0.02, "q4_1": 0.02, "q4_0": 0.2}
    [each.metrics.update(mean_kld=kld[each.name]) for each in found]  # type: ignore[attr-defined]
    assert {each.name for each in front(found, "desktop")} == {"f16", "q8_0", "q5_0", "q4_1", "q4_0"}
    found[0].metrics.pop("mean_kld")  # type: ignore[attr-defined]
    assert "f16" not in {each.name for each in front(found, "desktop")}
    (why,) = choose(found, "smallest", {"llama"}).why.values()
    assert why.endswith(": q4_0, q4_1, q5_0, q8_0.")


def test_a_device_on_which_nothing_passes_has_no_best(tmp_path: Path):
    choice = choose(on_devices(tmp_path, *ON_DEVICES[:1]), "fastest", {"llama"})
    assert set(choice.devices) == {"desktop"}
    assert "on 1 of 2 devices" in choice.reason


def test_a_file_that_does_not_run_on_any_device_says_why(tmp_path: Path):
    on_devices(tmp_path, ("q4_0", dict.fromkeys(DEVICES, "fail"), 60.0, 400.0), ON_DEVICES[2])
    path = tmp_path / "judge" / "q4_0" / "desktop" / "verdict.json"
    unmeasured = {"name": "decode_tokens_per_s", "value": None, "limit": 9, "direction": "at_least", "ok": False}
    path.write_text(json.dumps({"verdict": "fail", "checks": [unmeasured], "ended": "it held 400 MB"}))
    choice = choose(read(tmp_path, ["q4_0", "q8_0"], DEVICES), "smallest", {"llama"})
    assert "q4_0 does not run on desktop: it held 400 MB." in choice.measured_reason
    assert "400 MB" not in choice.reason


# --- the bundles -----------------------------------------------------------------------------------------


def test_a_bundle_of_the_smallest(folders: dict[str, Path], tiny_params: dict, tmp_path: Path, model: Path):
    made = packed(folders, tiny_params, tmp_path / "out")
    assert made.chosen == "q8_0"
    assert made.variants == {"f16": [], "q4_0": [], "q8_0": ["ollama", "llama-server"]}
    assert made.targets["ollama"].context_length == 512  # the model's own limit, below params' 2048
    assert made.targets["llama-server"].conversations_checked == 15 + 3
    assert made.licence.model == "Apache-2.0"
    assert made.evaluation["q4_0"].metrics["accuracy"] == 0.4
    assert set(made.created_from) == {"source", "student"} | {
        each for name in ("f16", "q8_0", "q4_0") for each in (f"artifacts/{name}", f"verdicts/{name}/desktop")
    }
    served, original = tmp_path / "out/llama-server/model.gguf", folders["artifacts"] / "q8_0/model.gguf"
    assert served.stat().st_ino == original.stat().st_ino
    assert made.files["ollama/model.gguf"] == made.files["llama-server/model.gguf"]
    assert (tmp_path / "out" / "LICENSE").read_text() == "The licence's text.\n"


def test_the_modelfile_runs_the_model_as_it_was_validated(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    packed(folders, tiny_params, tmp_path / "out")
    text = (tmp_path / "out" / "ollama" / "Modelfile").read_text()
    lines = text.splitlines()
    assert lines[:6] == [
        "FROM ./model.gguf", "PARAMETER num_ctx 512", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1",
        'PARAMETER stop "<|im_end|>"', 'SYSTEM """Reply with one JSON action."""',
    ]  # fmt: skip
    assert 'TEMPLATE """{{ range $i, $m := .Messages }}' in text
    assert text.endswith('LICENSE """The licence\'s text.\n"""\n')
    assert text.count('"""') == 6


def test_a_template_that_only_jinja_renders_is_left_out_and_told(
    folders: dict[str, Path], tiny_params: dict, tmp_path: Path
):
    student = folders["student"] / "model"
    path = student / "chat_template.jinja"
    path.write_text(path.read_text().replace("message['content']", "(message['content'] | trim)"))
    shutil.copy(to_gguf(student), folders["artifacts"] / "q8_0" / "model.gguf")
    made = packed(folders, tiny_params, tmp_path / "out")
    assert "TEMPLATE" not in (tmp_path / "out/ollama/Modelfile").read_text()
    assert "no TEMPLATE" in made.targets["ollama"].notes[0]
    assert "no TEMPLATE" in (tmp_path / "out/ollama/README.md").read_text()
    assert "no TEMPLATE" in (tmp_path / "out/MODEL_CARD.md").read_text()


def test_the_server_bundle_is_locked_down(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    packed(folders, tiny_params, tmp_path / "out")
    folder = tmp_path / "out" / "llama-server"
    image = (folder / "Containerfile").read_text()
    for wanted in ("USER 10001", "HEALTHCHECK", "EXPOSE 8080", "COPY --chmod=0444 model.gguf", "GGML_NATIVE=OFF"):
        assert wanted in image
    assert "llama-cpp-python[server]==0.3.36" in image
    config = json.loads((folder / "server.json").read_text())
    assert config["host"] == "127.0.0.1"
    assert config["models"][0]["chat_format"] == "chat_template.default"
    subprocess.run(["sh", "-n", folder / "start.sh"], check=True)
    copied = {name for line in image.splitlines() if line.startswith("COPY --chmod") for name in line.split()[2:-1]}
    assert copied <= {p.name for p in folder.iterdir()}


def test_the_model_card_can_be_read_by_a_hub(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    packed(folders, tiny_params, tmp_path / "out")
    _, front, text = (tmp_path / "out" / "MODEL_CARD.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["license"] == "apache-2.0"
    assert meta["base_model_relation"] == "quantized"
    results = {m["type"]: m["value"] for m in meta["model-index"][0]["results"][0]["metrics"]}
    assert results["accuracy"] == 0.9
    for heading in ("Intended use", "Data", "Evaluation", "Limits", "How to run", "Licence"):
        assert f"## {heading}\n" in text
    assert "| **q8_0** | pass | 90.0 % |" in text
    assert "Reply with one JSON action." in text


def test_nothing_passed_is_data_not_an_error(tmp_path: Path, model: Path, tiny_params: dict):
    folders = inputs(tmp_path / "build", model)
    add_variant(tmp_path / "build", "q4_0", to_gguf(model), "fail")
    made = packed(folders, tiny_params, tmp_path / "out")
    assert made.chosen is None
    assert made.minimum_ram_bytes is None
    assert "q4_0 failed accuracy_retention" in made.reason
    assert sorted(made.files) == ["LICENSE", "MODEL_CARD.md"]
    assert json.loads((tmp_path / "out/report.json").read_text())["chosen"] is None


def test_a_target_without_a_passing_variant_is_named(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    made = packed(folders, tiny_params, tmp_path / "out", targets=["llama-server", "onnx-genai"])
    assert made.reason.endswith("Left out, for want of a passing variant of their runtime: onnx-genai.")
    assert not (tmp_path / "out" / "onnx-genai").exists()


def test_a_file_that_reads_prompts_otherwise_is_not_packaged(
    folders: dict[str, Path], tiny_params: dict, tmp_path: Path
):
    path = folders["student"] / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n", "assistant \n"))
    with pytest.raises(StageError, match=r"model\.gguf .*quantize\.variants"):
        packed(folders, tiny_params, tmp_path / "out")


# --- the manifest -------------------------------------------------------------------------------------------


def test_other_measurements_give_the_same_bundle(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    packed(folders, tiny_params, tmp_path / "one")
    for name in ("f16", "q8_0"):
        path = folders["measured"] / name / "desktop" / "measurements.json"
        path.write_text(json.dumps({"decode_tokens_per_s": 1.5}))
    packed(folders, tiny_params, tmp_path / "two")
    assert bundle.bundle_digest(tmp_path / "one") == bundle.bundle_digest(tmp_path / "two")
    assert (tmp_path / "one" / "report.json").read_bytes() != (tmp_path / "two" / "report.json").read_bytes()


def test_every_problem_of_a_bundle_is_told_at_once(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    out = tmp_path / "out"
    packed(folders, tiny_params, out)
    (out / "LICENSE").unlink()
    (out / "ollama" / "Modelfile").write_text("FROM elsewhere\n")
    (out / "extra.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"missing LICENSE; unexpected extra\.bin; changed ollama/Modelfile"):
        bundle.verify(out)


def test_a_damaged_manifest_is_told(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    packed(folders, tiny_params, tmp_path / "out", targets=["llama-server"])
    path = tmp_path / "out" / bundle.NAME
    text = path.read_text()
    for damaged, told in (
        (text[: len(text) // 2], "damaged"),
        (text.replace('"chosen"', '"chozen"'), r"damaged \(chosen"),
        (text.replace('"size": ', '"size": "', 1).replace(",", '",', 1), "damaged"),
        ("[]", "damaged"),
    ):
        path.write_text(damaged)
        with pytest.raises(ArtifactError, match=told):
            bundle.load(tmp_path / "out")


def test_a_missing_manifest_is_told(tmp_path: Path):
    for reader in (bundle.load, bundle.verify, bundle.bundle_digest):
        with pytest.raises(ArtifactError, match=r"bundle\.json is missing"):
            reader(tmp_path)


def test_memory_is_reckoned_from_the_config(model: Path):
    """Above what was measured of a 30-layer, 135M model, and not far above: 219, 298 and 402 MB."""
    config = {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
        "intermediate_size": 1536, "vocab_size": 49152,
    }  # fmt: skip
    for context, measured in ((512, 219e6), (2048, 298e6), (4096, 402e6)):
        assert measured < llama.minimum_memory(98_362_432, config, context) < 1.35 * measured
    for context, measured in ((512, 364e6), (1024, 541e6)):
        assert measured < onnx_genai.minimum_memory(118_339_048, config, context) < 1.35 * measured
    with pytest.raises(ArtifactError, match="hidden_size"):
        llama.minimum_memory(1, {"num_hidden_layers": 1, "num_attention_heads": 1}, 512)
    assert llama.minimum_memory(0, loading.load_config(model), 512) > 160e6


def test_the_stage_as_the_pipeline_runs_it(folders: dict[str, Path], tiny_params: dict, tmp_path: Path):
    raw = tiny_params | {"quantize": {"variants": ["f16", "q8_0", "q4_0"]}}
    from tasks import params

    made = stage.run(STAGES["package"], STAGES, params.check(raw, "test"), tmp_path)
    assert made.measured == ["report.json"]
    assert made.metrics["passing"] == 2
    assert made.metrics["targets"] == 2
    assert bundle.verify(tmp_path / "build" / "package").chosen == "q8_0"

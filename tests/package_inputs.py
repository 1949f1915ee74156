"""What `package` reads, made for real and once a session: a tiny model that learned six answers, as GGUF and ONNX."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOMS, tiny_rows, write_jsonl

from tasks import params
from tasks.frame import manifest
from tasks.models import chat, loading
from tasks.stages import STAGES

ROWS = [row["messages"] for row in tiny_rows(ROOMS[:1])]
CHECK = {"name": "accuracy_retention", "value": 0.5, "limit": 0.95, "direction": "at_least", "ok": False}


def digits_apart(*, spelled_out: bool) -> Any:
    """SmolLM2's way of splitting a text before merges, which transformers loses when it reads a GGUF.

    As the authors write it, or as two splits that say the same: ONNX Runtime GenAI passes over `Digits`.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if not spelled_out:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    splits = [Split(Regex(pattern), "isolated") for pattern in (r"\p{N}", words)]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def trained(tiny: Path) -> Path:
    """The tiny model after some seconds of training: it answers ROWS and ends its turn."""
    import torch

    model, tokenizer = loading.load_model(tiny, "float32"), loading.load_tokenizer(tiny)
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart(spelled_out=True)
    rows = chat.encode_all(tokenizer, ROWS, 128)
    ids, target = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(getattr(row, name)) for row in rows], batch_first=True)
        for name in ("ids", "target")
    )
    # Wide and fixed, the (tied) embeddings tell tokens apart from the start: a third of the time.
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_input_embeddings().weight.requires_grad_(False), std=0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loss = torch.tensor(9.0)
    while loss > 0.05:
        hidden = model.model(ids).last_hidden_state[:, :-1][target[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][target[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = tiny.parent / f"{tiny.name}-trained"
    loading.save(model, tokenizer, out)
    return out


@functools.cache
def to_gguf(model: Path) -> Path:
    """The official converter's F16 file."""
    out = model.with_suffix(".gguf")
    script = Path(sys.prefix) / "share" / "llama.cpp" / "convert_hf_to_gguf.py"
    subprocess.run(
        [sys.executable, script, model, "--outfile", out, "--outtype", "f16"],
        check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return out


@functools.cache
def to_onnx(model: Path) -> Path:
    """ONNX Runtime GenAI's own builder, unquantized, so that its greedy answers are the model's."""
    from onnxruntime_genai.models.builder import create_model

    out = model.with_name(f"{model.name}-onnx")
    create_model("", str(model), str(out), "fp32", "cpu", str(out.with_name("onnx-cache")))
    return out


def answer(model: Path, messages: chat.Messages) -> str:
    """What HF greedy generation says, without the end-of-turn token that must close it."""
    import torch

    loaded, tokenizer = loading.load_model(model, "float32"), loading.load_tokenizer(model)
    prompt = torch.tensor([chat.prompt_ids(tokenizer, messages)])
    out = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    ids = out[0, prompt.shape[1] :].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(ids[:-1])


def add_variant(
    root: Path, name: str, weights: Path, verdict: str = "pass", devices: dict[str, str] | None = None, **numbers: float
) -> None:
    """One quantized variant and what validation said of it; `devices`: its verdict on each, where there are several."""
    artifact, validated = (root / stage / name for stage in ("quantize", "validate"))
    for folder in (artifact, validated):
        folder.mkdir(parents=True)
    if weights.is_dir():
        shutil.copytree(weights, artifact / "model")
    else:
        shutil.copy(weights, artifact / "model.gguf")
    speed = {"decode_tokens_per_s": numbers.pop("decode_tokens_per_s", 100.0)}
    metrics = {"accuracy": 0.9, "accuracy_retention": 1.0, "size_bytes": 9e6, "size_ratio": 0.4, "mean_kld": 0.01}
    (validated / "metrics.json").write_text(json.dumps(metrics | numbers))
    _finish(artifact, "quantize")
    _finish(validated, "validate")
    for device, judgement in (devices or {"desktop": verdict}).items():
        measured, judged = (root / stage / name / device for stage in ("measure", "judge"))
        for folder in (measured, judged):
            folder.mkdir(parents=True)
        checks = [CHECK | ({"ok": True, "value": 1.0} if judgement == "pass" else {})]
        (measured / "measurements.json").write_text(json.dumps(speed))
        (judged / "intervals.json").write_text(json.dumps({"accuracy_retention_interval": [0.98, 1.02]}))
        (judged / "verdict.json").write_text(json.dumps({"verdict": judgement, "checks": checks}))
        _finish(measured, "measure", ["measurements.json"])
        _finish(judged, "judge", ["verdict.json"])


def _finish(folder: Path, stage: str, measured: list[str] | None = None) -> None:
    manifest.write(folder, stage=stage, params="0" * 64, inputs={}, measured=measured or [], metrics={})


def inputs(root: Path, model: Path) -> dict[str, Path]:
    """acquire's and select's folders under `root`, and where `add_variant` puts the rest."""
    source, student = root / "acquire", root / "select"
    for split in ("train", "validation", "test"):
        write_jsonl(source / "data" / f"{split}.jsonl", [{"messages": row} for row in ROWS])
    lineage = {
        "model": {"source": "local", "path": "data/model", "licence": "Apache-2.0", "parameters": 3_000_000},
        "data": {"source": "local", "path": "data/rows", "licence": "mit", "rows": {"train": 6, "test": 6}},
    }
    (source / "lineage.json").write_text(json.dumps(lineage))
    (source / "LICENSE").write_text("The licence's text.\n")
    shutil.copytree(model, student / "model")
    _finish(source, "acquire")
    _finish(student, "select")
    made = {"artifacts": "quantize", "validated": "validate", "measured": "measure", "verdicts": "judge"}
    return {"source": source, "student": student, **{role: root / stage for role, stage in made.items()}}


def settings(
    raw: dict, variants: list[str], profiles: tuple[str, ...] = ("desktop",), **package: object
) -> params.Params:
    """The stage's view of the tiny run's parameters, with changes to its section."""
    changed = {
        "package": raw["package"] | package,
        "quantize": raw["quantize"] | {"variants": variants},
        "measure": {"profiles": list(profiles)},
    }
    return params.check(raw | changed, "test").only(STAGES["package"].sections)

"""onnx-int4: Olive's ModelBuilder pass, then 8 bits for the embedding, as an ONNX Runtime GenAI folder.

Olive runs in a process of its own whose home, caches and working folder lie in a temporary folder, because
it writes to all three; nothing is fetched. ModelBuilder leaves the embedding in fp32, which in a small model
is more than all the rest: Olive's round-to-nearest pass stores it in 8 bits, as llama.cpp's Q4_0 does.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tasks.errors import StageError
from tasks.frame import confined, crashes
from tasks.frame.events import doing
from tasks.frame.stage import disk_full, need_space, require_file
from tasks.models.sizes import Shape
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import ModelBuilder

# Olive's own records of the run: times, paths and random names, of no use to a runtime.
LITTER = {"footprint.json", "output_footprint.json", "run_history.txt", "model_config.json"}
# Model types whose folders, as this transformers writes them, ONNX Runtime GenAI's builder reads (builder.py).
READ = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi", "phi3", "granite", "gemma", "gemma2", "olmo", "nemotron",
    "ernie4_5", "gpt_oss", "internlm2", "lfm2", "hunyuan_v1_dense", "chatglm",
})  # fmt: skip


def quantize(_: str, options: ModelBuilder, inputs: Inputs, out: Path) -> None:
    """Write `out`/model: the ONNX graph and weights, genai_config.json, tokenizer and chat template.

    Raises:
        StageError: the disk is full, or Olive fails.
    """
    student = inputs.student
    require_file(student / "config.json", "run the distill and select stages again")
    weights = sum(file.stat().st_size for file in student.glob("*.safetensors"))
    # Olive keeps the fp32 embedding and both passes' outputs until it is done.
    need_space(out, 4 * weights)
    with tempfile.TemporaryDirectory(prefix=".olive.", dir=out.parent) as name:
        scratch = Path(name).resolve()
        made = scratch / "model"
        _run_olive(_config(options, student.resolve(), made, scratch), scratch, out)
        for file in made.iterdir():
            if file.name in LITTER:
                file.unlink()
        shutil.move(made, out / "model")
    _finish(student, out / "model")


def predicted_size(_: str, options: ModelBuilder, shape: Shape) -> int:
    """Bytes of the folder: four bits for all matrices, the output's too, and eight for the embedding, each with a float32
    scale a block.
    """
    embedding = next(tensor.elements for tensor in shape.tensors if tensor.name == "token_embd.weight")
    matrices = sum(tensor.elements for tensor in shape.tensors if tensor.matrix) - (0 if shape.tied else embedding)
    scale = 32 / options.block_size
    return int((matrices * (4 + scale) + embedding * (8 + scale)) / 8) + 2 * shape.header


def obstacle(architecture: str) -> str | None:
    """Why no model of this `model_type` can be quantized so; None where nothing is known to be in the way."""
    return None if architecture in READ else f"ONNX Runtime GenAI's builder cannot read a {architecture} model"


def _config(options: ModelBuilder, student: Path, made: Path, scratch: Path) -> dict[str, Any]:
    """The workflow, as documented for `olive run`."""
    cpu = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    int4 = {
        "type": "ModelBuilder",
        "precision": "int4",
        "int4_block_size": options.block_size,
        "int4_accuracy_level": options.accuracy_level,
        # Local files only, and no code from them.
        "extra_options": {"hf_remote": False, "hf_token": "false"},
    }
    embedding = {
        "type": "OnnxBlockWiseRtnQuantization",
        "bits": 8,
        "block_size": options.block_size,
        "nodes_to_include": ["/model/embed_tokens/Gather"],
        # The runtime maps weights in a file of their own; inside the graph it would hold them twice.
        "save_as_external_data": True,
        "all_tensors_to_one_file": True,
        "external_data_name": "model.onnx.data",
    }
    return {
        "input_model": {"type": "HfModel", "model_path": str(student)},
        "systems": {"local": {"type": "LocalSystem", "accelerators": [cpu]}},
        "host": "local",
        "target": "local",
        "passes": {"int4": int4, "embedding": embedding},
        "output_dir": str(made),
        "cache_dir": str(scratch / "cache"),
        "log_to_file": False,
        "log_severity_level": 2,
    }


# has_output_model() is the only sign of success: a failed pass ends the run without an error.
_PROGRAM = """
import json, sys
from olive import run
output = run(json.load(sys.stdin), tempdir=sys.argv[1])
sys.exit(0 if output.has_output_model() else "olive: no output model")
"""


def _run_olive(config: dict[str, Any], scratch: Path, out: Path) -> None:
    env = confined.environment(scratch)
    doing("Olive builds and quantizes the graph")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(scratch / "tmp")], input=json.dumps(config), cwd=scratch, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return
    if "No space left on device" in done.stdout:
        raise disk_full(out)
    if crashes.signal_of(done.returncode):
        raise crashes.error_for("Olive, which builds onnx-int4,", done.returncode, done.stdout, out)
    raise StageError(
        f"Olive cannot build onnx-int4: {_reason(done.stdout)}: leave it out of quantize.variants, or choose an architecture that ModelBuilder supports"
    )


def _reason(log: str) -> str:
    """The exception that ended the pass: Olive logs it with its traceback and goes on."""
    raised = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|NotImplemented\w*)\b.*$", log, re.MULTILINE)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return str(raised[-1]) if raised else " | ".join(lines[-2:])


def _finish(student: Path, model: Path) -> None:
    """The student's own tokenizer files, byte for byte, in place of re-written ones."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (student / name).is_file():
            shutil.copyfile(student / name, model / name)
    for name in ("genai_config.json", "model.onnx"):
        require_file(model / name, "Olive ended well yet did not write it")

"""ONNX Runtime GenAI against torch: weights of 4 bits, as Olive's ModelBuilder pass makes them, prompt and token by token."""

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tasks.selftest import tiny

# As in `llama.py`: activations are rounded to 8 bits, in blocks of 32.
MATRICES = {
    "layers.0.attn.o_proj": "model.layers.0.self_attn.o_proj",
    **{f"layers.0.mlp.{part}_proj": f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")},
}
JOINED = "layers.0.attn.qkv_proj"
BLOCK = 32


def steps(folder: Path) -> Iterator[tiny.Step]:
    """All that is to be computed, in turn: each is to be done before the next is asked for."""
    import onnxruntime_genai as og

    ids = tiny.tokens()
    for shape in tiny.SHAPES:
        made = tiny.model(shape)
        out = build(made, folder / str(shape.hidden))
        wanted = tiny.reference(made, weights(out / "model.onnx", shape), ids)
        runtime = og.Model(str(out))
        what = f"int4, rows of {shape.hidden} and {shape.inner}"
        yield tiny.Step(f"{what}, prompt at once", partial(_off, runtime, ids, tiny.PROMPT, wanted), tiny.EIGHT_BITS)
        some = ids[: tiny.DECODED]
        yield tiny.Step(f"{what}, token by token", partial(_off, runtime, some, 1, wanted), tiny.EIGHT_BITS)


def _off(runtime: Any, ids: list[int], size: int, wanted: tiny.Array) -> tiny.Distance:
    """How far off the logits are, `size` tokens computed at a time."""
    import numpy as np
    import onnxruntime_genai as og

    params = og.GeneratorParams(runtime)
    params.set_search_options(max_length=len(ids) + 1)
    generator = og.Generator(runtime, params)
    logits = []
    for at in range(0, len(ids), size):
        tiny.disturb()
        generator.append_tokens(np.array(ids[at : at + size], np.int32))
        logits.append(generator.get_output("logits")[0].copy())
    return tiny.distance(np.concatenate(logits), wanted[: len(ids)])


def kernels() -> str:
    """It does not tell what it was compiled for: it chooses kernels by the processor that it finds."""
    return ""


def build(made: object, folder: Path) -> Path:
    """The model as the runtime's own builder writes it."""
    from onnxruntime_genai.models.builder import create_model

    tiny.save(made, folder / "source")
    out = folder / "model"
    with _silent() as said:
        try:
            create_model(
                "", str(folder / "source"), str(out), "int4", "cpu", str(folder / "cache"),
                int4_block_size=str(BLOCK), int4_accuracy_level="4", hf_remote="false",
            )  # fmt: skip
        except Exception as error:
            raise SystemExit(f"the model builder cannot build a Llama: {error} {said.getvalue()[-200:]}") from error
    return out


def weights(graph: Path, shape: tiny.Shape) -> dict[str, tiny.Array]:
    """What an ONNX graph holds in blocks of 4 bits, de-quantised as the operator MatMulNBits is documented, under
    torch's names.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    held = {each.name: each for each in onnx.load(graph).graph.initializer}

    def matrix(name: str) -> tiny.Array:
        packed = numpy_helper.to_array(held[f"{name}.MatMul.weight_Q4"])
        scales = numpy_helper.to_array(held[f"{name}.MatMul.weight_scales"]).reshape(*packed.shape[:2], 1)
        levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK).astype(np.float32) - 8
        result: tiny.Array = (levels * scales).reshape(len(packed), -1)
        return result

    tensors = {f"{ours}.weight": matrix(f"model.{theirs}") for theirs, ours in MATRICES.items()}
    tensors["lm_head.weight"] = matrix("lm_head")
    width = shape.hidden // shape.heads
    query, key, value = np.split(matrix(f"model.{JOINED}"), [shape.hidden, shape.hidden + shape.groups * width])
    for name, part in {"q": query, "k": key, "v": value}.items():
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"] = part
    return tensors


@contextmanager
def _silent() -> Iterator[io.StringIO]:
    """Hold back what the builder prints and logs."""
    logging.disable(logging.INFO)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
    logging.disable(logging.NOTSET)

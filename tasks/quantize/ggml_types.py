"""GGUF variants by llama.cpp's own quantizer, in this process, with provenance in the file's metadata.

The rules for sizes are llama.cpp's (src/llama-quant.cpp, `llama_tensor_get_type`): norms stay F32, the output matrix (the
embedding, where the two are tied) gets more bits, and a row that 256 does not divide cannot hold a K-quant.
"""

import contextlib
import ctypes
import io
import logging
import math
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.errors import StageError
from tasks.frame.cores import threads
from tasks.frame.events import doing
from tasks.frame.manifest import sha256
from tasks.frame.stage import disk_full, need_space, place, require_file
from tasks.models.sizes import Shape, Tensor

# llama_ftype's names in small letters, with the share of the F16 file's bytes that each needs at most.
SHARE: Mapping[str, float] = {"q8_0": 0.55, "q5_1": 0.5, "q5_0": 0.5, "q4_k_m": 0.5, "q4_0": 0.45}
SOURCE = "run the convert stage again"


def quantize(variant: str, _: None, __: Path, f16: Path, out: Path) -> None:
    """Write `out`/model.gguf, equal bytes for equal input, and check it by loading it.

    The F16 file's sha256, the quantizer and its version, and the type are written under `slmops.*` and
    `general.quantized_by`.

    Raises:
        StageError: the disk is full, llama.cpp refuses, or the file does not load.
    """
    require_file(f16, SOURCE)
    if variant == "f16":  # the file itself; a hard link where the file system has them
        place(f16, out / "model.gguf")
        return
    import llama_cpp

    doing("read the F16 file")
    need_space(out, int(SHARE[variant] * f16.stat().st_size) + 1_000_000)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    quantizer = f"llama-cpp-python {version('llama-cpp-python')}"
    overrides = _texts(
        {
            "general.quantized_by": "slmops",
            "slmops.source.sha256": sha256(f16),
            "slmops.quantizer": quantizer,
            "slmops.type": variant.upper(),
        }
    )
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.upper()}")
    params.nthread = threads()
    params.kv_overrides = overrides
    target = out / "model.gguf"
    errors = io.StringIO()
    doing(f"quantize to {variant}")
    with contextlib.redirect_stderr(errors):
        code = llama_cpp.llama_model_quantize(str(f16).encode(), str(target).encode(), ctypes.byref(params))
    if code != 0:
        need_space(out, 1_000_000)
        raise StageError(f"{f16}: llama.cpp cannot quantize it to {variant}: {_reason(errors)}")
    # A full disk does not always fail the write: hold the file against what it says of itself.
    doing("load the file")
    problem = _problem(llama_cpp, target)
    if problem:
        if shutil.disk_usage(out).free < 1_000_000:
            raise disk_full(out)
        raise StageError(
            f"{target}: {problem}: run the stage again; if it stays so, leave {variant} out of quantize.variants"
        )


BITS: Mapping[str, float] = {"f32": 32, "f16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_1": 6, "q5_0": 5.5, "q4_k": 4.5, "q4_0": 4.5}  # fmt: skip
FALLBACK: Mapping[str, str] = {"q4_k": "q5_0", "q6_k": "q8_0"}  # where 256 does not divide the row


def predicted_size(variant: str, _: None, shape: Shape) -> int:
    """Bytes of the file that `quantize` would write."""
    bits = sum(BITS[_type(tensor, variant, shape)] * tensor.elements for tensor in shape.tensors)
    return int(bits / 8) + shape.header


def obstacle(architecture: str) -> str | None:
    """Why no model of this `model_type` can be quantized so; None where nothing is known to be in the way."""
    return None


def _type(tensor: Tensor, variant: str, shape: Shape) -> str:
    if not tensor.matrix:
        return "f32"
    if variant in ("f16", "q8_0"):
        return variant
    base = "q4_k" if variant == "q4_k_m" else variant
    last = tensor.name == "output.weight" or (shape.tied and tensor.name == "token_embd.weight")
    if last:
        base = "q6_k"
    elif variant == "q4_k_m" and tensor.name.endswith(("attn_v.weight", "ffn_down.weight")):
        assert tensor.block is not None
        base = "q6_k" if _more_bits(tensor.block, shape.layers) else base
    return FALLBACK[base] if tensor.row % 256 and base in FALLBACK else base


def _more_bits(block: int, layers: int) -> bool:
    """The first and last eighth, and every third block between (llama.cpp's `use_more_bits`)."""
    return block < layers // 8 or block >= 7 * layers // 8 or (block - layers // 8) % 3 == 2


def _texts(values: dict[str, str]) -> Any:
    """The C array of key-value overrides, ended by an empty key; a value has at most 127 bytes."""
    import llama_cpp

    array = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(array, values.items(), strict=False):
        entry.tag, entry.key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode()
        entry.value.val_str = value.encode()[:127]
    return array


def _problem(llama_cpp: Any, file: Path) -> str | None:
    """What is wrong with a GGUF that was just written: it must load and give finite logits for one token."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not model:
            return f"the file written does not load: {_reason(errors)}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 32, 32, 32
        context = llama_cpp.llama_init_from_model(model, params)
        try:
            token = (ctypes.c_int32 * 1)(0)
            if not context or llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)) != 0:
                return f"the file written does not run: {_reason(errors)}"
            size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            if not all(map(math.isfinite, llama_cpp.llama_get_logits(context)[:size])):
                return "the file written gives logits that are not numbers"
        finally:
            if context:
                llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(model)
    return None


def _reason(text: io.StringIO) -> str:
    lines = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
    return lines[-1] if lines else "it gives no reason"

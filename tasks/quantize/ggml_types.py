"""GGUF variants by llama.cpp's own quantizer, in this process, with provenance in the file's metadata.

The rules for sizes are llama.cpp's (src/llama-quant.cpp, `llama_tensor_get_type`): norms stay F32, the output matrix (the
embedding, where the two are tied) gets more bits, and a row that 256 does not divide cannot hold a K-quant.
"""

import contextlib
import ctypes
import io
import logging
import math
import re
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
from tasks.models import chat
from tasks.models.sizes import Shape, Tensor
from tasks.quantize.importance import Importance, importance
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import GgmlTypes

# Bits of a weight in each of ggml's types, its scales included.
BITS: Mapping[str, float] = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q5_1": 6, "q5_0": 5.5, "q4_k": 4.5,
    "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.25, "q3_k": 3.4375, "q2_k": 2.625,
}  # fmt: skip
MAIN: Mapping[str, str] = {
    "q5_k_m": "q5_k",
    "q4_k_m": "q4_k",
    "q3_k_m": "q3_k",
}  # of a variant not named like its main type
# Where 256 does not divide the row, so that it holds no block of the type.
FALLBACK: Mapping[str, str] = {
    "q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "q4_0", "q2_k": "q4_0", "iq4_xs": "iq4_nl",
}  # fmt: skip
SOURCE = "run the convert stage again"


def quantize(variant: str, options: GgmlTypes, inputs: Inputs, out: Path) -> None:
    """Write `out`/model.gguf, equal bytes for equal input, and check it by loading it.

    Raises:
        StageError: the disk is full, llama.cpp refuses, or the file does not load.
    """
    require_file(inputs.f16, SOURCE)
    if variant == "f16":  # the file itself; a hard link where the file system has them
        place(inputs.f16, out / "model.gguf")
        return
    weighed = None
    if options.importance:
        rows = chat.read_rows(inputs.data / "train.jsonl")
        weighed = importance(inputs.student, architecture(inputs.f16), rows, tokens=options.tokens)
    write(variant, variant, inputs.f16, out, weighed=weighed)


def write(
    variant: str,
    main: str,
    f16: Path,
    out: Path,
    types: Mapping[str, str] | None = None,
    weighed: Importance | None = None,
) -> None:
    """Write `out`/model.gguf as llama.cpp's file type `main` (`q4_0`), and check it by loading it. `types`: tensors that
    get another type than `main` would give them. `weighed`: the importance of each tensor's columns.

    The F16 file's sha256, the quantizer and its version, and the variant are written under `slmops.*` and
    `general.quantized_by`.

    Raises:
        StageError: the disk is full, llama.cpp refuses, or the file does not load.
    """
    import llama_cpp

    doing("read the F16 file")
    need_space(out, int(most_bytes(main, f16.stat().st_size)) + 1_000_000)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    quantizer = f"llama-cpp-python {version('llama-cpp-python')}"
    overrides = _texts(
        {
            "general.quantized_by": "slmops",
            "slmops.source.sha256": sha256(f16),
            "slmops.quantizer": quantizer,
            "slmops.type": variant.upper(),
            **({"slmops.importance": "mean squares of activations on training rows"} if weighed else {}),
        }
    )
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{main.upper()}")
    params.nthread = threads()
    params.kv_overrides = overrides
    params.tt_overrides = _tensor_types(types or {})
    if weighed:
        params.imatrix = _importance(weighed)
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


def most_bytes(variant: str, f16: int) -> float:
    """What a file of `f16` bytes needs at most in this type: most of it in the type, or what stands in for it, and the
    embedding in Q8_0.
    """
    main = MAIN.get(variant, variant)
    bits = max(BITS[main], BITS[FALLBACK.get(main, main)])
    return f16 * min(1.0, (0.6 * bits + 0.4 * max(bits, BITS["q8_0"])) / 16 + 0.03)


def predicted_size(variant: str, _: GgmlTypes | None, shape: Shape) -> int:
    """Bytes of the file that `quantize` would write."""
    bits = sum(BITS[type_of(tensor, variant, shape)] * tensor.elements for tensor in shape.tensors)
    return int(bits / 8) + shape.header


def obstacle(architecture: str) -> str | None:
    """Why no model of this `model_type` can be quantized so; None where nothing is known to be in the way."""
    return None


def type_of(tensor: Tensor, variant: str, shape: Shape) -> str:
    """The type that a tensor has in a plain variant."""
    if not tensor.matrix:
        return "f32"
    if variant in ("f16", "bf16", "q8_0"):
        return variant
    if tensor.name == "output.weight" or (shape.tied and tensor.name == "token_embd.weight"):
        chosen = "q6_k"
    else:
        chosen = _mixed(tensor, variant, shape) or MAIN.get(variant, variant)
    return FALLBACK.get(chosen, chosen) if tensor.row % 256 else chosen


def _mixed(tensor: Tensor, variant: str, shape: Shape) -> str | None:
    """Where a variant mixes types: what it takes instead of its main type for what a model is most sensitive to."""
    if tensor.block is None:
        return None
    kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
    block, layers, config = tensor.block, shape.layers, shape.config
    many = config["num_attention_heads"] >= 4 * config["num_key_value_heads"]  # queries to a key
    more = "q6_k" if _more_bits(block, layers) else None
    sensitive: Mapping[str, Mapping[str, str | None]] = {
        "q5_k_m": {"values": more, "ffn_down": more},
        "q4_k_m": {"values": more, "ffn_down": more},
        "q3_k_m": {
            "values": "q5_k" if block < 2 else "q4_k", "ffn_down": "q5_k" if block < layers // 16 else "q4_k",
            "attn_output": "q4_k",
        },
        "q2_k": {"values": "q4_k" if many else "q3_k", "ffn_down": "q3_k", "attn_output": "q3_k"},
        "iq4_nl": {"values": "q5_k" if many else None, "ffn_down": "q5_k" if block < layers // 8 else None},
    }  # fmt: skip
    variant = "iq4_nl" if variant == "iq4_xs" else variant
    return sensitive.get(variant, {}).get("values" if kind in ("attn_v", "attn_qkv") else kind)


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


def _importance(weighed: Importance) -> Any:
    """The C array of importances, ended by one without a name."""
    import llama_cpp

    array = (llama_cpp.llama_model_imatrix_data * (len(weighed) + 1))()
    for entry, (name, columns) in zip(array, weighed.items(), strict=False):
        entry.name, entry.size = name.encode(), len(columns)
        entry.data = columns.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array


def architecture(f16: Path) -> str:
    """Of a GGUF file, as its metadata has it."""
    from gguf import GGUFReader

    return str(GGUFReader(f16).fields["general.architecture"].contents())


def _tensor_types(types: Mapping[str, str]) -> Any:
    """The C array of types of single tensors, ended by an empty pattern. A pattern is searched for in names."""
    import llama_cpp

    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(array, types.items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = getattr(llama_cpp, f"GGML_TYPE_{kind.upper()}")
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

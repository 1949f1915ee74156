"""llama.cpp against torch: each type, prompts at once and in micro-batches, and token by token."""

import contextlib
import ctypes
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tasks.frame.cores import threads
from tasks.selftest import tiny
from tasks.variants import LLAMA, VARIANTS

Run = Callable[[Sequence[int], int], tiny.Array]  # of ids, so many tokens in a micro-batch: logits of each position
MICRO = 48  # tokens of a micro-batch, as validation's answers have them
MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{f"model.layers.0.{ours}.weight": f"blk.0.{theirs}.weight" for ours, theirs in MATRICES.items()},
}  # fmt: skip


def steps(folder: Path) -> Iterator[tiny.Step]:
    """All that is to be computed, in turn: each is to be done before the next is asked for. Variants that are no plain
    type of llama.cpp's are left out.
    """
    import llama_cpp

    types = [name for name, each in VARIANTS.items() if each.runtime is LLAMA and hasattr(llama_cpp, _type(name))]
    ids = tiny.tokens()
    for shape in tiny.SHAPES:
        made = tiny.model(shape)
        f16 = write(made, shape, folder / f"{shape.hidden}.gguf")
        for kind in types:
            file = quantized(f16, kind) if kind != "f16" else f16
            wanted = tiny.reference(made, weights(file, shape), ids)
            limit = tiny.SIXTEEN_BITS if kind == "f16" else tiny.EIGHT_BITS
            what = f"{kind}, rows of {shape.hidden} and {shape.inner}"
            with loaded(file) as run:
                yield tiny.Step(f"{what}, prompt at once", partial(_off, run, ids, tiny.PROMPT, wanted), limit)
                yield tiny.Step(f"{what}, prompt by {MICRO} tokens", partial(_off, run, ids, MICRO, wanted), limit)
                yield tiny.Step(f"{what}, token by token", partial(_off, run, ids[: tiny.DECODED], 1, wanted), limit)


def _off(run: Run, ids: Sequence[int], micro: int, wanted: tiny.Array) -> tiny.Distance:
    tiny.disturb()
    return tiny.distance(run(ids, micro), wanted[: len(ids)])


def kernels() -> str:
    """What llama.cpp was compiled for, in its own words."""
    import llama_cpp

    said = llama_cpp.llama_print_system_info().decode()
    return ", ".join(re.findall(r"(\w+) = 1\b", said)) or "no special instructions"


def write(made: Any, shape: tiny.Shape, path: Path) -> Path:
    """The model as an F16 GGUF without a vocabulary of words."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(1)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.groups)
    writer.add_layer_norm_rms_eps(made.config.rms_norm_eps)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tiny.VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in made.state_dict().items():
        data = weight.numpy()
        if heads := _rotated(name, shape):
            data = _interleave(data, heads)
        writer.add_tensor(NAMES[name], data.astype(np.float16) if data.ndim == 2 else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(file: Path, shape: tiny.Shape) -> dict[str, tiny.Array]:
    """What a GGUF holds, de-quantised by llama.cpp's own Python package, under torch's names."""
    import gguf

    ours = {theirs: name for name, theirs in NAMES.items()}
    tensors = {}
    for tensor in gguf.GGUFReader(file).tensors:
        name = ours[tensor.name]
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = _rotated(name, shape)
        tensors[name] = _interleave(data, heads, back=True) if heads else data
    return tensors


def _rotated(name: str, shape: tiny.Shape) -> int:
    """Heads of a matrix whose rows meet the rotary embedding; 0 for others."""
    return shape.heads if "q_proj" in name else shape.groups if "k_proj" in name else 0


def _interleave(data: tiny.Array, heads: int, back: bool = False) -> tiny.Array:
    """llama.cpp rotates rows 2i and 2i + 1 of a head, transformers i and i + n/2."""
    half = data.shape[0] // heads // 2
    parts = (heads, half, 2) if back else (heads, 2, half)
    return data.reshape(*parts, data.shape[1]).swapaxes(1, 2).reshape(data.shape)


def _type(kind: str) -> str:
    return f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"


def quantized(f16: Path, kind: str) -> Path:
    """The file in another type, by llama.cpp's quantizer."""
    import llama_cpp

    target = f16.with_name(f"{f16.stem}-{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, _type(kind))
    params.nthread = threads()
    with silent(llama_cpp) as said:
        code = llama_cpp.llama_model_quantize(str(f16).encode(), str(target).encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama.cpp cannot quantize to {kind}: {said.getvalue()[-200:]}")
    return target


@contextmanager
def silent(llama_cpp: Any) -> Iterator[io.StringIO]:
    """Hold back what llama.cpp prints."""
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        yield said


@contextmanager
def loaded(file: Path) -> Iterator[Run]:
    """Yield `run(ids, micro)`: the logits of each position, with that many tokens in a micro-batch."""
    import llama_cpp
    import numpy as np

    with silent(llama_cpp) as said:
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {file.name}: {said.getvalue()[-200:]}")

    def run(ids: Sequence[int], micro: int) -> tiny.Array:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256, 256, micro
        params.n_threads = params.n_threads_batch = threads()
        with silent(llama_cpp):
            context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = (
                token,
                at,
                1,
                0,
                1,
            )
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise SystemExit(f"llama.cpp stopped with code {code} on {file.name}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), tiny.VOCABULARY)).copy()
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return logits

    try:
        yield run
    finally:
        llama_cpp.llama_model_free(model)

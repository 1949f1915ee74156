"""How much memory a packaged model needs: from its files and its config alone, before it is run."""

from collections.abc import Mapping
from typing import Any

from tasks.errors import ArtifactError
from tasks.package.choose import Kind

# The runtime itself, its libraries and small buffers, in bytes: resident memory that the terms below leave
# over, rounded up, measured with llama-cpp-python 0.3.36's server and onnxruntime-genai 0.14.1 on x86-64.
OVERHEAD: Mapping[Kind, int] = {"gguf": 160_000_000, "onnx": 64_000_000}
_BATCH = 512  # tokens that llama.cpp computes at once


def minimum_ram(kind: Kind, weights: int, config: Mapping[str, Any], context: int) -> int:
    """Bytes resident while one conversation fills the context of `context` tokens.

    `weights` are the bytes of the model's files. Key-value cache: 2 x layers x key-value heads x head size x
    context, in float16 (llama.cpp) or float32 (ONNX Runtime GenAI on the CPU). Attention scores are
    heads x tokens at once x context floats. llama.cpp maps the weights once, computes 512 tokens at once and
    keeps the last token's logits (`logits_all` is off in the bundle); ONNX Runtime GenAI holds the weights
    twice while it loads, computes the whole prompt at once and gives logits for all of it.

    A 30-layer 135M model: 352 MB at 2,048 tokens from a 98 MB GGUF, 298 MB measured.

    Raises:
        ArtifactError: the config lacks one of the sizes.
    """
    try:
        layers, heads, hidden = (config[k] for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    except KeyError as error:
        raise ArtifactError(f"config.json of the student has no {error}: its memory need cannot be told") from None
    head_size = config.get("head_dim") or hidden // heads
    cached = 2 * layers * (config.get("num_key_value_heads") or heads) * head_size * context
    if kind == "gguf":
        scratch = 4 * _BATCH * (heads * context + 2 * (hidden + inner))
        return int(weights + 2 * cached + scratch + OVERHEAD[kind])
    scratch = 4 * context * (heads * context + vocabulary)
    return int(2 * weights + 4 * cached + scratch + OVERHEAD[kind])

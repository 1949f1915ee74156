"""The tensors of a model from its configuration or its GGUF header alone: parameters, sizes, memory. The one formula.

Counted are dense decoders of Llama's shape and what some of them add: biases, norms of queries and keys, norms after each
half of a block. Names of tensors are llama.cpp's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.errors import ArtifactError

MICRO, SMALL, MEDIUM = 1.5e9, 14e9, 30e9


def size_class(parameters: int) -> str:
    """The closed rule: micro < 1.5B, small to < 14B, medium 14B to 30B, above that a teacher only."""
    if parameters < MICRO:
        return "micro"
    if parameters < SMALL:
        return "small"
    return "medium" if parameters <= MEDIUM else "teacher-only"


# Dense decoders of Llama's shape; those whose embeddings are tied when the configuration does not say; those whose `mlp_bias`
# counts; those whose attention has biases whenever it is said, or always; those with norms of queries and keys, and with
# four norms a block.
DENSE = frozenset({
    "llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "gemma", "gemma2", "gemma3_text",
})  # fmt: skip
_TIED_UNSAID = frozenset({"gemma", "gemma2", "gemma3_text", "smollm3"})
_MLP_BIAS = frozenset({"llama", "granite", "smollm3"})
_NO_ATTENTION_BIAS = frozenset({"phi3", "mistral", "ministral"})
_HEAD_NORMS = frozenset({"qwen3", "gemma3_text"})
_FOUR_NORMS = frozenset({"gemma2", "gemma3_text"})
FUSED = frozenset({"phi3"})  # queries, keys and values in one matrix, gate and up in another: its MLPs are not narrowed
TOKEN_BYTES = 36  # of a vocabulary entry with its merge in a GGUF header


@dataclass(frozen=True)
class Tensor:
    """A GGUF tensor: `row` is its fastest dimension, `block` the layer it belongs to (None: outside)."""

    name: str
    row: int
    elements: int
    matrix: bool
    block: int | None


@dataclass(frozen=True)
class Shape:
    """What sizes and times follow from. `config` has the names of a Hugging Face config.json."""

    architecture: str
    tensors: tuple[Tensor, ...]
    config: Mapping[str, int]
    header: int  # bytes of a GGUF file before its tensors

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        return not any(tensor.name == "output.weight" for tensor in self.tensors)

    def first(self, layers: int) -> "Shape":
        """The model with only so many blocks; blocks are alike, so it does not matter which."""
        kept = tuple(tensor for tensor in self.tensors if tensor.block is None or tensor.block < layers)
        return replace(self, tensors=kept, config={**self.config, "num_hidden_layers": layers})

    def narrowed(self, inner: int) -> "Shape":
        """The model with so many inner channels in every MLP."""
        before = self.config["intermediate_size"]

        def cut(tensor: Tensor) -> Tensor:
            if ".ffn_" not in tensor.name or not tensor.matrix:
                return tensor
            row = inner if tensor.row == before else tensor.row
            return replace(tensor, row=row, elements=tensor.elements // before * inner)

        return replace(self, tensors=tuple(map(cut, self.tensors)), config={**self.config, "intermediate_size": inner})


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the output projection is the embedding: said, or as the architecture has it."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED_UNSAID))


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a dense decoder from its configuration alone, tied ones once.

    Raises:
        ArtifactError: the architecture is not in `DENSE`, or a size is missing or not a number.
    """
    kind = config.get("model_type")
    if kind not in DENSE:
        raise ArtifactError(
            f"config.json has the model_type {kind!r}, whose size is not known from its configuration: "
            f"choose one of {', '.join(sorted(DENSE))}"
        )
    return from_config(config).parameters


def from_config(raw: Mapping[str, Any]) -> Shape:
    """The shape that a Hugging Face configuration tells. An architecture that is not in `DENSE` is taken for a Llama.

    Raises:
        ArtifactError: one of the sizes is missing or not a whole number.
    """
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in names if not isinstance(raw.get(name), int) or raw[name] < 1]
    if missing:
        raise ArtifactError(f"config.json has no {', '.join(missing)}: is it a causal language model's?")
    kind = str(raw.get("model_type"))
    config = {name: int(raw[name]) for name in names}
    config["num_key_value_heads"] = groups = int(raw.get("num_key_value_heads") or config["num_attention_heads"])
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    config["head_dim"] = head = int(raw.get("head_dim") or hidden // heads)
    queries, keys = heads * head, groups * head
    matrices = {
        "attn_q": (hidden, queries), "attn_k": (hidden, keys), "attn_v": (hidden, keys), "attn_output": (queries, hidden),
        "ffn_gate": (hidden, inner), "ffn_up": (hidden, inner), "ffn_down": (inner, hidden),
    }  # fmt: skip
    if kind in FUSED:
        matrices = {
            "attn_qkv": (hidden, queries + 2 * keys), "attn_output": matrices["attn_output"], "ffn_up": (hidden, 2 * inner),
            "ffn_down": matrices["ffn_down"],
        }  # fmt: skip
    vectors = {"attn_norm.weight": hidden, "ffn_norm.weight": hidden}
    if kind in _FOUR_NORMS:
        vectors |= {"post_attention_norm.weight": hidden, "post_ffw_norm.weight": hidden}
    if kind in _HEAD_NORMS:
        vectors |= {"attn_q_norm.weight": head, "attn_k_norm.weight": head}
    biased = raw.get("attention_bias") and kind not in _NO_ATTENTION_BIAS
    if kind == "qwen2" or biased:
        vectors |= {"attn_q.bias": queries, "attn_k.bias": keys, "attn_v.bias": keys}
    if kind != "qwen2" and biased:
        vectors["attn_output.bias"] = hidden
    if raw.get("mlp_bias") and kind in _MLP_BIAS:
        vectors |= {"ffn_gate.bias": inner, "ffn_up.bias": inner, "ffn_down.bias": hidden}
    tensors = [
        _matrix("token_embd.weight", hidden, config["vocab_size"], None),
        _vector("output_norm.weight", hidden, None),
    ]
    if not tied(raw):
        tensors.append(_matrix("output.weight", hidden, config["vocab_size"], None))
    for block in range(config["num_hidden_layers"]):
        tensors += [_matrix(f"blk.{block}.{name}.weight", row, rows, block) for name, (row, rows) in matrices.items()]
        tensors += [_vector(f"blk.{block}.{name}", length, block) for name, length in vectors.items()]
    return Shape(kind, tuple(tensors), config, TOKEN_BYTES * config["vocab_size"])


def from_gguf(
    architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], header: int
) -> Shape:
    """The shape that a GGUF header tells. `tensors`: the sides of each, the fastest first; `header`: bytes before them.

    Raises:
        ArtifactError: one of the sizes is missing.
    """
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    try:
        config = {ours: int(metadata[f"{architecture}.{theirs}"]) for ours, theirs in names.items()}
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"its metadata has no whole number {error}: is it a language model?") from None
    config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    found = tuple(
        Tensor(name, sides[0], math.prod(sides), len(sides) > 1, _block(name)) for name, sides in tensors.items()
    )
    return Shape(architecture, found, config, header)


def cached_values(config: Mapping[str, Any], context: int) -> int:
    """Numbers in a key-value cache of `context` tokens: 2 x layers x key-value heads x head size x tokens.

    Raises:
        ArtifactError: the configuration lacks one of the sizes.
    """
    layers, heads, hidden = widths(config, "num_hidden_layers", "num_attention_heads", "hidden_size")
    head = config.get("head_dim") or hidden // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * head * context)


def widths(config: Mapping[str, Any], *names: str) -> list[int]:
    """Sizes of a Hugging Face configuration, by name.

    Raises:
        ArtifactError: one is missing.
    """
    try:
        return [int(config[name]) for name in names]
    except KeyError as error:
        raise ArtifactError(f"config.json of the student has no {error}: its memory need cannot be told") from None


def _matrix(name: str, row: int, rows: int, block: int | None) -> Tensor:
    return Tensor(name, row, row * rows, True, block)


def _vector(name: str, row: int, block: int | None) -> Tensor:
    return Tensor(name, row, row, False, block)


def _block(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else None

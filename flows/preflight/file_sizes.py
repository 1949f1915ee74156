"""The tensors of a model and how large each quantized file of it becomes, from the header or config alone.

The rules are llama.cpp's (src/llama-quant.cpp, `llama_tensor_get_type`): norms stay F32, the output matrix (the
embedding, where the two are tied) gets more bits, and a row that 256 does not divide cannot hold a K-quant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flows.report import results
from tasks.acquire.params import Acquire
from tasks.distill.params import Distill
from tasks.distill.plan import planned
from tasks.errors import ArtifactError, ConfigError
from tasks.frame.stage import folder
from tasks.models.loading import load_config, tied
from tasks.quantize.params import Onnx

BITS: Mapping[str, float] = {"f32": 32, "f16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_1": 6, "q5_0": 5.5, "q4_k": 4.5, "q4_0": 4.5}  # fmt: skip
FALLBACK: Mapping[str, str] = {"q4_k": "q5_0", "q6_k": "q8_0"}  # where 256 does not divide the row
FUSED = ("phi3",)  # gate and up in one matrix: its MLPs are not narrowed
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

    def pruned(self, settings: Distill) -> "Shape":
        """What distillation's pruning leaves of it."""
        block = sum(tensor.elements for tensor in self.tensors if tensor.block == 0)
        gated = self.architecture not in FUSED and any(
            tensor.name == "blk.0.ffn_gate.weight" for tensor in self.tensors
        )
        inner = self.config["intermediate_size"] if gated else 0
        channel = 3 * self.config["hidden_size"]
        gone, kept = planned(settings, self.parameters, self.layers, block, inner, channel)
        shorter = self.first(max(1, self.layers - gone))
        return shorter.narrowed(kept) if kept < inner else shorter


def size(shape: Shape, variant: str, onnx: Onnx) -> int:
    """Bytes of the quantized model."""
    if variant == "onnx-int4":
        return _onnx_size(shape, onnx)
    bits = sum(BITS[_type(tensor, variant, shape)] * tensor.elements for tensor in shape.tensors)
    return int(bits / 8) + shape.header


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


def _onnx_size(shape: Shape, onnx: Onnx) -> int:
    """ModelBuilder's int4 for all matrices, the output's too, and eight bits for the embedding, each with a float32 scale a
    block.
    """
    embedding = next(tensor.elements for tensor in shape.tensors if tensor.name == "token_embd.weight")
    matrices = sum(tensor.elements for tensor in shape.tensors if tensor.matrix) - (0 if shape.tied else embedding)
    scale = 32 / onnx.block_size
    return int((matrices * (4 + scale) + embedding * (8 + scale)) / 8) + 2 * shape.header


def read(acquire: Acquire, root: Path) -> Shape:
    """The shape of the model that params.yaml names; no weights are read and nothing is fetched.

    Raises:
        ConfigError: the model is not there, or only the Hub knows it.
        ArtifactError: its header or config is damaged, or not a causal language model's.
    """
    from tasks.acquire import model_sources

    if acquire.model.source == "hub":
        if not results.fetched(root, acquire.model):
            raise ConfigError(
                f"{acquire.model.repo} is on the Hub and a plan fetches nothing: run `slmops stage acquire` with the same --set first"
            )
        return from_config(folder(root, "acquire") / "model")
    path = model_sources.SOURCES[acquire.model.source](acquire.model, root, root).path
    return from_gguf(path) if path.is_file() else from_config(path)


def from_gguf(path: Path) -> Shape:
    """The shape in a GGUF header.

    Raises:
        ArtifactError: the file is damaged or lacks one of the sizes.
    """
    from tasks.acquire import gguf_check

    info = gguf_check.check(path)
    architecture = str(info.metadata.get("general.architecture"))
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    try:
        config = {ours: int(info.metadata[f"{architecture}.{theirs}"]) for ours, theirs in names.items()}
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its metadata has no whole number {error}: is it a language model?") from None
    config["vocab_size"] = len(info.metadata["tokenizer.ggml.tokens"])
    tensors = tuple(
        Tensor(each.name, each.shape[0], _product(each.shape), len(each.shape) > 1, _block(each.name))
        for each in info.tensors
    )
    return Shape(architecture, tensors, config, min(tensor.offset for tensor in info.tensors))


def from_config(folder: Path) -> Shape:
    """The shape of a Llama-like Hugging Face model: attention with grouped keys, a gated feed-forward part.

    Raises:
        ArtifactError: config.json is missing or lacks one of the sizes.
    """
    raw = load_config(folder)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in names if not isinstance(raw.get(name), int)]
    if missing:
        raise ArtifactError(f"{folder / 'config.json'} has no {', '.join(missing)}: is it a causal language model?")
    config = {name: int(raw[name]) for name in names}
    config["num_key_value_heads"] = int(raw.get("num_key_value_heads") or config["num_attention_heads"])
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    config["head_dim"] = head = int(raw.get("head_dim") or hidden // heads)
    keys = config["num_key_value_heads"] * head
    tensors = [
        _matrix("token_embd.weight", hidden, config["vocab_size"], None),
        _norm("output_norm.weight", hidden, None),
    ]
    if not tied(raw):
        tensors.append(_matrix("output.weight", hidden, config["vocab_size"], None))
    for block in range(config["num_hidden_layers"]):
        sides = {
            "attn_q": (hidden, heads * head), "attn_k": (hidden, keys), "attn_v": (hidden, keys),
            "attn_output": (heads * head, hidden), "ffn_gate": (hidden, inner), "ffn_up": (hidden, inner),
            "ffn_down": (inner, hidden),
        }  # fmt: skip
        tensors += [_matrix(f"blk.{block}.{name}.weight", row, rows, block) for name, (row, rows) in sides.items()]
        tensors += [_norm(f"blk.{block}.{name}.weight", hidden, block) for name in ("attn_norm", "ffn_norm")]
    return Shape(str(raw.get("model_type")), tuple(tensors), config, TOKEN_BYTES * config["vocab_size"])


def _matrix(name: str, row: int, rows: int, block: int | None) -> Tensor:
    return Tensor(name, row, row * rows, True, block)


def _norm(name: str, row: int, block: int | None) -> Tensor:
    return Tensor(name, row, row, False, block)


def _product(sides: tuple[int, ...]) -> int:
    total = 1
    for side in sides:
        total *= side
    return total


def _block(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else None

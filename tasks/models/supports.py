"""What later steps cannot do with an architecture, with the remedy, so that it can be told before the work.

One table for all who ask: the flows before a run and in a plan, pruning when its turn comes.
"""

from collections.abc import Mapping, Sequence

_KEEP = "set distill.max_parameters to 1.0"
_MIXED = "its blocks are not all of one kind with attention"
UNPRUNABLE: Mapping[str, str] = {
    "smollm3": "llama.cpp tells the blocks of a SmolLM3 that have no rotary embedding by their places (every fourth one)",
    **dict.fromkeys(
        ("lfm2", "mamba", "mamba2", "falcon_h1", "granitemoehybrid", "jamba", "bamba", "zamba", "zamba2", "nemotron_h",
         "recurrent_gemma", "rwkv", "gpt2", "gpt_neox", "bloom", "falcon", "phi", "gptj", "gpt_bigcode"), _MIXED,
    ),
}  # fmt: skip
# Model types whose folders, as this transformers writes them, ONNX Runtime GenAI's builder reads (builder.py).
ONNX = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi", "phi3", "granite", "gemma", "gemma2", "olmo", "nemotron",
    "ernie4_5", "gpt_oss", "internlm2", "lfm2", "hunyuan_v1_dense", "chatglm",
})  # fmt: skip


def cannot_prune(kind: str, reason: str | None = None) -> str:
    """The sentence for a model that must stay whole."""
    return f"no block of a {kind} model can be removed ({reason or UNPRUNABLE.get(kind, _MIXED)}): {_KEEP}"


def problems(kind: str, max_parameters: float, variants: Sequence[str]) -> list[str]:
    """What will fail later with a model of this `model_type`."""
    found = []
    if max_parameters < 1 and kind in UNPRUNABLE:
        found.append(cannot_prune(kind))
    onnx = [variant for variant in variants if variant.startswith("onnx")]
    if onnx and kind not in ONNX:
        found.append(
            f"ONNX Runtime GenAI's builder cannot read a {kind} model: take {', '.join(onnx)} out of quantize.variants, and "
            "onnx-genai out of package.targets"
        )
    return found

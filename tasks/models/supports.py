"""What later steps cannot do with an architecture, with the remedy, so that it can be told before the work.

One table for all who ask: the flows before a run and in a plan, pruning when its turn comes.
"""

from collections.abc import Mapping

_KEEP = "set prune.max_parameters to 1.0"
_MIXED = "its blocks are not all of one kind with attention"
UNPRUNABLE: Mapping[str, str] = {
    "smollm3": "llama.cpp tells the blocks of a SmolLM3 that have no rotary embedding by their places (every fourth one)",
    **dict.fromkeys(
        ("lfm2", "mamba", "mamba2", "falcon_h1", "granitemoehybrid", "jamba", "bamba", "zamba", "zamba2", "nemotron_h",
         "recurrent_gemma", "rwkv", "gpt2", "gpt_neox", "bloom", "falcon", "phi", "gptj", "gpt_bigcode"), _MIXED,
    ),
}  # fmt: skip


def cannot_prune(kind: str, reason: str | None = None) -> str:
    """The sentence for a model that must stay whole."""
    return f"no block of a {kind} model can be removed ({reason or UNPRUNABLE.get(kind, _MIXED)}): {_KEEP}"

"""Tiny models and rows, for every architecture that is packed."""

from tasks.models.chat import Encoded

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


EXTRA = {
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mistral": {"sliding_window": 6},
    "phi3": {
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [1.0, 4.0, 9.0],
        },
    },
    "ministral": {"sliding_window": 6},
}


def row(prompt: list[int], answer: list[int], more: tuple[list[int], list[int]] | None = None) -> Encoded:
    ids, target = prompt + answer, [False] * len(prompt) + [True] * len(answer)
    if more:
        ids, target = ids + more[0] + more[1], target + [False] * len(more[0]) + [True] * len(more[1])
    return Encoded(ids, target)


HEAD = list(range(3, 13))


ROWS = [
    row([*HEAD, 20, 21, 22], [30, 31, 2]),
    row([*HEAD, 23], [32, 2]),
    row([*HEAD, 24, 25, 26, 27, 28, 29], [33, 34, 35, 36, 2]),
    row([*HEAD, 20, 24], [37, 2], ([40, 41], [42, 43, 2])),
]

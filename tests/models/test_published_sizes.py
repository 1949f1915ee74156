"""Predicted sizes against files that others have published, from the configurations of the models as their authors give them.

Bytes as the Hub lists them, or gigabytes as the publisher rounds them. Some were made with an importance matrix, for which llama.cpp
stores a few tensors otherwise.
"""

from typing import Any, NamedTuple

import pytest

from tasks.models import sizes
from tasks.variants import VARIANTS

WITHIN = 0.03
QWEN3 = {"model_type": "qwen3", "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 256, "tie_word_embeddings": True}


class Published(NamedTuple):
    """A model: its configuration, its parameters as its card has them, and bytes by variant."""

    config: dict[str, Any]
    parameters: float
    files: dict[str, float]


MODELS = {
    "Qwen3-0.6B": Published(
        {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072}, 0.6e9, {"q8_0": 639_446_688},  # Qwen
    ),
    "Qwen3-1.7B": Published(
        {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144}, 1.7e9, {"q8_0": 1_834_426_016},  # Qwen
    ),
    "Phi-4-mini": Published(
        {
            "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True,
        },
        3.8e9,
        {  # bartowski, with an importance matrix
            "q8_0": 4_084_611_456, "q6_k": 3_155_623_296, "q5_k_m": 2_848_128_384, "q4_1": 2_526_477_696,
            "q4_k_m": 2_491_874_688, "q4_0": 2_331_442_560, "iq4_nl": 2_325_151_104, "iq4_xs": 2_224_487_808,
            "q3_k_m": 2_117_533_056, "q2_k": 1_682_636_160,
        },
    ),
    "Gemma3-1B": Published(
        {
            **GEMMA3, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
            "num_key_value_heads": 1, "vocab_size": 262144,
        },
        1.0e9,
        {"q8_0": 1.07e9, "q4_0": 0.720e9, "q3_k_m": 0.722e9, "q2_k": 0.690e9},  # tensorblock
    ),
    "Gemma3-4B": Published(
        {
            **GEMMA3, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 262208,
        },
        3.9e9,  # without the part for pictures
        {  # bartowski, with an importance matrix
            "bf16": 7.77e9, "q8_0": 4.13e9, "q6_k": 3.19e9, "q5_k_m": 2.83e9, "q4_1": 2.56e9, "q4_k_m": 2.49e9,
        },
    ),
}  # fmt: skip
# What the documents that this product follows say of Phi-4-mini, Qwen3-0.6B and "Gemma3" (gigabytes). Of the last no size is known
# that fits, so it is left out.
DOCUMENTS = {
    "Phi-4-mini": {"f16": 7.6, "q8_0": 3.9, "q4_0": 2.0},
    "Qwen3-0.6B": {"f16": 1.2, "q8_0": 0.68, "q4_0": 0.35},
}
# They reckon four bits a weight, without scales, and the embedding like the rest.
THEIR_ERROR = {"f16": 0.03, "q8_0": 0.07, "q4_0": 0.17}


def predicted(model: str, variant: str) -> int:
    size: int = VARIANTS[variant].quantizer.module.predicted_size(
        variant, None, sizes.from_config(MODELS[model].config)
    )
    return size


@pytest.mark.parametrize(("model", "variant"), [(name, each) for name, found in MODELS.items() for each in found.files])
def test_a_predicted_size_is_that_of_a_published_file(model: str, variant: str) -> None:
    assert predicted(model, variant) == pytest.approx(MODELS[model].files[variant], rel=WITHIN)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_models_card(model: str) -> None:
    assert sizes.from_config(MODELS[model].config).parameters == pytest.approx(MODELS[model].parameters, rel=0.015)


@pytest.mark.parametrize(("model", "variant"), [(name, each) for name, found in DOCUMENTS.items() for each in found])
def test_the_documents_table_holds_but_for_its_known_error(model: str, variant: str) -> None:
    assert predicted(model, variant) / 1e9 == pytest.approx(DOCUMENTS[model][variant], rel=THEIR_ERROR[variant])


@pytest.mark.parametrize("model", DOCUMENTS)
def test_q5_1_saves_three_fifths_and_not_the_seventy_percent_of_the_documents(model: str) -> None:
    saved = 1 - predicted(model, "q5_1") / predicted(model, "f16")
    assert saved == pytest.approx(0.62, abs=0.01)

"""What a person may choose of each quantizer: one class a quantizer, named in its row of tasks/variants.py."""

from typing import Literal

from pydantic import Field

from tasks.schema import Positive, Section, Seed


class ModelBuilder(Section):
    """Olive's ModelBuilder pass: weights of 4 bits in blocks."""

    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="Weights that share a scale. Fewer: larger and more exact."
    )
    accuracy_level: Literal[1, 2, 3, 4] = Field(
        4,
        description="Least exact type that the runtime may compute products in. 1: float32. 2: float16. 3: bfloat16. 4: int8.",
    )


class GgmlTypes(Section):
    """llama.cpp's own quantizer."""

    importance: bool = Field(
        False,
        description="Weigh errors by an importance matrix from training rows. It does harm where the acquired model was quantized "
        "before: its weights lie near a grid, and a better fit to that undoes what was learned.",
    )
    tokens: Positive = Field(4096, description="Tokens of training rows that it is made from, at most.")


class GgufAuto(Section):
    """How the loss of each tensor in each type is foreseen."""

    tokens: Positive = Field(
        512, description="Tokens of training rows that are read, at most: as many as their gradients fit into 500 MB."
    )
    seed: Seed = Field(17, description="Seed of the tokens that the model draws.")


class OpenVino(Section):
    """Compression of weights by NNCF, without data."""

    group_size: Literal[32, 64, 128] = Field(
        64,
        description="Weights of openvino-int4 that share a scale. Where a row is no multiple of it, the largest group that fits is taken.",
    )

"""What a person may choose of each quantizer: one class a quantizer, named in its row of tasks/variants.py."""

from typing import Literal

from pydantic import Field

from tasks.schema import Section


class ModelBuilder(Section):
    """Olive's ModelBuilder pass: weights of 4 bits in blocks."""

    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="Weights that share a scale. Fewer: larger and more exact."
    )
    accuracy_level: Literal[1, 2, 3, 4] = Field(
        4,
        description="Least exact type that the runtime may compute products in. 1: float32. 2: float16. 3: bfloat16. 4: int8.",
    )

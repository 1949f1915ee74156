"""What a person may choose of each quantizer: one class a quantizer, named in its row of tasks/variants.py."""

from typing import Literal

from tasks.schema import Section


class ModelBuilder(Section):
    """Olive's ModelBuilder pass: weights of 4 bits in blocks."""

    block_size: Literal[16, 32, 64, 128] = 32
    accuracy_level: Literal[1, 2, 3, 4] = 4

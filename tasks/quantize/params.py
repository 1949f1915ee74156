"""The section `quantize`: the variants, and the options of each quantizer."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.schema import Section

Variant = Literal["f16", "q8_0", "q5_1", "q5_0", "q4_k_m", "q4_0", "onnx-int4"]


class Onnx(Section):
    block_size: Literal[16, 32, 64, 128] = 32
    accuracy_level: Literal[1, 2, 3, 4] = 4


class Quantize(Section):
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    onnx: Onnx = Onnx()

    @model_validator(mode="after")
    def _distinct(self) -> "Quantize":
        if len(set(self.variants)) != len(self.variants):
            raise ValueError("a variant is named twice")
        return self

"""The section `quantize`: which variants are made, and the options of each quantizer."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from tasks.schema import Section
from tasks.variants import QUANTIZERS, VARIANTS

if TYPE_CHECKING:
    VariantName = str
    Options = Section
else:
    VariantName = Literal[tuple(VARIANTS)]
    Options = create_model(
        "Options",
        __base__=Section,
        __doc__="Keys of each quantizer that has options.",
        **{each.name: (each.options, each.options()) for each in QUANTIZERS.values() if each.options},
    )


class Quantize(Section):
    """Which files are made of the student."""

    variants: Annotated[tuple[VariantName, ...], Field(min_length=1)] = Field(
        description="Variants to make, each once. Every one is validated and judged."
    )
    options: Options = Field(Options(), description="Options of each quantizer that has some.")

    def of(self, quantizer: str) -> Any:
        """The options of a quantizer; None where it has none."""
        return getattr(self.options, quantizer, None)

    @model_validator(mode="after")
    def _distinct(self) -> "Quantize":
        if len(set(self.variants)) != len(self.variants):
            raise ValueError("a variant is named twice")
        return self

"""The section `validate`: what is measured, and the gates."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from tasks.metrics import GATED
from tasks.schema import Positive, Section, Share

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[GATED]


class Gate(Section):
    """One rule on one number of a variant: give exactly one of the two limits."""

    name: MetricName = Field(description="The number that the rule is about.")
    at_least: float | None = Field(
        None,
        description="Least value that passes: a share of 1, a ratio, bytes, seconds or tokens/s, as the number is.",
    )
    at_most: float | None = Field(None, description="Largest value that passes, in the same unit.")

    @model_validator(mode="after")
    def _one_limit(self) -> "Gate":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least and at_most")
        return self


class Validate(Section):
    """What is measured of each variant, and what it must hold to pass."""

    context: Annotated[int, Field(ge=8)] = Field(512, description="Tokens of a window for perplexity and KLD.")
    windows: Positive = Field(12, description="Windows that are scored, at most.")
    bootstrap: Annotated[int, Field(ge=100)] = Field(
        2000, description="Resamples of the test rows from which the 95 % intervals of accuracy are taken."
    )
    max_half_width: Share = Field(
        0.03,
        description="Largest half width of a 95 % interval that holds a gate's limit (0.03: 3 points). With a wider one the gate is "
        "undecided: the test rows are too few.",
    )
    gates: tuple[Gate, ...] = Field(
        description="Rules that a variant must hold to pass, the same for all variants and on all devices. A device profile adds its "
        "own."
    )
    seed: int = Field(17, description="Seed of the bootstrap.")

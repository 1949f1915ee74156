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

    name: MetricName
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "Gate":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least and at_most")
        return self


class Validate(Section):
    context: Annotated[int, Field(ge=8)] = Field(512, description="tokens of a perplexity window")
    windows: Positive = Field(12, description="windows scored at most")
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    max_half_width: Share = Field(0.03, description="a wider 95 % interval around a limit means: too few samples")
    repeats: Annotated[int, Field(ge=3)] = Field(20, description="latency samples after warm-up")
    gates: tuple[Gate, ...]
    seed: int = 17

"""The section `distill`."""

from typing import Annotated

from pydantic import Field

from tasks.learning.params import Training


class Distill(Training):
    """How the student learns from the teacher."""

    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7,
        description="Weight of the divergence from the teacher's distribution. The rest of 1 is cross-entropy on the labels.",
    )
    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Weight of the distance from the teacher's last hidden states (1 minus the cosine), added to the two others. "
        "0: it is left out.",
    )
    control: bool = Field(
        False,
        description="Whether the pruned student is also trained without the teacher, to compare. It takes as long again.",
    )

"""The section `distill`."""

from typing import Annotated

from pydantic import Field

from tasks.learning.params import Training


class Distill(Training):
    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7, description="share of the KD term; the rest is cross-entropy"
    )
    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of matching the teacher's last hidden states, beside KD and cross-entropy"
    )
    control: bool = Field(False, description="also train the pruned student without the teacher's targets")

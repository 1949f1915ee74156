"""The section `distill`."""

from typing import Annotated

from pydantic import Field

from tasks.learning.params import Training
from tasks.schema import Positive, Share


class Distill(Training):
    """How the student is cut from the teacher, and how it learns from it."""

    max_parameters: Share = Field(
        0.85, description="Parameters of the student at most, as a share of the teacher's. 1: nothing is pruned."
    )
    block_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5,
        description="Share of the removed parameters that go as whole blocks. The others go as channels of the MLPs.",
    )
    candidates: Positive = Field(
        8,
        description="How many blocks are tried at each removal, those of least influence. The one that is missed least goes.",
    )
    calibration_rows: Positive = Field(64, description="Validation rows that decide which blocks go.")
    fitted_rows: Annotated[int, Field(ge=0)] = Field(
        1000,
        description="Rows on which the remaining weights are fitted, before training, to make good what pruning took. 0: the loss "
        "of a block is not made good.",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Temperature at which the student matches the teacher's distribution. Above 1: a flatter one."
    )
    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7,
        description="Weight of the divergence from the teacher's distribution. The rest of 1 is cross-entropy on the labels.",
    )
    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Weight of the distance from the teacher's last hidden states (1 minus the cosine), added to the two others. "
        "0: it is left out.",
    )
    top_k: Positive = Field(
        32,
        description="Tokens of the teacher's distribution kept at each position, the likeliest. The others count as one.",
    )
    unlabelled_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="Prompts without answers that the teacher answers, for the student to learn from. 0: none."
    )
    control: bool = Field(
        False,
        description="Whether the pruned student is also trained without the teacher, to compare. It takes as long again.",
    )

"""The section `distill`."""

from typing import Annotated

from pydantic import Field

from tasks.learning.params import Training
from tasks.schema import Positive, Share


class Distill(Training):
    max_parameters: Share = Field(0.85, description="largest student, as a share of the teacher's parameters")
    block_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the parameters that go, how many go as whole blocks; the others as channels of the MLPs"
    )
    candidates: Positive = Field(8, description="blocks of least influence tried at each removal")
    calibration_rows: Positive = Field(64, description="validation rows that decide which blocks are removed")
    fitted_rows: Annotated[int, Field(ge=0)] = Field(
        1000, description="rows on which the loss of each block is made good before training; 0: it is not"
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7, description="share of the KD term; the rest is cross-entropy"
    )
    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of matching the teacher's last hidden states, beside KD and cross-entropy"
    )
    top_k: Positive = Field(32, description="teacher targets kept per token; the rest is one tail mass")
    unlabelled_rows: Annotated[int, Field(ge=0)] = Field(0, description="unlabelled prompts that the teacher answers")
    control: bool = Field(False, description="also train the pruned student without the teacher's targets")

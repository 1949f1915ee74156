"""The section `prune`."""

from typing import Annotated

from pydantic import Field

from tasks.schema import Positive, Section, Share


class Prune(Section):
    max_parameters: Share = Field(0.85, description="largest student, as a share of the teacher's parameters")
    block_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the parameters that go, how many go as whole blocks; the others as channels of the MLPs"
    )
    candidates: Positive = Field(8, description="blocks of least influence tried at each removal")
    calibration_rows: Positive = Field(64, description="validation rows that decide which blocks are removed")
    fitted_rows: Annotated[int, Field(ge=0)] = Field(
        1000, description="training rows on which the loss of each block is made good before training; 0: it is not"
    )

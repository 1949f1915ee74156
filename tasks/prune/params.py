"""The section `prune`."""

from typing import Annotated

from pydantic import Field

from tasks.schema import Positive, Section, Share


class Prune(Section):
    """How the student is cut from the teacher."""

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
        description="Training rows on which the remaining weights are fitted, before training, to make good what pruning "
        "took. 0: the loss of a block is not made good.",
    )

"""The section `teach`."""

from typing import Annotated

from pydantic import Field

from tasks.schema import Positive, Section


class Teach(Section):
    """What the teacher says, once for all students."""

    unlabelled_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="Prompts without answers that the teacher answers, for the student to learn from. 0: none."
    )
    top_k: Positive = Field(
        32,
        description="Tokens of the teacher's distribution kept at each position, the likeliest. The others count as one.",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Temperature at which the student matches the teacher's distribution. Above 1: a flatter one."
    )

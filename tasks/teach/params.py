"""The section `teach`."""

from typing import Annotated

from pydantic import Field

from tasks.schema import Positive, Section


class Teach(Section):
    unlabelled_rows: Annotated[int, Field(ge=0)] = Field(0, description="unlabelled prompts that the teacher answers")
    top_k: Positive = Field(32, description="teacher targets kept per token; the rest is one tail mass")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of the targets, and of the student against them"
    )

"""The section `select`."""

from typing import Annotated

from pydantic import Field, model_validator

from tasks.schema import Section, Seed


class Select(Section):
    """How many students are trained. Chance has a share in what a student becomes, so the best of several goes on."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        (17,), description="Seeds, all different, one student each. The student of the least validation loss goes on."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Select":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is named twice")
        return self

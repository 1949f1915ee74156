"""The section `measure`: on which devices speed and memory are measured."""

from typing import Annotated

from pydantic import Field, model_validator

from tasks.schema import Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]


class Measure(Section):
    """On which kinds of device speed and memory are measured, and how."""

    profiles: Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        ("desktop",),
        description="Device profiles, each a file of `profiles/`. Each variant is measured within the limits of each, and judged by "
        "its gates. The numbers of the first one stand in tables that have room for one.",
    )
    repeats: Annotated[int, Field(ge=3)] = Field(
        20, description="How often the time to the first token is measured, after a warm-up."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Measure":
        if len(set(self.profiles)) != len(self.profiles):
            raise ValueError("profiles: one is named twice")
        return self

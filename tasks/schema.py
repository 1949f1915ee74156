"""What the typed form of every section shares: strict, frozen, unknown keys refused."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Commit = Annotated[
    str,
    Field(pattern=r"^[0-9a-f]{40}$", description="Full hash of the commit, 40 hex digits. A branch or tag can move."),
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

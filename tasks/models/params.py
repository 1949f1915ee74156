"""The section `task`, which training and evaluation share."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from tasks.schema import Positive, Section


class OwnMetric(Section):
    """A function `match(answer: str, reference: str) -> bool` in a Python file below acquire.watch."""

    file: Path
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "match"


Metric = Literal["json", "text"]


class Task(Section):
    metric: Annotated[
        Annotated[Metric, Tag("name")] | Annotated[OwnMetric, Tag("own")],
        Discriminator(lambda given: "own" if isinstance(given, dict | OwnMetric) else "name"),
    ] = Field("json", description="how an answer is compared with its reference; or {file, function} of one's own")
    max_length: Annotated[int, Field(ge=16)] = Field(
        256, description="tokens of a training row; longer rows are refused"
    )
    max_new_tokens: Positive = 64

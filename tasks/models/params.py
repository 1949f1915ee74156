"""The section `task`, which training and evaluation share."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from tasks.schema import Positive, Section


class OwnMetric(Section):
    """A function `match(answer: str, reference: str) -> bool` in a Python file below acquire.watch."""

    file: Path = Field(description="Python file that holds the function. It lies in `acquire.watch`.")
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = Field(
        "match", description="Name of the function. It takes (answer, reference) and returns True or False."
    )


Metric = Literal["json", "text"]


class Task(Section):
    """What counts as a right answer, and how long rows and answers may be."""

    metric: Annotated[
        Annotated[Metric, Tag("name")] | Annotated[OwnMetric, Tag("own")],
        Discriminator(lambda given: "own" if isinstance(given, dict | OwnMetric) else "name"),
    ] = Field(
        "json",
        description="How an answer is held against its reference. `json`: the parsed values are equal. `text`: the texts are "
        "equal but for case and white space, for labels and short answers. Or a function of one's own.",
    )
    max_length: Annotated[int, Field(ge=16)] = Field(
        256, description="Tokens of a row at most, prompt and answer together. Longer rows are refused."
    )
    max_new_tokens: Positive = Field(
        64, description="Tokens of an answer at most. Rows whose reference is longer are refused."
    )

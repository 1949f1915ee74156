"""The section `package`."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.schema import Section


class Package(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    choose: Literal["smallest", "fastest", "most_accurate"] = "smallest"
    targets: Annotated[tuple[Literal["ollama", "llama-server", "onnx-genai"], ...], Field(min_length=1)]
    context_length: Annotated[int, Field(ge=128)] = 2048

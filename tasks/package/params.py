"""The section `package`."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.schema import Section


class Package(Section):
    """What is shipped, under which name, and for which runtimes."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = Field(
        description="Name of the bundle and of the registered model, at most 63 lower-case letters, digits, dots, dashes and "
        "underscores. One run at a time works on a name."
    )
    choose: Literal["smallest", "fastest", "most_accurate"] = Field(
        "smallest",
        description="Which variant is shipped of those that passed. `smallest`: the one of fewest bytes. `fastest`: that of most "
        "tokens/s. `most_accurate`: the one with most test rows right, then of fewest bytes.",
    )
    targets: Annotated[tuple[Literal["ollama", "llama-server", "onnx-genai"], ...], Field(min_length=1)] = Field(
        description="What bundles are written for. `ollama` and `llama-server` carry a GGUF file, `onnx-genai` an ONNX folder."
    )
    context_length: Annotated[int, Field(ge=128)] = Field(
        2048,
        description="Tokens of a conversation at most. At least `task.max_length`; the model's own window may lower it.",
    )

"""The section `package`, and every kind of bundle in one table. A target is one file of this room and one row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tasks.schema import Section
from tasks.variants import RUNTIMES, Runtime


@dataclass(frozen=True)
class Target:
    """A kind of bundle. `name` is its folder; with `_` for `-` it is also its function, in the module `target_NAME`."""

    name: str
    runtime: Runtime  # whose files it carries, and in which parity is checked
    served_by: str = ""  # where that is not the runtime's own distribution, so that nobody knows its version here

    @property
    def write(self) -> Callable[[Any, Path], list[str]]:
        """Fills a folder with a `Release` and returns what a person should know about it."""
        name = self.name.replace("-", "_")
        function: Callable[[Any, Path], list[str]] = getattr(import_module(f"tasks.package.target_{name}"), name)
        return function


TARGETS: Mapping[str, Target] = {
    each.name: each
    for each in (
        Target("ollama", RUNTIMES["llama"], served_by="Ollama"),
        Target("llama-server", RUNTIMES["llama"]),
        Target("onnx-genai", RUNTIMES["onnx_genai"]),
        Target("openvino-genai", RUNTIMES["openvino"]),
    )
}
if TYPE_CHECKING:
    TargetName = str
else:
    TargetName = Literal[tuple(TARGETS)]


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
    targets: Annotated[tuple[TargetName, ...], Field(min_length=1)] = Field(
        description="What bundles are written for: "
        + ", ".join(f"`{each.name}` ({each.runtime.label})" for each in TARGETS.values())
        + "."
    )
    context_length: Annotated[int, Field(ge=128)] = Field(
        2048,
        description="Tokens of a conversation at most. At least `task.max_length`; the model's own window may lower it.",
    )

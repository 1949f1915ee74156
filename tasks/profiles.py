"""A device profile: what a file may use on a kind of device, and what it must hold there. Each is a file of `profiles/`.

`measure` keeps a runtime within the limits; `judge` holds what came out against the gates.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tasks import params
from tasks.errors import ConfigError
from tasks.schema import Positive, Section
from tasks.validate.params import Gate
from tasks.variants import RUNTIMES, Runtime

FOLDER = "profiles"  # in a checkout
if TYPE_CHECKING:
    RuntimeName = str
else:
    RuntimeName = Literal[tuple(RUNTIMES)]


class Limits(Section):
    """What decides how a file is measured. dvc.yaml names these keys, so that another gate measures nothing again."""

    memory_mb: Positive | None = Field(
        description="Memory that the process of the runtime may hold, in 1,000,000 bytes. null: no limit."
    )
    threads: Positive | None = Field(
        description="Cores, and threads of the runtime. null: all that the measuring machine has."
    )
    context: Annotated[int, Field(ge=64)] = Field(
        description="Tokens of a conversation that must fit. Memory for them is set aside before anything is measured."
    )
    runtimes: Annotated[tuple[RuntimeName, ...], Field(min_length=1)] | None = Field(
        description="Runtimes that the device has: "
        + ", ".join(f"`{name}` ({runtime.label})" for name, runtime in RUNTIMES.items())
        + ". null: any."
    )

    @property
    def limits(self) -> "Limits":
        """This part alone."""
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})

    def has(self, runtime: Runtime) -> bool:
        """Whether such a device has this runtime."""
        return self.runtimes is None or runtime.name in self.runtimes


class Profile(Limits):
    """One kind of device."""

    label: Annotated[str, Field(min_length=1, max_length=60)] = Field(description="What a person calls it.")
    gates: tuple[Gate, ...] = Field(
        description="Rules that a file must hold on this device besides those of `validate.gates`, in the same form. A limit of "
        "memory is one by itself."
    )


def load(root: Path, name: str) -> Profile:
    """Read the profile `name` of a checkout.

    Raises:
        ConfigError: there is none, or lists every problem with its key.
    """
    path = root / FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml"))) or "none is there"
        raise ConfigError(f"measure.profiles: {path} is missing: write it, or name one of {known}")
    return params.checked(Profile, params.read(path), str(path))


def parsed(source: bytes, where: str) -> Profile:
    """A profile from YAML; `where` names it.

    Raises:
        ConfigError: lists every problem with its key.
    """
    return params.checked(Profile, params.parsed(source, where), where)

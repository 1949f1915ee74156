"""The section `acquire`: where model and data come from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.schema import Commit, Positive, Section, Share


class PackageModel(Section):
    """A GGUF model inside an installed Python distribution."""

    source: Literal["package"]
    distribution: str
    file: str = "*.gguf"
    licence: str | None = None


class GgufModel(Section):
    """A GGUF file, de-quantised."""

    source: Literal["gguf"]
    path: Path
    licence: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class LocalModel(Section):
    """A Hugging Face model folder on disk."""

    source: Literal["local"]
    path: Path
    licence: str | None = None


class HubModel(Section):
    """A model repository of the Hugging Face Hub at one commit. The token comes from HF_TOKEN."""

    source: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Commit
    licence: str | None = Field(None, description="instead of the one that the repository's card names")


class Splitting(Section):
    """How a single file of rows is split; where there is a file per split these are not used."""

    validation: Share = 0.1
    test: Share = 0.15
    seed: int = 17


class LocalData(Splitting):
    """Rows as JSONL, JSON, CSV or Parquet: one file (split here) or a folder with train/validation/test[/unlabelled]."""

    source: Literal["local"]
    path: Path
    unlabelled: Path | None = None
    text: Path | None = Field(None, description="plain text for perplexity and KLD; none: the test conversations")
    licence: str | None = None


class HubData(Splitting):
    """A data set repository of the Hub at one commit, holding the same files as a local folder."""

    source: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Commit
    licence: str | None = Field(None, description="instead of the one that the repository's card names")


class Most(Section):
    """Rows used of a split at most, the first ones; all where it says nothing."""

    train: Positive | None = None
    validation: Positive | None = None
    test: Positive | None = None
    unlabelled: Positive | None = None

    def of(self, split: str) -> int | None:
        limit: int | None = getattr(self, split)
        return limit


class Acquire(Section):
    watch: Path = Field(description="the folder or file that DVC watches: every local input lies in it")
    model: Annotated[PackageModel | GgufModel | LocalModel | HubModel, Field(discriminator="source")]
    data: Annotated[LocalData | HubData, Field(discriminator="source")]
    near_duplicate: Annotated[float, Field(ge=0.1, le=1)] = Field(
        0.95, description="character 5-gram Jaccard similarity at which two prompts count as one"
    )
    most: Most = Field(Most(), description="of each split")
    licences: tuple[str, ...] = Field(
        (), description="licences that may be used, as SPDX ids; empty: any, but recorded"
    )

    @property
    def local(self) -> list[Path]:
        """Every file and folder of this machine that is read, relative to the workspace."""
        names = ("path", "unlabelled", "text")
        return [path for part in (self.model, self.data) for name in names if (path := getattr(part, name, None))]

    @model_validator(mode="after")
    def _watched(self) -> "Acquire":
        for path in self.local:
            self.check_watched(path)
        return self

    def check_watched(self, path: Path, key: str = "") -> None:
        """Raises ValueError for a local input that lies outside `watch`."""
        if not path.is_relative_to(self.watch) or ".." in path.parts:
            raise ValueError(
                f"{key}{path} lies outside watch ({self.watch}): DVC would not see it change: move it there, or set watch to "
                "a folder that holds all local inputs"
            )

"""The section `acquire`: where model and data come from. A source is a function of this room, its class here, and one row."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Field, model_validator

from tasks.schema import Commit, Positive, Section, Share

_SOURCE = "Names this source."
_REPO = "Repository of the Hub, as owner/name."
_CARD = "SPDX id of the licence, instead of the one that the repository's README.md names."


class ModelSource(Section):
    """What all sources of a model have."""

    source: str


class PackageModel(ModelSource):
    """A GGUF model inside an installed Python distribution."""

    source: Literal["package"] = Field(description=_SOURCE)
    distribution: str = Field(description="Name of the installed distribution, as pip knows it.")
    file: str = Field(
        "*.gguf", description="Name or pattern of the file. Exactly one file of the distribution matches it."
    )
    licence: str | None = Field(
        None, description="SPDX id of the model's licence, instead of the one that the file or its distribution states."
    )


class GgufModel(ModelSource):
    """A GGUF file, de-quantised."""

    source: Literal["gguf"] = Field(description=_SOURCE)
    path: Path = Field(description="The file. It lies in `acquire.watch`.")
    licence: str | None = Field(
        None, description="SPDX id of the model's licence, instead of the one that the file states."
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="Checksum that the file must have, 64 hex digits. None: it is not checked."
    )


class LocalModel(ModelSource):
    """A Hugging Face model folder on disk."""

    source: Literal["local"] = Field(description=_SOURCE)
    path: Path = Field(
        description="The folder, with configuration, safetensors and tokenizer. It lies in `acquire.watch`."
    )
    licence: str | None = Field(
        None, description="SPDX id of the model's licence, instead of the one that the folder's README.md names."
    )


class HubModel(ModelSource):
    """A model repository of the Hugging Face Hub at one commit. The token comes from HF_TOKEN."""

    source: Literal["hub"] = Field(description=_SOURCE)
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = Field(description=_REPO)
    revision: Commit
    licence: str | None = Field(None, description=_CARD)


class DataSource(Section):
    """What all sources of data have: how a single file of rows is split. Where there is a file per split that is not used."""

    source: str
    validation: Share = Field(0.1, description="Share of the rows that become the validation split.")
    test: Share = Field(0.15, description="Share of the rows that become the test split.")
    seed: int = Field(17, description="Seed that decides which rows go to which split.")


class LocalData(DataSource):
    """Rows as JSONL, JSON, CSV or Parquet: one file (split here) or a folder with train/validation/test[/unlabelled]."""

    source: Literal["local"] = Field(description=_SOURCE)
    path: Path = Field(description="The file or folder. It lies in `acquire.watch`.")
    unlabelled: Path | None = Field(
        None,
        description="File of prompts without answers, for `distill.unlabelled_rows`. None: those of the folder, if any.",
    )
    text: Path | None = Field(
        None,
        description="UTF-8 text on which perplexity and KLD are measured. None: they are measured on the test rows.",
    )
    licence: str | None = Field(
        None, description="SPDX id of the data's licence, instead of the one that the folder's README.md names."
    )


class HubData(DataSource):
    """A data set repository of the Hub at one commit, holding the same files as a local folder."""

    source: Literal["hub"] = Field(description=_SOURCE)
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = Field(description=_REPO)
    revision: Commit
    licence: str | None = Field(None, description=_CARD)


@dataclass(frozen=True)
class Source:
    """One of the places that a model or data may come from. `found_by` is MODULE.FUNCTION of this room."""

    params: type[Section]
    found_by: str

    @property
    def name(self) -> str:
        """What `source` says in params.yaml."""
        return str(get_args(self.params.model_fields["source"].annotation)[0])

    @property
    def find(self) -> Callable[[Any, Path, Path], Any]:
        """Takes these params, the workspace, and a folder for what it fetches or makes; returns `Found` or `FoundData`."""
        module, name = self.found_by.split(".")
        function: Callable[[Any, Path, Path], Any] = getattr(import_module(f"tasks.acquire.{module}"), name)
        return function


MODEL_SOURCES = {
    each.name: each
    for each in (
        Source(PackageModel, "model_sources.package"),
        Source(GgufModel, "model_sources.gguf"),
        Source(LocalModel, "model_sources.local"),
        Source(HubModel, "model_sources.from_hub"),
    )
}
DATA_SOURCES = {
    each.name: each
    for each in (
        Source(LocalData, "data_sources.local"),
        Source(HubData, "data_sources.from_hub"),
    )
}
if TYPE_CHECKING:
    AnyModel = ModelSource
    AnyData = DataSource
else:
    AnyModel = Union[tuple(each.params for each in MODEL_SOURCES.values())]  # noqa: UP007
    AnyData = Union[tuple(each.params for each in DATA_SOURCES.values())]  # noqa: UP007


class Most(Section):
    """How many rows of each split are used at most, from its beginning."""

    train: Positive | None = Field(None, description="Rows to train on. None: all.")
    validation: Positive | None = Field(None, description="Rows for early stopping and choices. None: all.")
    test: Positive | None = Field(None, description="Rows that the verdict rests on. None: all.")
    unlabelled: Positive | None = Field(None, description="Prompts without answers. None: all.")

    def of(self, split: str) -> int | None:
        limit: int | None = getattr(self, split)
        return limit


class Acquire(Section):
    """Where the model and the data come from, and what of them is used."""

    watch: Path = Field(description="Folder or file that DVC watches for changes. Every local input lies in it.")
    model: Annotated[AnyModel, Field(discriminator="source")] = Field(description="The open model to start from.")
    data: Annotated[AnyData, Field(discriminator="source")] = Field(description="The rows of the task.")
    near_duplicate: Annotated[float, Field(ge=0.1, le=1)] = Field(
        0.95,
        description="Similarity from which on two prompts count as the same one: the Jaccard index of their character 5-grams. "
        "Splits must share no prompt. 1: only equal prompts count.",
    )
    most: Most = Field(Most(), description="How many rows of each split are used at most.")
    licences: tuple[str, ...] = Field(
        (),
        description="SPDX ids of the licences that model and data may have. A model of unknown licence is refused, too. "
        "Empty: any licence is taken, and recorded.",
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

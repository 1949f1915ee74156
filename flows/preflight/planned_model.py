"""The model that params.yaml names, as far as it is known before `acquire`: no weights are read and nothing is fetched."""

import json
from pathlib import Path
from typing import Any

from flows.workspace.paths import Workspace
from tasks.acquire import gguf_check
from tasks.acquire.params import MODEL_SOURCES, Acquire, HubModel
from tasks.errors import ArtifactError, ConfigError, PipelineError
from tasks.frame.stage import folder, read_json
from tasks.models import sizes
from tasks.models.loading import load_config


def architecture(acquire: Acquire, root: Workspace) -> str | None:
    """The model_type of the model that params.yaml names; None where only `acquire` can tell."""
    if isinstance(acquire.model, HubModel):
        model = _fetched(root, acquire.model)
        return str(model["architecture"]) if model else None
    try:
        path = MODEL_SOURCES[acquire.model.source].find(acquire.model, root, root).path
        if path.is_file():
            kind = gguf_check.check(path).metadata.get("general.architecture")
        else:
            kind = json.loads((path / "config.json").read_bytes()).get("model_type")
    except (PipelineError, OSError, ValueError, AttributeError):
        return None  # acquire says what is wrong with it
    return kind if isinstance(kind, str) else None


def shape(acquire: Acquire, root: Workspace) -> sizes.Shape:
    """Its tensors.

    Raises:
        ConfigError: the model is not there, or only the Hub knows it.
        ArtifactError: its header or config is damaged, or not a causal language model's.
    """
    if isinstance(acquire.model, HubModel):
        if not _fetched(root, acquire.model):
            raise ConfigError(
                f"{acquire.model.repo} is on the Hub and a plan fetches nothing: run `slmops stage acquire` with the same --set first"
            )
        return of_folder(folder(root, "acquire") / "model")
    path = MODEL_SOURCES[acquire.model.source].find(acquire.model, root, root).path
    return of_gguf(path) if path.is_file() else of_folder(path)


def of_folder(path: Path) -> sizes.Shape:
    """The tensors of a Hugging Face model folder.

    Raises:
        ArtifactError: config.json is missing, or lacks one of the sizes.
    """
    try:
        return sizes.from_config(load_config(path))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def of_gguf(path: Path) -> sizes.Shape:
    """The tensors that a GGUF header lists.

    Raises:
        ArtifactError: the file is damaged, or lacks one of the sizes.
    """
    info = gguf_check.check(path)
    sides = {each.name: tuple(each.shape) for each in info.tensors}
    header = min(tensor.offset for tensor in info.tensors)
    try:
        return sizes.from_gguf(str(info.metadata.get("general.architecture")), info.metadata, sides, header)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _fetched(root: Workspace, model: HubModel) -> dict[str, Any] | None:
    """What acquire recorded of a hub model that lies in the workspace; None where another one lies there, or none."""
    lineage = folder(root, "acquire") / "lineage.json"
    model_of_lineage: dict[str, Any] = read_json(lineage)["model"] if lineage.is_file() else {}
    return (
        model_of_lineage
        if (model_of_lineage.get("repo"), model_of_lineage.get("revision")) == (model.repo, model.revision)
        else None
    )

"""What can be known of a run before its work: steps that the model's architecture does not allow."""

import json
from pathlib import Path

from flows.report import results
from tasks.acquire.params import Acquire
from tasks.errors import ConfigError, PipelineError
from tasks.models import supports
from tasks.params import Params


def check(root: Path, checked: Params) -> None:
    """Refuse a run that would fail after its training.

    Raises:
        ConfigError: names every step that cannot be done, with what to change.
    """
    kind = architecture(checked.acquire, root)
    found = supports.problems(kind, checked.distill.max_parameters, checked.quantize.variants) if kind else []
    if found:
        raise ConfigError("this run would fail after its training: " + "; ".join(found))


def architecture(acquire: Acquire, root: Path) -> str | None:
    """The model_type of the model that params.yaml names; None where only `acquire` can tell."""
    from tasks.acquire import gguf_check, model_sources

    if acquire.model.source == "hub":
        model = results.fetched(root, acquire.model)
        return str(model["architecture"]) if model else None
    try:
        path = model_sources.SOURCES[acquire.model.source](acquire.model, root, root).path
        if path.is_file():
            found = gguf_check.check(path).metadata.get("general.architecture")
        else:
            found = json.loads((path / "config.json").read_bytes()).get("model_type")
    except (PipelineError, OSError, ValueError, AttributeError):
        return None  # acquire says what is wrong with it
    return found if isinstance(found, str) else None

"""What a config.json may say, held against reason before any library builds a module of it."""

from collections.abc import Mapping
from typing import Any, NoReturn

from tasks.errors import ArtifactError, brief
from tasks.models import sizes

MAX_LAYERS = 1024
MAX_SIZE = 2**24  # of one dimension; vocabularies reach some 2**18
_COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_NESTED = ("text_config", "vision_config", "audio_config", "llm_config", "language_config")


def check(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model that is not a plain text decoder of possible sizes.

    Raises:
        ArtifactError: the architecture is not a text, there is more than text to it, or a size is impossible.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        _refuse(where, f"its model_type is {kind!r}, not the name of an architecture")
    nested = [name for name in _NESTED if isinstance(config.get(name), dict)]
    if nested:
        raise ArtifactError(
            f"{where} is a multimodal model ({brief(kind)} with {', '.join(nested)}): only text models are taken: choose a "
            "text-only one (of Gemma 3 these are 270m and 1b), or save the text part as a model of its own"
        )
    for name in _COUNTS:
        value = config.get(name)
        if value is None or (isinstance(value, list) and kind not in sizes.DENSE):  # some differ from layer to layer
            continue
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            _refuse(where, f"its {name} is {brief(repr(value))}, not a whole number from 1 to {most}")
    if kind in sizes.DENSE:
        _check_heads(config, where)


def _check_heads(config: Mapping[str, Any], where: str) -> None:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    if hidden and heads and not config.get("head_dim") and hidden % heads:
        _refuse(where, f"its hidden_size {hidden} cannot be shared by {heads} attention heads")
    if heads and groups and heads % groups:
        _refuse(where, f"its {heads} attention heads cannot share {groups} key-value heads")


def _refuse(where: str, problem: str) -> NoReturn:
    raise ArtifactError(f"{where}: {problem}: take the model from its source again")

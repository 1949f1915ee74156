"""The blocks of a decoder one by one: what each is called with, what it gives, and how one is taken out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tasks.learning import packing
from tasks.learning.packing import Packed, pack
from tasks.models.chat import Encoded

ROWS = 32  # of a packed sequence

Call = tuple[Any, dict[str, Any]]  # what a block is called with: hidden states, keywords


def packed_rows(model: Any, rows: Sequence[Encoded]) -> list[Packed]:
    """Rows as packed sequences short enough to be held for every block at once."""
    return [pack(rows[i : i + ROWS], model.device) for i in range(0, len(rows), ROWS)]


def calls_of(model: Any, packed: Packed) -> tuple[list[Call], Any]:
    """What each block is called with, and what the last norm is given."""
    calls: list[Call] = []
    last: list[Any] = []

    def keep(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        calls.append((args[0] if args else keywords.pop("hidden_states"), keywords))

    decoder = model.get_decoder()
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder.layers]
    hooks.append(decoder.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
    packing.states(model, packed)
    for hook in hooks:
        hook.remove()
    return calls, last[0]


def output_of(made: Any) -> Any:
    """The hidden states that a block hands on."""
    return made[0] if isinstance(made, tuple) else made


@contextmanager
def first_blocks(model: Any, count: int) -> Iterator[None]:
    """Let the model be its first blocks alone."""
    decoder = model.get_decoder()
    whole = decoder.layers
    decoder.layers = whole[:count]
    try:
        yield
    finally:
        decoder.layers = whole


def remove(model: Any, position: int) -> None:
    """Drop one block and keep the configuration, and the cache index of every attention, in step."""
    import torch

    decoder = model.get_decoder()
    left = [layer for i, layer in enumerate(decoder.layers) if i != position]
    decoder.layers = torch.nn.ModuleList(left)
    for i, layer in enumerate(left):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(left)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kind for i, kind in enumerate(kinds) if i != position]

"""How much pruning takes away, from sizes alone: the stage and a plan before it ask here."""

import math

from tasks.models.sizes import FUSED, Shape
from tasks.prune.params import Prune

MULTIPLE = 32  # of the channels that are kept: the blocks of the quantized types are so long


def planned(settings: Prune, total: int, layers: int, block: int, inner: int, channel: int) -> tuple[int, int]:
    """How many blocks go, and how many channels every other MLP keeps (`inner`: all).

    `total`, `block` and `channel` are parameters: of the model, of a block, of one channel of an MLP in its three matrices.
    `inner` is 0 where MLPs cannot be narrowed; then whole blocks alone go.
    """
    excess = total * (1 - settings.max_parameters)
    if not inner:
        return math.ceil(round(excess / block, 9)), 0
    gone = (
        math.ceil(round(excess / block, 9))
        if settings.block_share == 1
        else round(excess * settings.block_share / block)
    )
    rest = excess - gone * block
    if rest <= 0 or gone >= layers:
        return gone, inner
    kept = math.floor((inner - rest / ((layers - gone) * channel)) / MULTIPLE) * MULTIPLE
    return (gone, kept) if kept >= MULTIPLE else (math.ceil(excess / block), inner)


def pruned(shape: Shape, settings: Prune) -> Shape:
    """What pruning leaves of a model."""
    block = sum(tensor.elements for tensor in shape.tensors if tensor.block == 0)
    gated = shape.architecture not in FUSED and any(tensor.name == "blk.0.ffn_gate.weight" for tensor in shape.tensors)
    inner = shape.config["intermediate_size"] if gated else 0
    channel = 3 * shape.config["hidden_size"]
    gone, kept = planned(settings, shape.parameters, shape.layers, block, inner, channel)
    shorter = shape.first(max(1, shape.layers - gone))
    return shorter.narrowed(kept) if kept < inner else shorter

"""Pruning by measured importance, with what is lost made good where linear algebra can: whole blocks first, then
channels of the MLPs (`width`). Some of both costs less than as many parameters of either.

Candidates are the blocks of least *block influence*, one minus the mean cosine similarity of a block's input
and output (ShortGPT, Men et al., 2024). Of these the one is removed whose absence raises the loss on
calibration rows least, and everything is scored again after each removal: a fixed ranking is far worse,
because what a block contributes depends on which others are left.

Most of what a removed block added to the residual stream is a linear function of what the MLP before it holds in its
inner layer (ReplaceMe, Shopkhoev et al., 2025). That function is fitted by ridge regression and added to that MLP's
output weights: no parameter more, no training, and a student that starts near its teacher.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tasks.errors import ConfigError
from tasks.frame import events
from tasks.learning import packing
from tasks.learning.packing import pack, tokens
from tasks.learning.training import log_probs
from tasks.models import loading, supports
from tasks.models.chat import Encoded
from tasks.models.logits import head_of
from tasks.prune.blocks import Call, calls_of, first_blocks, output_of, packed_rows, remove
from tasks.prune.params import Prune
from tasks.prune.plan import planned
from tasks.prune.width import can_narrow, narrow

RIDGE = 0.05  # of the mean square of the inner layer: 0.01 fits the rows better, and all others worse


def prune(model: Any, calibration: Sequence[Encoded], fitted: Sequence[Encoded], settings: Prune) -> dict[str, Any]:
    """Remove blocks, then channels of the MLPs, in place until the model has at most `max_parameters` of its parameters.

    `calibration` decides which blocks; `fitted` are the rows on which the loss of each is made good, none: it is not.
    Returns `blocks`, one entry a removal: the block's index in the original model, its influence, the calibration loss
    (nats a token) without it and with that made good, and the losses of all candidates; and `channels`: how many each MLP
    kept, of how many, and the share of each block's output that was lost.

    Raises:
        ConfigError: even one block would be too large, or this architecture cannot lose any.
    """
    if settings.max_parameters >= 1:
        return {"blocks": [], "channels": None}
    decoder, kind = model.get_decoder(), model.config.model_type
    layers = getattr(decoder, "layers", [])
    alike = hasattr(decoder, "norm") and all(hasattr(layer, "self_attn") for layer in layers)
    if not layers or not alike or kind in supports.UNPRUNABLE:
        raise ConfigError(supports.cannot_prune(kind))
    total = loading.count(model)
    block = sum(p.numel() for p in layers[0].parameters())
    inner = model.config.intermediate_size if can_narrow(model) else 0
    gone, channels = planned(settings, total, len(layers), block, inner, 3 * model.config.hidden_size)
    if gone >= len(layers):
        raise ConfigError(
            f"prune.max_parameters is {settings.max_parameters}, but embeddings and head alone are {1 - len(layers) * block / total:.2f} of this model: raise it"
        )
    history = _remove_blocks(model, calibration, fitted, settings, gone)
    record: dict[str, Any] = {"blocks": history, "channels": None}
    if channels < inner:
        lost = narrow(model, fitted or calibration, channels)
        record["channels"] = {"kept": channels, "of": inner, "lost": [round(each, 5) for each in lost]}
    return record


def _remove_blocks(
    model: Any, calibration: Sequence[Encoded], fitted: Sequence[Encoded], settings: Prune, gone: int
) -> list[dict[str, Any]]:
    """Take out so many blocks, each time the one that is missed least."""
    import torch

    layers = model.get_decoder().layers
    kept = len(layers) - gone
    original = list(range(len(layers)))
    history: list[dict[str, Any]] = []
    ready = _Ready(model, fitted)
    with torch.no_grad(), events.progress("choose blocks to remove", len(layers) - kept, "blocks") as advance:
        while len(model.get_decoder().layers) > kept:
            trace = _Trace(model, calibration)
            order = sorted(range(len(trace.influence)), key=lambda i: trace.influence[i])[: settings.candidates]
            losses = {position: trace.loss_without(position) for position in sorted(order)}
            position = min(losses, key=lambda i: (losses[i], i))
            loss = losses[position]
            weight = _before(model, position)
            if fitted and weight is not None:
                old = weight.clone()
                weight += _stand_in(ready, position).to(weight.dtype)
                better = trace.loss_without(position, start=position - 1)
                if better < loss:
                    loss = better
                else:
                    weight.copy_(old)
            history.append(
                {
                    "block": original.pop(position),
                    "position": position,
                    "influence": round(trace.influence[position], 5),
                    "loss": round(losses[position], 5),
                    "loss_made_good": round(loss, 5),
                    "candidates": {str(i): round(each, 5) for i, each in losses.items()},
                }
            )
            remove(model, position)
            ready.forget(position)
            advance(note=f"loss {loss:.3f}")
    return history


def _before(model: Any, position: int) -> Any | None:
    """The output weights (d, inner) of the MLP before a block, where it writes them straight into the residual stream."""
    if position == 0 or getattr(model.config, "residual_multiplier", 1.0) != 1.0:
        return None
    layer = model.get_decoder().layers[position - 1]
    if hasattr(layer, "post_feedforward_layernorm") or not hasattr(getattr(layer, "mlp", None), "down_proj"):
        return None
    return layer.mlp.down_proj.weight


def _stand_in(ready: "_Ready", position: int) -> Any:
    """The change (d, inner) of the weights before a block that adds what the block adds, as nearly as it can.

    Ridge regression over all tokens, each weighted by one over the length of its residual: norms make only
    directions count, and the first token's is hundreds of times longer than any other.
    """
    import torch

    squares: Any = 0.0
    products: Any = 0.0
    for inner, before, after in ready.around(position):
        scale = 1.0 / before.norm(dim=-1, keepdim=True)
        inner, added = inner * scale, (after - before) * scale
        squares = squares + inner.T @ inner
        products = products + inner.T @ added
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
    return torch.linalg.solve(squares + ridge, products).T


class _Ready:
    """Rows on their way through the first blocks, as far as they were wanted, for as long as those stay as they are."""

    def __init__(self, model: Any, rows: Sequence[Encoded]) -> None:
        self.model = model
        self.packs = packed_rows(model, rows)
        self.calls: list[list[Call]] = [[] for _ in self.packs]

    def around(self, position: int) -> Iterator[tuple[Any, Any, Any]]:
        """Of each pack: the inner layer (t, inner) of the MLP before a block, the block's input and output (t, d)."""
        layers = self.model.get_decoder().layers
        held: list[Any] = []
        hook = layers[position - 1].mlp.down_proj.register_forward_pre_hook(lambda _, args: held.append(args[0]))
        for n, packed in enumerate(self.packs):
            if len(self.calls[n]) <= position:
                with first_blocks(self.model, position + 1):
                    self.calls[n] = calls_of(self.model, packed)[0]
            held.clear()
            with packing.attention(self.model):
                hidden, keywords = self.calls[n][position - 1]
                before = output_of(layers[position - 1](hidden, **keywords))
                after = output_of(layers[position](before, **self.calls[n][position][1]))
            yield tuple(tokens(each, packed).float() for each in (held[-1], before, after))
        hook.remove()

    def forget(self, position: int) -> None:
        """A block was removed: from its place on all is different."""
        self.calls = [calls[:position] for calls in self.calls]


class _Trace:
    """One pass over the calibration rows that keeps every block's input, so that the model without block i
    is evaluated from block i + 1 on."""

    def __init__(self, model: Any, rows: Sequence[Encoded]) -> None:
        import torch.nn.functional as F

        self.model, self.decoder = model, model.get_decoder()
        self.packed = pack(rows, model.device)
        self.calls, last = calls_of(model, self.packed)
        after = [*(hidden for hidden, _ in self.calls[1:]), last]
        self.influence = [
            1.0
            - F.cosine_similarity(tokens(a, self.packed).float(), tokens(b, self.packed).float(), dim=-1).mean().item()
            for (a, _), b in zip(self.calls, after, strict=True)
        ]

    def loss_without(self, position: int, start: int | None = None) -> float:
        """Cross-entropy on the calibration targets with one block skipped, in nats a token.

        `start`: the first block whose weights may differ from those that were traced.
        """
        start = position if start is None else start
        hidden = self.calls[start][0]
        with packing.attention(self.model):
            for i in range(start, len(self.calls)):
                if i != position:
                    hidden = output_of(self.decoder.layers[i](hidden, **self.calls[i][1]))
        states = tokens(self.decoder.norm(hidden), self.packed)[self.packed.predicting]
        found = log_probs(states, head_of(self.model), self.packed.labels[:, None])
        return float(-found.mean().item())

"""Depth pruning by measured importance.

Candidates are the blocks of least *block influence*, one minus the mean cosine similarity of a block's input
and output (ShortGPT, Men et al., 2024). Of these the one is removed whose absence raises the loss on
calibration rows least, and everything is scored again after each removal: a fixed ranking is far worse,
because what a block contributes depends on which others are left.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import events, packing
from tasks.chat import Encoded
from tasks.errors import ConfigError
from tasks.params import Distill
from tasks.packing import pack, tokens


def prune(model: Any, calibration: Sequence[Encoded], settings: Distill, record: Path) -> list[dict[str, Any]]:
    """Remove blocks in place until the model has at most `max_parameters` of its parameters.

    Returns one entry a removal: the block's index in the original model, its influence, the calibration loss
    without it (nats a token), and the losses of the candidates that stayed. `record` makes a rerun cheap.

    Raises:
        ConfigError: even one block would be too large.
    """
    import torch

    layers = model.get_decoder().layers
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in layers[0].parameters())
    kept = len(layers) - max(0, -int((settings.max_parameters * total - total) // block))
    if kept < 1:
        raise ConfigError(
            f"distill.max_parameters is {settings.max_parameters}, but embeddings and head alone are {1 - len(layers) * block / total:.2f} of this model: raise it"
        )
    if record.is_file():
        history: list[dict[str, Any]] = json.loads(record.read_text())
        for entry in history:
            _remove(model, entry["position"])
        return history

    original = list(range(len(layers)))
    history = []
    with torch.no_grad(), events.progress("prune", len(layers) - kept, "blocks") as advance:
        while len(model.get_decoder().layers) > kept:
            trace = _Trace(model, calibration)
            order = sorted(range(len(trace.influence)), key=lambda i: trace.influence[i])[: settings.candidates]
            losses = {position: trace.loss_without(position) for position in sorted(order)}
            position = min(losses, key=lambda i: (losses[i], i))
            history.append(
                {
                    "block": original.pop(position),
                    "position": position,
                    "influence": round(trace.influence[position], 5),
                    "loss": round(losses[position], 5),
                    "candidates": {str(i): round(loss, 5) for i, loss in losses.items()},
                }
            )
            _remove(model, position)
            advance(note=f"loss {losses[position]:.3f}")
    record.write_text(json.dumps(history))
    return history


def _remove(model: Any, position: int) -> None:
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


class _Trace:
    """One pass over the calibration rows that keeps every block's input, so that the model without block i
    is evaluated from block i + 1 on."""

    def __init__(self, model: Any, rows: Sequence[Encoded]) -> None:
        import torch.nn.functional as F

        self.model, self.decoder = model, model.get_decoder()
        self.packed = pack(rows, model.device)
        self.inputs: list[Any] = []
        self.keywords: list[dict[str, Any]] = []

        def keep(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.inputs.append(args[0] if args else keywords.pop("hidden_states"))
            self.keywords.append(dict(keywords))

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.decoder.layers]
        last: list[Any] = []
        hooks.append(self.decoder.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
        packing.states(model, self.packed)
        for hook in hooks:
            hook.remove()
        after = [*self.inputs[1:], last[0]]
        self.influence = [
            1.0 - F.cosine_similarity(tokens(a, self.packed).float(), tokens(b, self.packed).float(), dim=-1).mean().item()
            for a, b in zip(self.inputs, after, strict=True)
        ]

    def loss_without(self, position: int) -> float:
        """Cross-entropy on the calibration targets with one block skipped, in nats a token."""
        import torch.nn.functional as F

        hidden = self.inputs[position]
        with packing.attention(self.model):
            for layer, keywords in zip(self.decoder.layers[position + 1 :], self.keywords[position + 1 :], strict=True):
                out = layer(hidden, **keywords)
                hidden = out[0] if isinstance(out, tuple) else out
        states = tokens(self.decoder.norm(hidden), self.packed)[self.packed.predicting]
        logits = self.model.get_output_embeddings()(states)
        return float(F.cross_entropy(logits.float(), self.packed.labels).item())

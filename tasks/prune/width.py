"""Width pruning: every block's MLP loses the inner channels that its output can best do without, and the others make
good what is lost.

Which: of all channels those whose removal raises the squared error of the MLP's output least, the others being refitted
at once (the Optimal Brain Surgeon of Hassibi and Stork, 1993, applied to structures as in ZipLM, Kurtic et al., 2023). The
outputs are those on rows of the task, so what goes is what the task does not need. Blocks are worked on from the first to
the last, each on what the narrowed ones before it hand on. No training, no label.
"""

from collections.abc import Sequence
from typing import Any

from tasks.frame import events
from tasks.learning import packing
from tasks.learning.packing import Packed, tokens
from tasks.models.chat import Encoded
from tasks.prune.blocks import calls_of, output_of, packed_rows

RIDGE = 0.01  # of the mean square of the inner channels
STEP = 64  # channels that go before the rest is weighed again


def can_narrow(model: Any) -> bool:
    """Whether all MLPs are gated ones of three plain matrices (Llama's form), which fewer channels leave as they are."""
    layers = model.get_decoder().layers
    return all(
        all(hasattr(getattr(layer, "mlp", None), name) for name in ("gate_proj", "up_proj", "down_proj"))
        and not any(getattr(layer.mlp, name).bias is not None for name in ("gate_proj", "up_proj", "down_proj"))
        and layer.mlp.down_proj.in_features == model.config.intermediate_size
        for layer in layers
    )


def narrow(model: Any, rows: Sequence[Encoded], kept: int) -> list[float]:
    """Leave `kept` inner channels in every MLP, in place.

    Returns, for each block, the share of its MLP's output (in squares, over the tokens of `rows`) that is lost.
    """
    import torch

    lost: list[float] = []
    layers = model.get_decoder().layers
    packs = packed_rows(model, rows)
    hidden: list[Any] = []
    keywords: list[list[dict[str, Any]]] = []
    with (
        torch.no_grad(),
        events.progress("choose channels to remove", len(layers), "blocks") as advance,
        packing.attention(model),
    ):
        for packed in packs:  # the states between blocks are made anew below, and held for one pack alone here
            calls = calls_of(model, packed)[0]
            hidden.append(calls[0][0])
            keywords.append([each for _, each in calls])
        for n, layer in enumerate(layers):
            squares = _squares(layer, hidden, [each[n] for each in keywords], packs)
            lost.append(_narrow_mlp(layer.mlp, squares, kept))
            hidden = [output_of(layer(states, **each[n])) for states, each in zip(hidden, keywords, strict=True)]
            advance(note=f"{lost[-1]:.1%} lost")
    model.config.intermediate_size = kept
    return lost


def _squares(layer: Any, hidden: Sequence[Any], keywords: Sequence[dict[str, Any]], packs: Sequence[Packed]) -> Any:
    """The second moments (inner, inner) of the MLP's inner channels over all tokens.

    Each token counts by one over the length of its residual: norms make only directions count, and the first token's is
    hundreds of times longer than any other.
    """
    held: list[Any] = []
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    total: Any = 0.0
    for states, each, packed in zip(hidden, keywords, packs, strict=True):
        residual = tokens(output_of(layer(states, **each)), packed).float()
        inner = tokens(held.pop(), packed).float() / residual.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        total = total + inner.T @ inner
    hook.remove()
    return total


def _narrow_mlp(mlp: Any, squares: Any, kept: int) -> float:
    """Cut one MLP down, refit its output weights, and return the share of its output that is lost."""
    import torch

    whole = mlp.down_proj.weight.float()  # (d, inner)
    ridged = squares + RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
    chosen = _choose(ridged, whole, kept)
    fitted = torch.linalg.solve(ridged[chosen][:, chosen], ridged[chosen] @ whole.T).T
    _keep_channels(mlp, chosen)
    mlp.down_proj.weight.copy_(fitted)
    missing = whole.clone()
    missing[:, chosen] -= fitted
    return float(((missing @ squares) * missing).sum() / ((whole @ squares) * whole).sum().clamp_min(1e-12))


def _keep_channels(mlp: Any, chosen: Any) -> None:
    """Leave the chosen channels of an MLP alone, with the weights that they had."""
    import torch

    for name in ("gate_proj", "up_proj"):
        projection = getattr(mlp, name)
        projection.weight = torch.nn.Parameter(projection.weight.detach()[chosen].clone())
        projection.out_features = len(chosen)
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, chosen].clone())
    mlp.down_proj.in_features = mlp.intermediate_size = len(chosen)


def _choose(squares: Any, weight: Any, kept: int) -> Any:
    """Indices (kept,) of the channels that stay, STEP at a time leaving those whose loss costs least.

    With the others refitted, the error that channel j leaves is |w_j|^2 / [S^-1]_jj, where S are the second moments of
    the channels still there and w_j the column of the weights fitted on them.
    """
    import torch

    left = torch.arange(len(squares), device=squares.device)
    products = squares @ weight.T  # (inner, d)
    while len(left) > kept:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares[left][:, left]))
        cost = (inverse @ products[left]).square().sum(1) / inverse.diagonal()
        gone = cost.argsort(stable=True)[: min(STEP, len(left) - kept)]
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        left = left[stays]
    return left

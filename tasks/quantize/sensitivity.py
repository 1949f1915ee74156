"""What each matrix of a model loses in each type: the KL divergence that rounding it alone would bring, foreseen.

To second order the divergence of a model whose matrix W became W + D is half the mean of (g D x)^2, where x is what the
matrix reads and g the gradient of the log-likelihood of a token that the model itself draws, with respect to what it writes (the
Fisher information; Martens, New Insights and Perspectives on the Natural Gradient Method, 2020). x and g of some hundred tokens are
kept, so that every type costs one product a matrix and no further pass. Errors of different matrices, and of one matrix at
different positions, are taken to be independent: so for keys and values, which meet in attention, it is a rough guess.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import StageError
from tasks.frame.events import progress
from tasks.models import chat, loading
from tasks.quantize.rounding import rounded

Tensor = Any
Losses = Mapping[str, Mapping[str, float]]  # GGUF tensor -> type -> nats a token
UNWEIGHED = frozenset({"q8_0"})  # types whose rounding llama.cpp does not weigh by importance
KEPT_BYTES = 500_000_000  # of what matrices read and of gradients
LONGEST = 256  # tokens of a conversation that are read
DIGITS = 2  # significant ones that are kept: what differs with threads and processors is far below


@dataclass
class _Matrix:
    """A matrix of the model: what it read and the gradients of what it wrote, a row a token. Embedding and head may be one."""

    weight: Tensor
    scale: float = 1.0  # by which an embedding multiplies what it looks up, as Gemma's does
    read: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Foreseen:
    """What each tensor loses in each type. `weighed`: where rounding by importance loses less, whose numbers, one a column,
    are in `importance`.
    """

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    weighed: dict[str, set[str]] = field(default_factory=dict)
    importance: dict[str, Any] = field(default_factory=dict)


def foresee(
    folder: Path, architecture: str, rows: Sequence[chat.Messages], kinds: Callable[[str], Sequence[str]], *, tokens: int,
    seed: int,
) -> Foreseen:  # fmt: skip
    """What rounding each matrix of the model in `folder` costs, by its name in a GGUF of this architecture. `kinds`: the types
    to try for a tensor of that name, each with and without weighing by the mean square of what the matrix reads.
    `rows` are read until `tokens` are reached.

    Raises:
        ArtifactError: the model or its tokenizer cannot be read.
        StageError: there is no row to read.
    """
    import torch

    model, tokenizer = loading.load_model(folder, "float32"), loading.load_tokenizer(folder)
    names = tensor_names(model, architecture)
    seen = _observed(model, tokenizer, names, rows, tokens, seed)
    found = Foreseen()
    with torch.no_grad(), progress("foresee what each type loses", len(set(names.values())), "tensors") as advance:
        for name in dict.fromkeys(names.values()):
            parts = [seen[module] for module, each in names.items() if each == name]
            half = parts[0].weight.to(torch.float16).float().cpu().numpy()  # what the F16 file holds
            found.losses[name], found.weighed[name] = {}, set()
            found.importance[name] = columns = _columns(parts)
            for kind in kinds(name):
                loss = _loss(parts, torch.from_numpy(rounded(half, kind) - half))
                if kind not in UNWEIGHED:
                    weighed = _loss(parts, torch.from_numpy(rounded(half, kind, columns) - half))
                    if weighed < loss:
                        found.weighed[name].add(kind)
                        loss = weighed
                found.losses[name][kind] = loss
            advance()
    return found


def _columns(parts: Sequence[_Matrix]) -> Any:
    """The mean square of what a matrix reads, a float32 number a column; of an embedding that is the head, too, of the head."""
    read = [each for part in parts for each in part.read if each.is_floating_point()]
    if not read:  # an embedding alone: each row is looked up as it is
        import torch

        return torch.ones(parts[0].weight.shape[1]).numpy()
    squares = sum(each.double().square().sum(0) for each in read)
    return (squares / sum(len(each) for each in read)).float().numpy()


def tensor_names(model: Any, architecture: str) -> dict[str, str]:
    """Module -> GGUF tensor, of every matrix that both know. Tied, embedding and head are one tensor."""
    import gguf
    import torch

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    embedding, names = model.get_input_embeddings(), {}
    for module, part in model.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            tied = part.weight is embedding.weight
            name = "token_embd.weight" if tied else table.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if name:
                names[module] = name
    return names


def _observed(
    model: Any, tokenizer: Any, names: Mapping[str, str], rows: Sequence[chat.Messages], tokens: int, seed: int
) -> dict[str, _Matrix]:
    """What each matrix reads and the gradients of what it writes, while the model reads `rows` and draws the next tokens."""
    import torch

    parts = {module: model.get_submodule(module) for module in names}
    matrices = {
        module: _Matrix(part.weight, float(getattr(part, "embed_scale", 1.0))) for module, part in parts.items()
    }
    wanted = min(tokens, KEPT_BYTES // (4 * sum(sum(each.weight.shape) for each in matrices.values())) + 1)
    device, drawn = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with _hooks(model, matrices), progress("read rows", wanted, "tokens") as advance:
        for ids in token_ids(tokenizer, rows, wanted):
            embedded = model.get_input_embeddings()(torch.tensor([ids], device=device)).requires_grad_()
            logits = model(inputs_embeds=embedded).logits[0]
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=drawn)[:, 0].to(device)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            advance(len(ids))
    return matrices


def token_ids(tokenizer: Any, rows: Sequence[chat.Messages], tokens: int) -> Iterator[list[int]]:
    """Rows as token ids, each cut where it is long, until there are so many tokens.

    Raises:
        StageError: no row has any.
    """
    left = tokens
    for row in rows:
        ids = list(chat.encode(tokenizer, row, LONGEST).ids[:left])
        if ids:
            left -= len(ids)
            yield ids
        if not left:
            return
    if left == tokens:
        raise StageError("the training data has no row to read: give it some, or leave this variant out")


@contextmanager
def _hooks(model: Any, matrices: Mapping[str, _Matrix]) -> Iterator[None]:
    def keep(matrix: _Matrix) -> Callable[[Any, Any, Tensor], None]:
        def hook(_: Any, read: Any, written: Tensor) -> None:
            matrix.read.append(read[0].detach().flatten(0, 1).cpu())
            if not written.requires_grad:
                written.requires_grad_()
            written.register_hook(lambda gradient: matrix.gradients.append(gradient.detach().flatten(0, 1).cpu()))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(each)) for name, each in matrices.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(parts: Sequence[_Matrix], change: Tensor) -> float:
    """Half the mean square of what the change of a weight does to the log-likelihood, over tokens."""
    total = 0.0
    for part in parts:
        for read, gradient in zip(part.read, part.gradients, strict=True):
            moved = read @ change.T if read.is_floating_point() else part.scale * change[read]
            total += float(((moved * gradient).sum(1).double() ** 2).sum())
    count = sum(len(gradient) for gradient in parts[0].gradients)
    return float(f"{total / count / 2:.{DIGITS - 1}e}")

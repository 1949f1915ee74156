"""The rows of a batch as one sequence: no padding in any product, and what all rows begin with computed once.

A packed sequence is the shared prefix (the template's head, a common system prompt), then each row's own tokens.
All of a decoder but its attention works token by token and needs to know nothing of this. The attention
lays the rows side by side again, each behind the prefix. States and gradients are those of separate rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from tasks.models.chat import Encoded
from tasks.models.sizes import DENSE

ATTENTION = "slmops_packed"  # our attention's name in transformers' register
WORTHWHILE_PREFIX = 8
SHORT = 256  # keys up to which plain products beat flash attention's backward pass on a CPU


@dataclass(frozen=True)
class Packed:
    """`t` tokens of rows that begin alike, in `s` segments of at most `l` tokens: the prefix (p > 0), then the rows.

    `predicting`: the places (n,) of the tokens that predict a target, row by row; `labels` (n,): those targets.
    `place`: of each token in the padded (s * l,) segments. `sees` (s, l, p + l): what a padded token attends to,
    over the prefix and its own segment.
    """

    ids: Any  # (1, t)
    positions: Any  # (1, t)
    predicting: Any
    labels: Any
    place: Any  # (t,)
    sees: Any
    prefix: int

    def padded_positions(self) -> tuple[Any, Any]:
        """Positions of the padded queries (s, l) and of their keys (s, p + l)."""
        import torch

        segments, longest = self.sees.shape[:2]
        queries = self.positions.new_zeros(segments * longest)
        queries[self.place] = self.positions[0]
        queries = queries.view(segments, longest)
        first = torch.arange(self.prefix, device=queries.device).expand(segments, -1)
        return queries, torch.cat([first, queries], 1)


def pack(rows: Sequence[Encoded], device: Any) -> Packed:
    """Pack rows; of each what comes after its last prediction is left out, since nothing depends on it."""
    import torch

    ends = [max(i for i, wanted in enumerate(row.target) if wanted) for row in rows]
    shared = common_prefix(rows)
    shared = shared if len(rows) > 1 and shared >= WORTHWHILE_PREFIX else 0
    spans = [(row, shared, end) for row, end in zip(rows, ends, strict=True)]
    if shared:
        spans.insert(0, (rows[0], 0, shared))
    lengths = [end - start for _, start, end in spans]
    longest = max(lengths)

    ids = torch.tensor([token for row, start, end in spans for token in row.ids[start:end]])
    positions = torch.tensor([i for _, start, end in spans for i in range(start, end)])
    targets = torch.tensor([row.target[i + 1] for row, start, end in spans for i in range(start, end)])
    following = torch.tensor([row.ids[i + 1] for row, start, end in spans for i in range(start, end)])
    predicting = targets.nonzero()[:, 0]
    place = torch.cat([torch.arange(length) + n * longest for n, length in enumerate(lengths)])

    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    real = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    own = causal[None] & real[:, None, :]
    before = torch.ones(len(spans), longest, shared, dtype=torch.bool)
    if shared:  # the prefix stands before itself: it sees itself there, and nothing twice
        before[0], own[0] = causal[:, :shared], False
    sees = torch.cat([before, own], -1)
    return Packed(
        ids[None].to(device), positions[None].to(device), predicting.to(device), following[predicting].to(device),
        place.to(device), sees.to(device), shared,
    )  # fmt: skip


def common_prefix(rows: Sequence[Encoded]) -> int:
    """How many leading tokens all rows share before the first that predicts a target."""
    most = min(row.target.index(True) - 1 for row in rows)
    first, last = min(row.ids[:most] for row in rows), max(row.ids[:most] for row in rows)
    return next((i for i in range(most) if first[i] != last[i]), most)


def states(model: Any, packed: Packed) -> Any:
    """Final hidden states (t, d) of all packed tokens."""
    decoder = model.get_decoder()
    if model.config.model_type in DENSE:
        with attention(model):
            made = decoder(input_ids=packed.ids, position_ids=packed.positions, use_cache=False, packed=packed)
    else:  # it may mix tokens elsewhere than in its attention: ordinary rows, the prefix repeated in each
        made = decoder(input_ids=_rows(packed), use_cache=False)
    return tokens(made.last_hidden_state, packed)


def tokens(hidden: Any, packed: Packed) -> Any:
    """What a block gave for the packed tokens (t, d), whichever way `states` laid them out."""
    import torch

    if len(hidden) == 1:
        return hidden[0]
    kept = hidden[:, packed.prefix :].flatten(0, 1)[packed.place]
    # The first segment is the prefix, which stands at the front there.
    return torch.cat([hidden[0, : packed.prefix], kept[packed.prefix :]])


def _rows(packed: Packed) -> Any:
    """Right-padded ids (s, p + l), the prefix before every segment."""
    import torch

    segments, longest = packed.sees.shape[:2]
    ids = packed.ids.new_zeros(segments * longest)
    ids[packed.place] = packed.ids[0]
    return torch.cat([packed.ids[:, : packed.prefix].expand(segments, -1), ids.view(segments, longest)], 1)


@contextmanager
def attention(model: Any) -> Iterator[None]:
    """Let the blocks of a dense model attend as packed tokens must."""
    if model.config.model_type not in DENSE:
        yield
        return
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)


def attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, packed: Packed, scaling: float | None = None,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Any, None]:  # fmt: skip
    """Attention of packed tokens in transformers' form: query (1, h, t, d), key and value (1, g, t, d) -> (1, t, h, d)."""
    import torch

    segments, longest = packed.sees.shape[:2]
    heads, groups, width = query.shape[1], key.shape[1], query.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    sees = packed.sees
    if sliding_window is not None:
        queries, keys = packed.padded_positions()
        sees = sees & (queries[:, :, None] - keys[:, None, :] < sliding_window)

    joined = torch.cat([query[0], key[0], value[0]], 0).transpose(0, 1).flatten(1)  # (t, (h + 2g) * d)
    split = _lay_out().apply(joined, packed.place, segments * longest)
    q, own_k, own_v = (
        split.view(segments, longest, heads + 2 * groups, width).transpose(1, 2).split([heads, groups, groups], 1)
    )
    k, v = (
        torch.cat([whole[:, :, : packed.prefix].expand(segments, -1, -1, -1), own], 2)
        for whole, own in ((key, own_k), (value, own_v))
    )
    if softcap is None and (query.is_cuda or k.shape[2] > SHORT):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sees[:, None], scale=scaling, enable_gqa=heads != groups
        )
    else:
        grouped = q.reshape(segments, groups, heads // groups * longest, width)
        scores = (grouped @ k.transpose(2, 3)).view(segments, heads, longest, -1) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~sees[:, None], torch.finfo(scores.dtype).min)
        shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = (shares.view(segments, groups, -1, shares.shape[-1]) @ v).view(segments, heads, longest, width)
    padded = out.transpose(1, 2).reshape(segments * longest, heads * width)
    return _take().apply(padded, packed.place).view(1, -1, heads, width), None


# Every token has one place, so laying out and taking are each other's backward pass. PyTorch's own would add up
# as if places could repeat, which is slow on a CPU.


@cache
def _lay_out() -> Any:
    import torch

    class LayOut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tokens: Any, place: Any, size: int) -> Any:
            ctx.place = place
            return tokens.new_zeros(size, tokens.shape[1]).index_copy_(0, place, tokens)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient.index_select(0, ctx.place), None, None

    return LayOut


@cache
def _take() -> Any:
    import torch

    class Take(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, padded: Any, place: Any) -> Any:
            ctx.place, ctx.size = place, len(padded)
            return padded.index_select(0, place)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient.new_zeros(ctx.size, gradient.shape[1]).index_copy_(0, ctx.place, gradient), None

    return Take

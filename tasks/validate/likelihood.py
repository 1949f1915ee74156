"""Perplexity, KL divergence and same top token of a file against its F16 reference, window by window.

The protocol is llama-perplexity's: windows of `context` tokens without overlap, each starting with BOS where
the model wants it, the second half scored. Both models see a window one after the other, and only sums are
kept, so nothing of the size of the vocabulary is stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import ConfigError
from tasks.frame.cores import threads
from tasks.frame.events import doing, note, progress
from tasks.models import chat
from tasks.runtimes import llama
from tasks.runtimes.protocol import WindowLogits
from tasks.validate.shipped import Shipped

ROWS = 16  # positions of one step: small enough for the processor's caches, large enough for its threads
FEWEST = 16  # tokens of a window below which the numbers would mean nothing


@dataclass(frozen=True)
class Likelihood:
    """Means over `tokens` scored positions; logarithms to base e."""

    perplexity: float
    reference_perplexity: float
    mean_kld: float
    same_top_token: float
    tokens: int
    context: int


def evaluate(shipped: Shipped) -> dict[str, float]:
    """Perplexity and KLD on the text that came with the data, else on the test conversations.

    Raises:
        ConfigError: the text is too short.
        StageError: the runtime fails.
    """
    import torch

    doing("load the files for perplexity")
    torch.set_num_threads(threads())
    context = shipped.settings.context
    with llama.window_logits(shipped.reference, context, threads()) as base:
        if shipped.text.is_file():
            tokens = base.session.tokenize(shipped.text.read_text(encoding="utf-8"))
            start = base.session.window_start()
        else:
            # The template writes its own BOS where it wants one.
            tokens, start = [token for row in shipped.rows for token in _whole(shipped.tokenizer, row)], None
        windows = split(tokens, context, shipped.settings.windows, start)
        with shipped.runtime.window_logits(shipped.file, context, threads()) as ours:
            compared = compare(base, ours, windows)
    reference = compared.reference_perplexity
    return {
        "perplexity": compared.perplexity,
        "perplexity_ratio": compared.perplexity / reference if reference else math.nan,
        "mean_kld": compared.mean_kld,
        "same_top_token": compared.same_top_token,
        "reference_perplexity": reference,
        "scored_tokens": compared.tokens,
        "context": compared.context,
    }


def _whole(tokenizer: Any, row: chat.Messages) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)
    return ids


def split(tokens: Sequence[int], context: int, windows: int, start: int | None) -> list[list[int]]:
    """At most `windows` windows of `context` tokens, the first of each replaced by `start` where there is one.

    A text shorter than one window makes one window of its own length.

    Raises:
        ConfigError: the text is too short for anything.
    """
    if len(tokens) < FEWEST:
        raise ConfigError(
            f"the text to score has {len(tokens)} tokens, fewer than {FEWEST}: give a longer one in acquire.data.text, or more test rows"
        )
    if len(tokens) < context:
        note(f"the text to score has only {len(tokens)} tokens: one window of that size instead of {context}")
        context = len(tokens)
    parts = [list(tokens[at : at + context]) for at in range(0, len(tokens) - context + 1, context)][:windows]
    return [window if start is None else [start, *window[1:]] for window in parts]


def compare(reference: WindowLogits, candidate: WindowLogits, windows: Sequence[Sequence[int]]) -> Likelihood:
    """Score the windows with both models.

    KL divergence is that of the candidate from the reference, over the whole vocabulary, in nats.
    """
    import torch

    sums = torch.zeros(
        4, dtype=torch.float64
    )  # negative log-likelihood of the candidate and the reference, KLD, same top token
    count = 0
    with progress("measure perplexity", len(windows), "windows") as advance:
        for window in windows:
            first = len(window) // 2
            base, ours = (torch.from_numpy(model(window, first)) for model in (reference, candidate))
            targets = torch.tensor(window[first + 1 :])
            for at in range(0, len(targets), ROWS):
                rows = slice(at, at + ROWS)
                sums += _score(torch, base[rows], ours[rows], targets[rows])
            count += len(targets)
            advance(1, f"perplexity {_exp(float(sums[0]) / count):.2f}")
    ours_nll, base_nll, kld, same = (sums / count).tolist()
    return Likelihood(
        perplexity=_exp(ours_nll),
        reference_perplexity=_exp(base_nll),
        mean_kld=kld,
        same_top_token=same,
        tokens=count,
        context=len(windows[0]),
    )


def _score(torch: Any, base: Any, ours: Any, targets: Any) -> Any:
    """Sums over some positions. Rows in float32, each by one thread, so that thread counts change nothing."""
    p, q = torch.log_softmax(base, dim=-1), torch.log_softmax(ours, dim=-1)
    at = targets[:, None]
    per_row = torch.stack(
        [
            -q.gather(1, at)[:, 0],
            -p.gather(1, at)[:, 0],
            (p.exp() * p.sub(q)).sum(dim=-1),
            (base.argmax(dim=-1) == ours.argmax(dim=-1)).float(),
        ]
    )
    return per_row.double().sum(dim=1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

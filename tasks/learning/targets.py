"""A teacher's targets: what it says at every token that a student will read, kept in a file.

For each target position the file holds the teacher's `top_k` most likely tokens with their log-probabilities; what is left
of the distribution is one further outcome, the tail, so that the divergence is a true KL between distributions over k + 1
outcomes and the student is not pushed to put all mass on the top. Beside it lies the teacher's last hidden state: a teacher
that knows its task is nearly certain of every token, and how it came to be says more than which one it is (hidden-state
matching: Sanh et al., DistilBERT, 2019).
"""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError
from tasks.frame import events
from tasks.frame.stage import need_space
from tasks.learning.packing import pack
from tasks.learning.training import batches, target_states
from tasks.models.chat import Encoded
from tasks.models.logits import head_of

# The student reads rows in another order than a teacher of the same seed, so that where an epoch is not read to its end
# most of its rows are new to the teacher, which is less certain of them and so says more.
ORDER = 0x5EED
Lookup = Callable[[list[int]], tuple[Any, Any, Any]]


def write_targets(
    model: Any, rows: Sequence[Encoded], read: Collection[int], path: Path, *, top_k: int, temperature: float
) -> None:
    """Keep the teacher's targets of the rows with the indices `read`.

    Raises:
        DiskFullError: they do not fit.
    """
    import torch
    from safetensors.torch import save_file

    order = sorted(read)
    counts = [sum(rows[i].target) for i in order]
    starts = dict(zip(order, accumulate(counts, initial=0), strict=False))
    total, width = sum(counts), model.config.hidden_size
    need_space(path.parent, total * (top_k * 8 + width * 2))
    tokens = torch.zeros(total, top_k, dtype=torch.int32)
    logs = torch.zeros(total, top_k, dtype=torch.float32)
    hidden = torch.zeros(total, width, dtype=torch.bfloat16)
    head = head_of(model).at(temperature)
    with torch.no_grad(), events.progress("teacher targets", len(order), "rows") as advance:
        for part in batches([len(rows[i].ids) for i in order], 4096, 0, 1.0):
            chosen = [order[n] for n in part]
            states = target_states(model, pack([rows[i] for i in chosen], model.device))
            logits = head.logits(states)
            top = logits.topk(top_k)
            where = torch.cat([torch.arange(starts[i], starts[i] + sum(rows[i].target)) for i in chosen])
            tokens[where] = top.indices.int().cpu()
            logs[where] = (top.values - logits.logsumexp(-1, keepdim=True)).cpu()
            hidden[where] = states.bfloat16().cpu()
            advance(len(chosen))
    kept = {
        "rows": torch.tensor(order),
        "counts": torch.tensor(counts),
        "tokens": tokens,
        "logs": logs,
        "hidden": hidden,
    }
    save_file(kept, path)


def read_targets(path: Path, device: Any) -> Lookup:
    """A reader of what `write_targets` kept: it maps row indices to token ids (n, k), log-probabilities (n, k) and hidden
    states (n, d) of their n targets in order.

    Raises:
        ArtifactError: the targets of a row that is asked for are not there.
    """
    import torch
    from safetensors.torch import load_file

    kept = load_file(path)
    ends = kept["counts"].cumsum(0).tolist()
    counts = kept["counts"].tolist()
    spans = {row: (end - count, end) for row, end, count in zip(kept["rows"].tolist(), ends, counts, strict=True)}

    def lookup(chosen: list[int]) -> tuple[Any, Any, Any]:
        if missing := [row for row in chosen if row not in spans]:
            raise ArtifactError(f"{path} has no targets of row {missing[0]}: run the teach stage again")
        where = torch.cat([torch.arange(*spans[row]) for row in chosen])
        tokens, logs, hidden = (kept[name][where].to(device) for name in ("tokens", "logs", "hidden"))
        return tokens.long(), logs, hidden

    return lookup

"""Offline knowledge distillation: the teacher speaks once, the student reads it as often as it likes.

For each target position the cache holds the teacher's `top_k` most likely tokens with their
log-probabilities; what is left of the distribution is one further outcome, the tail, so that the divergence is
a true KL between distributions over k + 1 outcomes and the student is not pushed to put all mass on the top.
Beside it lies the teacher's last hidden state: a teacher that knows its task is nearly certain of every token, and how
it came to be says more than which one it is (hidden-state matching: Sanh et al., DistilBERT, 2019).
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tasks.distill.params import Distill
from tasks.frame import events
from tasks.frame.stage import need_space
from tasks.learning.packing import pack
from tasks.learning.training import Objective, batches, log_probs, target_states
from tasks.models.chat import Encoded
from tasks.models.logits import head_of

Lookup = Callable[[list[int]], tuple[Any, Any, Any]]


def cache_targets(model: Any, rows: Sequence[Encoded], settings: Distill, path: Path, seed: int) -> Lookup:
    """Write the teacher's targets of every row that training with this seed will read to `path` unless they are there;
    return a reader.

    The reader maps row indices to token ids (n, k), log-probabilities (n, k) and hidden states (n, d) of their n
    targets in order.
    """
    import torch
    from safetensors.torch import load_file, save_file

    counts = [sum(row.target) for row in rows]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    if not path.is_file():
        width = model.config.hidden_size
        need_space(path.parent, starts[-1] * (settings.top_k * 8 + width * 2))
        tokens = torch.zeros(starts[-1], settings.top_k, dtype=torch.int32)
        logs = torch.zeros(starts[-1], settings.top_k, dtype=torch.float32)
        hidden = torch.zeros(starts[-1], width, dtype=torch.bfloat16)
        head = head_of(model).at(settings.temperature)
        lengths = [len(row.ids) for row in rows]
        steps = batches(lengths, settings.batch_tokens, seed, settings.passes(len(rows)))
        read = sorted(set(chain.from_iterable(steps)))
        with torch.no_grad(), events.progress("teacher targets", len(read), "rows") as advance:
            for part in batches([lengths[i] for i in read], 4096, 0, 1.0):
                chosen = [read[n] for n in part]
                packed = pack([rows[i] for i in chosen], model.device)
                found = target_states(model, packed)
                logits = head.logits(found)
                top = logits.topk(settings.top_k)
                where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
                tokens[where] = top.indices.int().cpu()
                logs[where] = (top.values - logits.logsumexp(-1, keepdim=True)).cpu()
                hidden[where] = found.bfloat16().cpu()
                advance(len(chosen))
        save_file({"tokens": tokens, "logs": logs, "hidden": hidden}, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    cached = load_file(path)

    def lookup(chosen: list[int]) -> tuple[Any, Any, Any]:
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
        tokens, logs, hidden = (cached[name][where].to(model.device) for name in ("tokens", "logs", "hidden"))
        return tokens.long(), logs, hidden

    return lookup


def distillation(model: Any, lookup: Lookup, settings: Distill) -> Objective:
    """Forward KL to the cached targets, scaled by T squared, mixed with cross-entropy (Hinton et al., 2015), and one
    minus the cosine of student's and teacher's hidden states."""
    import torch.nn.functional as F

    head = head_of(model)
    soft, temperature = settings.soft_weight, settings.temperature
    warm = head.at(temperature)

    def objective(hidden: Any, labels: Any, rows: list[int]) -> Any:
        tokens, logs, taught = lookup(rows)
        loss = soft * temperature**2 * forward_kl(log_probs(hidden, warm, tokens), logs).mean()
        if soft < 1:
            loss = loss - (1 - soft) * log_probs(hidden, head, labels[:, None]).mean()
        if settings.hidden_weight:
            near = F.cosine_similarity(hidden.float(), taught.float(), dim=-1).mean()
            loss = loss + settings.hidden_weight * (1 - near)
        return loss

    return objective


def forward_kl(student: Any, teacher: Any) -> Any:
    """KL(teacher || student) in nats of each position, over k listed tokens and the tail.

    `student`, `teacher`: log-probabilities (n, k) of the same tokens -> (n,).
    """
    import torch

    listed = (teacher.exp() * (teacher - student)).sum(-1)
    rest = (1.0 - teacher.exp().sum(-1)).clamp_min(1e-8)
    student_rest = torch.log1p(-student.exp().sum(-1).clamp_max(1.0 - 1e-6))
    return listed + rest * (rest.log() - student_rest)

"""Offline knowledge distillation: the teacher speaks once, the student reads it as often as it likes.

For each target position the cache holds the teacher's `top_k` most likely tokens with their
log-probabilities; what is left of the distribution is one further outcome, the tail, so that the divergence is
a true KL between distributions over k + 1 outcomes and the student is not pushed to put all mass on the top.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tasks import events
from tasks.chat import Encoded
from tasks.params import Distill
from tasks.stage import need_space
from tasks.packing import pack
from tasks.training import Objective, batches, log_probs, target_states

Lookup = Callable[[list[int]], tuple[Any, Any]]


def cache_targets(model: Any, rows: Sequence[Encoded], settings: Distill, path: Path) -> Lookup:
    """Write the teacher's targets of every row that training will read to `path` unless they are there; return a reader.

    The reader maps row indices to token ids (n, k) and log-probabilities (n, k) of their n targets in order.
    """
    import torch
    from safetensors.torch import load_file, save_file

    counts = [sum(row.target) for row in rows]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    if not path.is_file():
        need_space(path.parent, starts[-1] * settings.top_k * 8)
        tokens = torch.zeros(starts[-1], settings.top_k, dtype=torch.int32)
        logs = torch.zeros(starts[-1], settings.top_k, dtype=torch.float32)
        head = model.get_output_embeddings()
        lengths = [len(row.ids) for row in rows]
        read = sorted(set(chain.from_iterable(batches(lengths, settings.batch_tokens, settings.seed, settings.epochs))))
        with torch.no_grad(), events.progress("teacher targets", len(read), "rows") as advance:
            for part in batches([lengths[i] for i in read], 4096, 0, 1.0):
                chosen = [read[n] for n in part]
                packed = pack([rows[i] for i in chosen], model.device)
                logits = head(target_states(model, packed)).float() / settings.temperature
                top = logits.log_softmax(-1).topk(settings.top_k)
                where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
                tokens[where], logs[where] = top.indices.int().cpu(), top.values.cpu()
                advance(len(chosen))
        save_file({"tokens": tokens, "logs": logs}, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    cached = load_file(path)

    def lookup(chosen: list[int]) -> tuple[Any, Any]:
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
        return cached["tokens"][where].long().to(model.device), cached["logs"][where].to(model.device)

    return lookup


def distillation(model: Any, lookup: Lookup, settings: Distill) -> Objective:
    """Forward KL to the cached targets, scaled by T squared, mixed with cross-entropy (Hinton et al., 2015)."""
    head = model.get_output_embeddings()
    soft, temperature = settings.soft_weight, settings.temperature

    def objective(hidden: Any, labels: Any, rows: list[int]) -> Any:
        tokens, logs = lookup(rows)
        divergence = forward_kl(log_probs(hidden / temperature, head, tokens), logs).mean()
        likelihood = log_probs(hidden, head, labels[:, None]).mean() if soft < 1 else 0.0
        return soft * temperature**2 * divergence - (1 - soft) * likelihood

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

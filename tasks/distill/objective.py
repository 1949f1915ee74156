"""What a student is taught by: the teacher's distribution, its hidden states, and the labels."""

from typing import Any

from tasks.distill.params import Distill
from tasks.learning.targets import Lookup
from tasks.learning.training import Objective, log_probs
from tasks.models.logits import head_of


def distillation(model: Any, lookup: Lookup, settings: Distill, temperature: float) -> Objective:
    """Forward KL to the cached targets, scaled by T squared, mixed with cross-entropy (Hinton et al., 2015), and one
    minus the cosine of student's and teacher's hidden states."""
    import torch.nn.functional as F

    head = head_of(model)
    soft = settings.soft_weight
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

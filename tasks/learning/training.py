"""One training loop for fine-tuning and distillation: bf16 or fp32 with fp32 master weights, resumable, deterministic.

Only the hidden states of target positions reach the vocabulary projection, and only the log-probabilities of
wanted tokens leave it: with answers shorter than prompts that saves most of the head's work and memory. Rows are padded on the right, so causal attention never sees
padding and no mask is needed. The whole order of batches follows from the seed, and a checkpoint holds the
optimiser's state, so a run that was killed and resumed gives the same weights as one that was not.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tasks.errors import StageError
from tasks.frame import events
from tasks.frame.stage import need_space
from tasks.learning.packing import Packed, pack, states
from tasks.learning.params import Training
from tasks.models import loading
from tasks.models.chat import Encoded
from tasks.models.logits import Head, head_of

Objective = Callable[[Any, Any, list[int]], Any]
"""`objective(hidden, labels, rows)`: hidden (n, d) of the n target positions of the rows in order, their labels
(n,), the rows' indices -> scalar mean loss."""

CHECKPOINT_SECONDS = 60.0  # between two checkpoints, at least
CHECKPOINT_SHARE = 0.02  # of the time that they may take
CHUNK = 128  # target positions projected on the vocabulary at a time: few enough for a processor's caches
KEPT = 1024  # target positions whose probabilities are kept for the backward pass


def batches(lengths: Sequence[int], batch_tokens: int, seed: int, epochs: float) -> list[list[int]]:
    """Row indices of every step: shuffled each epoch, like lengths together, at most `batch_tokens` a step."""
    rng = random.Random(seed)
    steps: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        pool = max(1, batch_tokens * 16 // max(1, sum(lengths) // len(lengths)))
        made: list[list[int]] = []
        for start in range(0, len(order), pool):
            current: list[int] = []
            for row in sorted(order[start : start + pool], key=lambda i: lengths[i]):
                if current and lengths[row] * (len(current) + 1) > batch_tokens:
                    made.append(current)
                    current = []
                current.append(row)
            made.append(current)
        rng.shuffle(made)
        part = min(1.0, epochs - epoch)
        steps += made[: max(1, round(part * len(made)))]
    return steps


def target_states(model: Any, packed: Packed) -> Any:
    """Final hidden states (n, d) of the tokens that predict a target, in row order."""
    return states(model, packed)[packed.predicting]


def log_probs(hidden: Any, head: Head, tokens: Any) -> Any:
    """Log-probabilities (n, k) of `tokens` (n, k) at positions with hidden states (n, d), over the whole vocabulary.

    Any loss on a few tokens needs only these, so the (n, v) logits never enter the graph. They are made CHUNK rows
    at a time; the probabilities of up to KEPT rows stay for the backward pass, of more they are made again there.
    """
    import torch

    if torch.is_grad_enabled():
        return _log_probs_function().apply(hidden, head.weight, head.bias, tokens, head.scale, head.cap)
    made = []
    for part, wanted in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True):
        logits = head.logits(part)
        made.append(logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(made)


@cache
def _log_probs_function() -> Any:
    import torch

    def chances(part: Any, wanted: Any, head: Head) -> tuple[Any, Any, Any]:
        """Log-probabilities (m, k) of the `wanted` tokens, then by what the products with the weights move them: the
        slopes (m, k) of their logits (None: 1), and the slopes (m, v) of the log-sum in the type of `part`."""
        logits = head.logits(part)
        most = logits.amax(-1, keepdim=True)
        shares = (logits - most).exp_()
        total = shares.sum(-1, keepdim=True)
        shares, found = shares.div_(total), logits.gather(-1, wanted)
        steep = None
        if head.cap is not None:  # the derivative of the soft cap
            shares.mul_(1 - (logits / head.cap) ** 2)
            steep = 1 - (found / head.cap) ** 2
        return found - (most + total.log()), steep, shares.to(part.dtype)

    class LogProbs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, tokens: Any, scale: float, cap: float | None) -> Any:
            ctx.scale, ctx.cap = scale, cap
            keep, kept, made = len(hidden) <= KEPT, [], []
            for part, wanted in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True):
                found, steep, shares = chances(part, wanted, Head(weight, bias, scale, cap))
                made.append(found)
                if keep:
                    kept += [steep, shares]
            ctx.save_for_backward(hidden, weight, bias, tokens, *kept)
            return torch.cat(made)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            hidden, weight, bias, tokens, *kept = ctx.saved_tensors
            head = Head(weight, bias, ctx.scale, ctx.cap)
            grad_hidden = torch.empty_like(hidden)
            grad_weight, grad_bias = (
                torch.zeros_like(each) if needed else None
                for each, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
            )
            for n, start in enumerate(range(0, len(hidden), CHUNK)):
                part = slice(start, start + CHUNK)
                steep, shares = kept[2 * n : 2 * n + 2] if kept else chances(hidden[part], tokens[part], head)[1:]
                from_sum = -gradient[part].sum(-1, keepdim=True).to(shares.dtype)
                from_own = gradient[part] if steep is None else gradient[part] * steep
                grad = (shares * from_sum).scatter_add_(-1, tokens[part], from_own.to(shares.dtype))
                grad_hidden[part] = head.scaled(grad @ weight)
                if grad_weight is not None:
                    grad_weight += grad.T @ head.scaled(hidden[part])
                if grad_bias is not None:
                    grad_bias += head.scaled(grad.sum(0))
            return grad_hidden, grad_weight, grad_bias, None, None, None

    return LogProbs


def cross_entropy(model: Any) -> Objective:
    """The objective of supervised fine-tuning: mean negative log-likelihood of the targets, in nats."""
    head = head_of(model)
    return lambda hidden, labels, rows: -log_probs(hidden, head, labels[:, None]).mean()


def validation_loss(model: Any, rows: Sequence[Encoded], batch_tokens: int = 4096) -> float:
    """Mean negative log-likelihood of the targets of `rows`, in nats a token."""
    import torch

    total, count, head = 0.0, 0, head_of(model)
    with torch.no_grad():
        for indices in batches([len(row.ids) for row in rows], batch_tokens, 0, 1.0):
            packed = pack([rows[i] for i in indices], model.device)
            hidden = target_states(model, packed)
            total -= log_probs(hidden, head, packed.labels[:, None]).sum().item()
            count += len(packed.labels)
    return total / count


def train(
    model: Any,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: Training,
    objective: Objective,
    scratch: Path,
    label: str,
    *,
    seed: int,
) -> list[dict[str, float]]:
    """Train `model` in place, keep the weights of the best validation loss, return the history.

    The learning rate warms up linearly and decays by a cosine to a tenth. AdamW (Loshchilov and Hutter,
    2019) on fp32 master weights; forward and backward run in bf16 unless the hardware or `precision` says fp32.

    Raises:
        StageError: the loss is not finite, or the disk cannot hold a checkpoint.
    """
    import torch

    torch.manual_seed(seed)
    dtype = loading.arithmetic(settings.precision)
    events.note(f"computes in {dtype}")
    loading.cast(model, torch.float32)
    if settings.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)
        model.get_output_embeddings().weight.requires_grad_(False)
    masters = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    loading.cast(model, getattr(torch, dtype)).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    need_space(scratch, 14 * sum(m.numel() for m in masters))
    optimizer = torch.optim.AdamW(
        masters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )

    passes = settings.passes(len(rows))
    if passes < settings.epochs:
        events.note(f"reads {passes:.2g} epochs of {len(rows):,} rows: most_rows is {settings.most_rows:,}")
    steps = batches([len(row.ids) for row in rows], settings.batch_tokens, seed, passes)
    evaluate_at = {round(len(steps) * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
    state = _State(scratch / f"{label}.safetensors", optimizer, masters)
    saved, pause = time.monotonic(), CHECKPOINT_SECONDS
    with events.progress("training steps", len(steps)) as advance:
        advance(state.step)
        state.push(weights)
        while state.step < len(steps) and state.stale < settings.patience:
            chosen = steps[state.step]
            packed = pack([rows[i] for i in chosen], model.device)
            loss = objective(target_states(model, packed), packed.labels, chosen)
            value = loss.item()
            if not math.isfinite(value):
                raise StageError(
                    f"{label}: the loss is {value} at step {state.step + 1} of {len(steps)}: lower the learning rate ({settings.learning_rate}) or look for broken rows in the data"
                )
            loss.backward()
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float() if weight.grad is not None else None
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(masters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(state.step, len(steps), settings.warmup)
            optimizer.step()
            state.push(weights)
            state.step += 1
            state.losses.append(value)
            events.metric(f"{label}/loss", value, state.step)
            advance(note=f"loss {value:.3f}")
            if state.step in evaluate_at:
                model.eval()
                state.record(validation_loss(model, validation))
                model.train()
                events.metric(f"{label}/validation_loss", state.history[-1]["validation_loss"], state.step)
            if state.step in evaluate_at or time.monotonic() - saved > pause:
                began = time.monotonic()
                state.save()
                saved = time.monotonic()
                pause = max(CHECKPOINT_SECONDS, (saved - began) / CHECKPOINT_SHARE)
    state.push(weights, best=True)
    model.eval()
    return state.history


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at a step: linear warm-up, then a cosine from 1 to 0.1."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


class _State:
    """What a checkpoint holds: master weights, the optimiser's moments, the best weights, the step, the history."""

    def __init__(self, path: Path, optimizer: Any, masters: list[Any]) -> None:
        self.path, self.optimizer, self.masters = path, optimizer, masters
        self.best: list[Any] | None = None
        self.step, self.stale = 0, 0
        self.losses: list[float] = []  # since the last record
        self.history: list[dict[str, float]] = []
        if path.is_file():
            self._load()

    def push(self, weights: list[Any], best: bool = False) -> None:
        """Copy the master weights, or the best ones, into the model."""
        import torch

        source = self.best if best and self.best is not None else self.masters
        with torch.no_grad():
            torch._foreach_copy_(weights, source)

    def record(self, loss: float) -> None:
        """Note a validation pass; keep the weights if it is the best so far."""
        if not math.isfinite(loss):
            raise StageError(
                f"the validation loss is {loss} at step {self.step}: lower the learning rate or look for broken rows in the data"
            )
        best = min((entry["validation_loss"] for entry in self.history), default=math.inf)
        self.stale = 0 if loss < best else self.stale + 1
        if loss < best:
            self.best = [master.detach().bfloat16() for master in self.masters]
        mean = sum(self.losses) / max(1, len(self.losses))
        self.history.append({"step": self.step, "loss": round(mean, 6), "validation_loss": round(loss, 6)})
        self.losses = []

    def save(self) -> None:
        """Write the checkpoint beside the old one and swap them, so that a kill leaves one whole."""
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {}
        for i, master in enumerate(self.masters):
            moments = self.optimizer.state[master]
            tensors |= {f"weight.{i}": master, f"first.{i}": moments["exp_avg"], f"second.{i}": moments["exp_avg_sq"]}
        for i, tensor in enumerate(self.best or []):
            tensors[f"best.{i}"] = tensor
        facts = {"step": self.step, "stale": self.stale, "losses": self.losses, "history": self.history}
        fresh = self.path.with_suffix(".new")
        save_file(tensors, fresh, metadata={"state": json.dumps(facts)})
        os.replace(fresh, self.path)

    def _load(self) -> None:
        import torch
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            facts = json.loads(file.metadata()["state"])
            names = set(file.keys())
            for i, master in enumerate(self.masters):
                master.copy_(file.get_tensor(f"weight.{i}"))
                self.optimizer.state[master] = {
                    "step": torch.tensor(float(facts["step"]), device=master.device),
                    "exp_avg": file.get_tensor(f"first.{i}").to(master.device),
                    "exp_avg_sq": file.get_tensor(f"second.{i}").to(master.device),
                }
            if "best.0" in names:
                self.best = [file.get_tensor(f"best.{i}").to(m.device) for i, m in enumerate(self.masters)]
        self.step, self.stale = facts["step"], facts["stale"]
        self.losses, self.history = facts["losses"], facts["history"]
        events.note(f"resumed at step {self.step} from {self.path.name}")

"""From hidden states to logits: losses and gradients are transformers' own, for every architecture that is packed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import EXTRA, ROWS, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.distill.objective import distillation, forward_kl
from tasks.distill.params import Distill
from tasks.errors import ArtifactError
from tasks.learning import packing, training
from tasks.learning.targets import read_targets, write_targets
from tasks.models import logits
from tasks.models.logits import Head, head_of
from tasks.models.sizes import DENSE

# What an architecture does to its logits, so strongly that leaving it out could not pass for rounding.
STRONG: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 2.5},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "phi": {},  # its head has a bias
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | EXTRA.get(kind, {}) | STRONG.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    for weights in model.parameters():
        torch.nn.init.normal_(weights, float(weights.dim() == 1), 0.3)
    return model


def transformers_loss(model: Any, wanted: Any) -> Any:
    """Mean over the targets of `wanted(logits (n, v), labels (n,), where)`, each row alone in transformers' own forward."""
    total, count = 0.0, 0
    for row in ROWS:
        target = torch.tensor(row.target[1:])
        found = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1][target].float()
        labels = torch.tensor(row.ids[1:])[target]
        total = total + wanted(found, labels, slice(count, count + len(labels)))
        count += len(labels)
    return total / count


def gradients(model: Any, loss: Any) -> list[Any]:
    loss.backward()
    return [weights.grad for weights in model.parameters() if weights.grad is not None]


@pytest.mark.parametrize("kept", [training.KEPT, 0], ids=["kept", "made again"])
@pytest.mark.parametrize("kind", sorted({*DENSE, *STRONG}))
def test_loss_and_gradients_are_those_of_transformers(kind: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEPT", kept)
    monkeypatch.setattr(training, "CHUNK", 5)
    ours = made(kind)
    theirs = copy.deepcopy(ours)
    packed = packing.pack(ROWS, "cpu")
    loss = training.cross_entropy(ours)(training.target_states(ours, packed), packed.labels, [])
    own = transformers_loss(
        theirs, lambda found, labels, _: torch.nn.functional.cross_entropy(found, labels, reduction="sum")
    )
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=1e-5)
    assert training.validation_loss(ours, ROWS) == pytest.approx(own.item(), rel=1e-5)
    for mine, wanted in zip(gradients(ours, loss), gradients(theirs, own), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_distillation_is_at_the_temperature_of_the_whole_logits(kind: str, tmp_path: Path) -> None:
    """Before and after the cap are not the same: the teacher's targets and the student's loss take it after."""
    values = Distill(epochs=1.0, learning_rate=1e-3, soft_weight=0.7, hidden_weight=0.0, batch_tokens=4096)
    teacher, ours = made(kind), made(kind)
    with torch.no_grad():
        for weights in ours.parameters():
            weights += 0.05
    theirs = copy.deepcopy(ours)
    write_targets(teacher, ROWS, range(len(ROWS)), tmp_path / "t.safetensors", top_k=4, temperature=2.0)
    lookup = read_targets(tmp_path / "t.safetensors", "cpu")
    tokens, logs, _ = lookup(list(range(len(ROWS))))
    true: list[Any] = []
    with torch.no_grad():
        transformers_loss(teacher, lambda found, *_: true.append((found / 2.0).log_softmax(-1)) or 0.0)
    torch.testing.assert_close(logs, torch.cat(true).topk(4).values, atol=1e-5, rtol=1e-4)

    packed = packing.pack(ROWS, "cpu")
    objective = distillation(ours, lookup, values, 2.0)
    loss = objective(training.target_states(ours, packed), packed.labels, list(range(len(ROWS))))

    def wanted(found: Any, labels: Any, where: slice) -> Any:
        soft = forward_kl((found / 2.0).log_softmax(-1).gather(-1, tokens[where]), logs[where]).sum()
        return 0.7 * 4.0 * soft + 0.3 * torch.nn.functional.cross_entropy(found, labels, reduction="sum")

    own = transformers_loss(theirs, wanted)
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=1e-5)
    for mine, other in zip(gradients(ours, loss), gradients(theirs, own), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", sorted({*DENSE, *STRONG}))
def test_what_is_known_is_what_the_model_does(kind: str) -> None:
    logits.check(made(kind).to(torch.bfloat16))


def test_a_key_that_the_architecture_does_not_read_changes_nothing() -> None:
    model = made("llama")
    model.config.logits_scaling, model.config.final_logit_softcapping = 3.0, 1.0
    assert (head_of(model).scale, head_of(model).cap) == (1.0, None)


def test_logits_made_in_an_unknown_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_OVER", {})
    with pytest.raises(ArtifactError, match="granite"):
        logits.check(made("granite"))


def test_a_head_with_a_cap_has_the_slope_of_its_cap() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 8, dtype=torch.double, requires_grad=True), torch.randn(40, dtype=torch.double)
    hidden, tokens = torch.randn(6, 8, dtype=torch.double, requires_grad=True), torch.randint(0, 40, (6, 3))

    def found(hidden: Any, weight: Any, bias: Any) -> Any:
        return training.log_probs(hidden, Head(weight, bias, 0.7, 2.0), tokens)

    want = torch.autograd.functional.jacobian(
        lambda h: (2.0 * (0.7 * (h @ weight.T + bias) / 2.0).tanh()).log_softmax(-1).gather(-1, tokens), hidden
    )
    got = torch.autograd.functional.jacobian(lambda h: found(h, weight, bias), hidden)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

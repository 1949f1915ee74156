"""What turns a last hidden state into logits: one form for every architecture, read from the model.

Most decoders end with `hidden @ weight.T`. Some scale the product (Granite, Cohere), cap it smoothly (Gemma 2) or add a
bias (Phi 1). A loss, an argmax or a teacher's target that leaves this out is that of another model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.errors import ArtifactError

# The names that an architecture's configuration gives to what its head does beside the product.
_TIMES: Mapping[str, str] = {"cohere": "logit_scale", "cohere2": "logit_scale", "falcon_h1": "lm_head_multiplier"}
_OVER: Mapping[str, str] = dict.fromkeys(
    ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"), "logits_scaling"
)
_CAP: Mapping[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"), "final_logit_softcapping"),
    "recurrent_gemma": "logits_soft_cap",
}
_PROBE = 8  # tokens of the check
_NEAR = 0.02  # of the largest logit: what bf16 may round


@dataclass(frozen=True, eq=False)
class Head:
    """logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap); no bias or cap where it is None.

    `weight` (v, d), `bias` (v,): the model's own parameters, not copies.
    """

    weight: Any
    bias: Any = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Any) -> Any:
        """Logits (n, v) in fp32 of hidden states (n, d)."""
        made = (self.scaled(hidden) @ self.weight.T).float()
        if self.bias is not None:
            made = made + self.scale * self.bias.float()
        return made if self.cap is None else self.cap * (made / self.cap).tanh()

    def scaled(self, hidden: Any) -> Any:
        """Hidden states whose product with the weights is the scaled one: far fewer numbers than logits."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def at(self, temperature: float) -> "Head":
        """The head whose logits are these divided by a temperature."""
        return replace(self, scale=self.scale / temperature, cap=None if self.cap is None else self.cap / temperature)


def head_of(model: Any) -> Head:
    """The head of a causal language model."""
    config, layer = model.config, model.get_output_embeddings()
    kind = config.model_type
    scale = float(getattr(config, _TIMES[kind])) if kind in _TIMES else 1.0
    scale /= float(getattr(config, _OVER[kind])) if kind in _OVER else 1.0
    cap = getattr(config, _CAP[kind], None) if kind in _CAP else None
    return Head(layer.weight, getattr(layer, "bias", None), scale, None if cap is None else float(cap))


def check(model: Any) -> None:
    """Hold the head as it is read here against the model's own logits of a few tokens.

    Raises:
        ArtifactError: they differ, so that every loss would be that of another model.
    """
    import torch

    kind = model.config.model_type
    held: list[Any] = []
    ids = torch.arange(_PROBE, device=model.device)[None] % model.config.vocab_size
    try:
        hook = model.get_decoder().register_forward_hook(lambda *passed: held.append(passed[-1]))
        with torch.no_grad():
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
            ours = head_of(model).logits(held[0].last_hidden_state[0])
        hook.remove()
        near = float((ours - theirs).abs().max()) <= _NEAR * float(theirs.abs().max())
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{kind} models do not tell how their logits are made ({type(error).__name__}: {str(error)[:200]}): {_CURE}"
        ) from error
    if not near:
        raise ArtifactError(
            f"the logits of {kind} models are made of their hidden states in a way that is not known here, so training "
            f"would learn something else: {_CURE}"
        )


_CURE = "choose a model of another architecture, such as one of recipes/"

"""The models of the self-test: random, of one layer, yet with rows as wide as those of real models; and how far off it is.

A kernel is chosen by the width of a row: blocks of 32 or of 256, repacked or not, by tiles or not. Hence the widths.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Array = Any  # of NumPy, float32


class Shape(NamedTuple):
    """Rows of a model's matrices have `hidden` or `inner` weights."""

    hidden: int
    inner: int
    heads: int
    groups: int  # of heads that share keys and values


SHAPES = (Shape(576, 1536, 9, 3), Shape(256, 1024, 4, 2))
VOCABULARY = 512
PROMPT, DECODED = 160, 48  # tokens at once, and one by one


class Step(NamedTuple):
    """One thing to compute: what, how far off it is, how far off it may be."""

    what: str
    compute: Callable[[], "Distance"]
    limit: "Distance"


def model(shape: Shape) -> Any:
    """A Llama in float32 with weights of a size that lets each matrix count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=1,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(torch.float32).eval()
    random = torch.Generator().manual_seed(shape.hidden)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=random)
            else:
                weight.uniform_(0.8, 1.2, generator=random)
    return made


def tokens() -> list[int]:
    """A prompt."""
    import torch

    return [int(each) for each in torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(7))]


def reference(made: Any, weights: Mapping[str, Array], ids: list[int]) -> Array:
    """Logits (tokens, vocabulary) by torch in float32, with `weights` in place of the model's own of that name."""
    import torch

    own = {**made.state_dict(), **{name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}}
    with torch.no_grad():
        result: Array = torch.func.functional_call(made, own, (torch.tensor([ids]),)).logits[0].numpy()
    return result


class Distance(NamedTuple):
    """The length of an error as a share of the length of what is right: over all logits, and over the worst position's."""

    whole: float
    worst: float


# Activations are rounded to 8 bits in blocks of 32 or 256 before they meet quantized weights: 0.5 to 0.8 % of a product's
# length each time, and a logit has some five such products behind it. In all 1.4 to 2.6 % were measured here, 2 to 4 % at
# the worst position (of floating point in 16 bits, 0.3 %). One wrong row in a matrix of 576 comes to 6 %.
EIGHT_BITS, SIXTEEN_BITS = Distance(0.04, 0.1), Distance(0.005, 0.02)


def distance(computed: Array, wanted: Array) -> Distance:
    """How far off logits (tokens, vocabulary) are; infinitely far where one is no number."""
    import numpy as np

    if not np.isfinite(computed).all():
        return Distance(float("inf"), float("inf"))
    errors, lengths = (np.linalg.norm(each, axis=1) for each in (computed - wanted, wanted))
    return Distance(float(np.linalg.norm(errors) / np.linalg.norm(lengths)), float((errors / lengths).max()))


def disturb() -> None:
    """Let torch multiply matrices in bfloat16 in this thread, as the validate stage does between two calls of a runtime:
    oneDNN sets up the processor's matrix unit for itself.
    """
    import torch

    one = torch.ones(64, 64, dtype=torch.bfloat16)
    assert float((one @ one)[0, 0]) == 64.0


def save(made: Any, folder: Path) -> None:
    """The folder that ONNX Runtime GenAI's model builder reads; its tokenizer knows every id by its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(each): each for each in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2").save_pretrained(folder)

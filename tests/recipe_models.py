"""Tiny models of the recipes' architectures, as their repositories look: tokenizer, template, configuration.

The templates are written for these tests. Each has the traits of its family's: Qwen's empty thoughts before a last
answer, Gemma's system text inside the first turn, its trimming and its order of turns, Phi's ends.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from package_inputs import digits_apart

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
ROLES = """\
{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
TURNS = """\
{{ bos_token }}{% set ns = namespace(lead='', talk=messages) %}
{%- if messages[0].role == 'system' %}{% set ns.lead = messages[0].content + '\n\n' %}{% set ns.talk = messages[1:] %}{% endif %}
{%- for m in ns.talk %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{{ ns.lead if loop.first else '' }}
{{- m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
PHI_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
GEMMA_PLACE = "<image_soft_token>"  # an added token for which the embedding has no row


def qwen3(tokens: Path, out: Path) -> None:
    from tokenizers.normalizers import NFC

    tokenizer = _tokenizer(tokens)
    tokenizer.backend_tokenizer.normalizer = NFC()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHATML
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    _write(out, tokenizer, "qwen3", num_hidden_layers=4, head_dim=32, eos_token_id=ids)


def phi4(tokens: Path, out: Path) -> None:
    tokenizer = _tokenizer(tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": list(PHI_TOKENS)})
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = tokenizer.unk_token = PHI_TOKENS[0]
    tokenizer.chat_template = ROLES
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 5.0, 12.0, 25.0, 47.0]}
    _write(
        out, tokenizer, "phi3", num_hidden_layers=4, partial_rotary_factor=0.75, max_position_embeddings=131072,
        original_max_position_embeddings=4096, sliding_window=262144, rope_theta=10000.0,
        rope_scaling={"type": "longrope", **factors}, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]),
    )  # fmt: skip
    _edit(out / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def gemma3(texts: list[str], out: Path) -> None:
    import sentencepiece
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    out.mkdir(parents=True, exist_ok=True)
    vocabulary, words = io.BytesIO(), ("<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=vocabulary, model_type="bpe", vocab_size=400, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=list(words), add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (out / "tokenizer.model").write_bytes(vocabulary.getvalue())
    (out / "config.json").write_text('{"model_type": "gemma3_text"}')
    tokenizer = GemmaTokenizer.from_pretrained(out)
    for word in (*words[1:], GEMMA_PLACE):
        tokenizer.add_tokens([AddedToken(word, special=not word.isspace(), normalized=False)])
    tokenizer.chat_template = TURNS
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    _write(
        out, tokenizer, "gemma3_text", vocab_size=400, num_hidden_layers=6, head_dim=32, query_pre_attn_scalar=32,
        sliding_window=16, layer_types=kinds, bos_token_id=2, pad_token_id=0,
        eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    )  # fmt: skip
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    plain = {name: getattr(tokenizer, name) for name in names} | {"tokenizer_class": "GemmaTokenizer"}
    (out / "tokenizer_config.json").write_text(json.dumps(plain))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart(spelled_out=True)
    return tokenizer


def _write(out: Path, tokenizer: Any, kind: str, **config: Any) -> None:
    """A model with random weights, wide enough for its answers to be no ties."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    told = SIZES | {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "max_position_embeddings": 4096} | config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **told))
    for name, weights in model.named_parameters():
        # Gemma's norms multiply by one more than their weights. Its last block does most, so that another one is pruned.
        mean = 3.0 * name.startswith("model.layers.5.post") if kind == "gemma3_text" else float("norm" in name)
        torch.nn.init.normal_(weights, mean, 0.1)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    _edit(out / "config.json", **told)
    _edit(out / "generation_config.json", eos_token_id=told["eos_token_id"], do_sample=True, top_p=0.9)
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


MAKERS: dict[str, Callable[[Any, Path], None]] = {"qwen3": qwen3, "phi-4": phi4, "gemma3": gemma3}

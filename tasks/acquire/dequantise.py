"""A GGUF file as transformers holds a model: weights de-quantised to bf16, configuration, tokenizer.

transformers' own `from_pretrained(gguf_file=...)` parses the file's vocabulary three times and builds the name
table once per sub-module, which is most of its time. Here its configuration and tokenizer conversion, on one parse,
and its tensor processors are used as they are; the weights are read at the offsets that `gguf_check` found, with one
name table. What it would leave out silently (a tensor it has no place for, rope scaling) is refused.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tasks.acquire.config_check import MAX_SIZE
from tasks.acquire.gguf_check import GgufInfo
from tasks.errors import ArtifactError, brief
from tasks.frame import events
from tasks.models.loading import choose_template, foreign

CURE = "use the model's safetensors instead (acquire.model.source: local or hub)"

# Digits, case, accents, scripts, symbols, white space, contractions: where pre-tokenizers differ.
PROBE = (
    "Set 25 degrees at 07:30, don't WE'RE I'll 1234567 12,345.67\n\n\tx = {'a': [1, 2]};  naïve Straße œuvre "
    "日本語 한국어 Привет мир مرحبا ½ ² Ⅷ 👩‍👩‍👧 ☕️  end\r\n   "
)

# How llama.cpp's `tokenizer.ggml.pre` splits text (llama-vocab.cpp), for the families in wide use. A name that
# is not here keeps what transformers gives it; either way the outcome is held against llama.cpp.
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r"})
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3"})
_SPLITS = {
    "qwen2": _WORDS + r"\p{N}" + _REST,
    **dict.fromkeys(_WHOLE_WORDS_FIRST, _WORDS + r"\p{N}{1,3}" + _REST),
}


def dequantise(path: Path, info: GgufInfo) -> tuple[Any, Any]:
    """The model (bf16) and tokenizer in a checked GGUF file.

    Raises:
        ArtifactError: transformers does not know the architecture, or would lose part of the file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    architecture = info.metadata.get("general.architecture")
    scaling = info.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise _unsupported(
            path, f"it scales its rotary embedding ({scaling}), which transformers does not read from GGUF"
        )
    _check_sizes(path, info)
    folder = path.parent
    with foreign(f"{path}: transformers cannot read it", CURE), _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    choose_template(tokenizer, str(path))
    restore_pre_tokenizer(tokenizer, info)
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != native_ids(path, [PROBE])[0]:
        raise _unsupported(path, "the tokenizer that transformers rebuilds from it gives other tokens than llama.cpp")

    with foreign(f"{path}: transformers cannot build its architecture", CURE), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    state = _state(path, info, config, {name: tuple(each.shape) for name, each in empty.state_dict().items()})
    with foreign(f"{path}: transformers cannot load it", CURE):
        model, loading = type(empty).from_pretrained(
            None, config=config, state_dict=state, dtype=torch.bfloat16, output_loading_info=True
        )
    if lost := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        raise _unsupported(path, f"it does not fill {', '.join(map(str, lost[:5]))}")
    return model.eval(), tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let gguf parse a file's metadata once, whoever asks: its Python reader takes seconds for a vocabulary."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _state(path: Path, info: GgufInfo, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Weights by transformers' names, as bf16; `shapes`: those of the model's own."""
    import gguf
    import numpy as np
    import torch
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = info.metadata["general.architecture"]
    kinds = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    if not kinds:
        raise _unsupported(path, f"gguf does not know the architecture {architecture!r}")
    table = gguf.get_tensor_name_map(kinds[0], config.num_hidden_layers)
    places = {}
    for name in shapes:
        base, _, suffix = name.rpartition(".")
        places[f"{table.get_name(base)}.{suffix}"] = name
    if strangers := [tensor.name for tensor in info.tensors if tensor.name not in places]:
        raise _unsupported(path, f"transformers has no place for {', '.join(strangers[:5])}")

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    state = {}
    with events.progress("de-quantise", len(info.tensors), "tensors") as advance, path.open("rb") as file:
        for tensor in info.tensors:
            file.seek(tensor.offset)
            raw = np.frombuffer(file.read(tensor.size), dtype=np.uint8)
            rows = raw.reshape(*tensor.shape[:0:-1], -1)  # GGUF lists the fastest dimension first
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                rows = rows.view(np.float32 if tensor.type == "F32" else np.float16)
            try:
                weights = gguf.dequantize(rows, kind)
            except NotImplementedError:
                raise _unsupported(path, f"gguf cannot de-quantise {tensor.type}, the type of {tensor.name}") from None
            with foreign(f"{path}: transformers cannot place {tensor.name}", CURE):
                placed = processor.process(weights=weights, name=tensor.name)
            place = places[tensor.name]
            if placed.weights.shape != shapes[place]:
                raise _unsupported(
                    path,
                    f"{tensor.name} has the shape {list(placed.weights.shape)} where a model of its metadata has "
                    f"{list(shapes[place])}",
                )
            state[place] = torch.from_numpy(np.array(placed.weights)).to(torch.bfloat16)
            advance()
    return state


def restore_pre_tokenizer(tokenizer: Any, info: GgufInfo) -> None:
    """Split text before byte-pair merges as the file names it; transformers gives every file GPT-2's way."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    name = info.metadata.get("tokenizer.ggml.pre")
    if info.metadata.get("tokenizer.ggml.model") != "gpt2" or not isinstance(name, str):
        return
    backend = tokenizer.backend_tokenizer
    if name in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    elif name in _SPLITS:
        split = Split(Regex(_SPLITS[name]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        backend.model.ignore_merges = name in _WHOLE_WORDS_FIRST


def native_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by llama.cpp's own reading of the file's vocabulary, no special tokens.

    Raises:
        ArtifactError: llama.cpp cannot load it.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise _unsupported(path, "llama.cpp cannot load it")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    found = []
    for text in texts:
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 2))()  # a token is at least one byte
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, False)
        found.append(list(ids)[: max(count, 0)])
    llama_cpp.llama_model_free(model)
    return found


def _check_sizes(path: Path, info: GgufInfo) -> None:
    """Hold what the metadata says of the architecture against the tensors, before a module is built of it."""
    architecture = info.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise _unsupported(path, "general.architecture is not the name of one")
    blocks = {name.split(".")[1] for tensor in info.tensors if (name := tensor.name).startswith("blk.")}
    for key, most in (("block_count", len(blocks)), ("embedding_length", MAX_SIZE), ("attention.head_count", MAX_SIZE)):
        value = info.metadata.get(f"{architecture}.{key}")
        if type(value) is not int or not 1 <= value <= most:
            raise _unsupported(path, f"{architecture}.{key} is {brief(value)}, its tensors allow 1 to {most}")


def _unsupported(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"{path}: {problem}: {CURE}")

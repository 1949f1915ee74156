"""Load and save a Hugging Face causal model and its tokenizer, once for all stages."""

import errno
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, PipelineError, StageError, brief
from tasks.frame.stage import disk_full
from tasks.models import bf16


def load_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        ArtifactError: it is missing or not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{folder / 'config.json'}: {error.strerror if isinstance(error, OSError) else brief(error)}: a Hugging Face "
            "model folder has this file"
        ) from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder / 'config.json'} is not a JSON object: take the model from its source again")
    return config


@contextmanager
def foreign(what: str, cure: str = "take it from its source again") -> Iterator[None]:
    """Let another library read what anybody may have written; whatever it raises means that it cannot.

    tokenizers raises bare Exceptions, and a value of another type than expected leads transformers to any error at all.

    Raises:
        ArtifactError: with `what` could not be done.
    """
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        kind = "" if type(error) is Exception else f"{type(error).__name__}: "
        raise ArtifactError(f"{what}: {kind}{brief(error)}: {cure}") from error


PROBE_SIDE, PROBE_S, PROBE_TURN_S = 1024, 0.5, 0.03
WINS = 1.25  # times bf16's rate at which float32 is taken: real ratios lie far off, so noise does not decide


@cache
def product_rates() -> Mapping[str, float]:
    """Floating-point operations a second of a matrix product on all cores of the CPU, in float32 and in bfloat16.

    Measured once a process, in turns, so that other work slows both; the best of each counts. Without bf16
    instructions both are float32's: see `bf16`.
    """
    import torch

    names = ("float32", "bfloat16") if has_bf16() else ("float32",)
    matrices = {name: torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=getattr(torch, name)) for name in names}
    for matrix in matrices.values():
        matrix @ matrix  # the first product starts the threads
    best, began = dict.fromkeys(names, float("inf")), time.perf_counter()
    while time.perf_counter() - began < PROBE_S:
        for name, matrix in matrices.items():
            turn = time.perf_counter()
            while (started := time.perf_counter()) - turn < PROBE_TURN_S:
                matrix @ matrix
                best[name] = min(best[name], time.perf_counter() - started)
    rates = {name: 2 * PROBE_SIDE**3 / seconds for name, seconds in best.items()}
    return {"bfloat16": rates["float32"], **rates}


def has_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 matrices."""
    import torch

    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def arithmetic(precision: str) -> str:
    """The type to compute in, "bfloat16" or "float32", for `precision` (`auto`: the faster one of this machine).

    Having bf16 instructions does not tell: AMX makes them eight times as fast as float32, AVX512 without it twice or
    half. Where a processor that has none is told `bf16`, its products are computed in float32 and rounded.
    """
    import torch

    if precision == "bf16" and not torch.cuda.is_available() and not has_bf16():
        bf16.emulate()
    if precision != "auto":
        return {"bf16": "bfloat16", "fp32": "float32"}[precision]
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if not has_bf16():
        return "float32"
    rates = product_rates()
    return "float32" if rates["float32"] > WINS * rates["bfloat16"] else "bfloat16"


def load_model(folder: Path, dtype: str) -> Any:
    """The causal language model in `folder`, in evaluation mode, on the CPU or the first GPU.

    Raises:
        ArtifactError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is `events.progress`
    with foreign(f"{folder}: transformers cannot load this model"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; of several named chat templates the default one.

    Raises:
        ArtifactError: it cannot be read or has no chat template.
    """
    from transformers import AutoTokenizer

    with foreign(
        f"{folder}: transformers cannot load this tokenizer",
        "it may be damaged, or of a newer release of `tokenizers` than the installed one",
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    choose_template(tokenizer, str(folder))
    return tokenizer


def choose_template(tokenizer: Any, where: str) -> None:
    """Leave a tokenizer the one chat template that is used.

    Raises:
        ArtifactError: there is none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = tokenizer.chat_template = template.get("default")
    if not template or not isinstance(template, str):
        raise ArtifactError(f"{where}: the tokenizer has no chat template: choose an instruction-tuned model")


def save(model: Any, tokenizer: Any, out: Path, dtype: str = "bfloat16") -> None:
    """Write a plain folder: safetensors in one file or shards, config, tokenizer.

    Raises:
        StageError: the disk is full.
    """
    import torch

    # A model that was read from GGUF would refuse to be saved as "quantized".
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        cast(model, getattr(torch, dtype)).save_pretrained(out)
        tokenizer.save_pretrained(out)
        _complete(tokenizer, str(model.config.model_type), out)
        for weights in out.glob("*.safetensors"):
            weights.chmod(0o644)
    except Exception as error:
        # safetensors reports ENOSPC in the text of an exception of its own.
        if re.search(rf"os error {errno.ENOSPC}\b", str(error)) or getattr(error, "errno", None) == errno.ENOSPC:
            raise disk_full(out) from error
        raise


def _complete(tokenizer: Any, kind: str, out: Path) -> None:
    """Add what llama.cpp's converter reads of a tokenizer and transformers no longer writes.

    A SentencePiece vocabulary: `tokenizer.model`, in which control tokens look like words, and which tokens those are.
    Phi's converter expects one wherever the class has another name than byte-level BPE's.
    """
    path, vocabulary = out / "tokenizer_config.json", sentence_pieces(tokenizer)
    tokenizer_config = json.loads(path.read_bytes())
    if tokenizer.name_or_path and vocabulary.is_file():
        shutil.copyfile(vocabulary, out / vocabulary.name)
        tokenizer_config["added_tokens_decoder"] = {
            str(i): {"content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                     "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special}
            for i, token in sorted(tokenizer.added_tokens_decoder.items())
        }  # fmt: skip
    elif kind == "phi3":
        tokenizer_config["tokenizer_class"] = "GPT2Tokenizer"
    else:
        return
    path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sentence_pieces(tokenizer: Any) -> Path:
    """Where a tokenizer's SentencePiece vocabulary lies, if it has one: beside what it was read from."""
    return Path(tokenizer.name_or_path) / "tokenizer.model"


def cast(model: Any, dtype: Any) -> Any:
    """Cast the parameters in place; buffers such as the rotary frequencies stay exact, as a loaded model has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def count(model: Any) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def stop_ids(model_folder: Path, tokenizer: Any) -> list[int]:
    """Token ids that end a turn: the tokenizer's eos and the generation config's.

    Raises:
        StageError: there are none, so generation would never stop.
    """
    path = model_folder / "generation_config.json"
    listed = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    ids = listed if isinstance(listed, list) else [listed]
    stops = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not stops:
        raise StageError(f"{model_folder}: neither tokenizer nor generation config names an end-of-turn token")
    return stops


def fits(tokenizer: Any, rows: int) -> bool:
    """Whether an embedding of so many rows holds every token, but for special ones that stand for no text.

    Gemma's tokenizer knows a place for an image, which its models without eyes have no row for.
    """
    added = tokenizer.added_tokens_decoder
    return all(i < rows or (i in added and added[i].special) for i in tokenizer.get_vocab().values())


def check_same_vocabulary(teacher: Path, student: Path) -> None:
    """Refuse to distil between models whose token ids mean different things.

    Raises:
        ArtifactError: names the first token that differs, or an embedding too small for the tokenizer.
    """
    tokenizers = [load_tokenizer(folder) for folder in (teacher, student)]
    words = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if words[0] != words[1]:
        ours, theirs = words
        first = min((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), key=str)
        raise ArtifactError(
            f"teacher {teacher} ({len(ours)} tokens) and student {student} ({len(theirs)} tokens) have different vocabularies: "
            f"{first!r} is id {ours.get(first)} and {theirs.get(first)}: logits can only be distilled between equal vocabularies"
        )
    for folder, tokenizer in zip((teacher, student), tokenizers, strict=True):
        rows = load_config(folder).get("vocab_size", 0)
        if not fits(tokenizer, rows):
            raise ArtifactError(
                f"{folder}: the tokenizer has ids up to {max(words[0].values())}, the embedding only {rows} rows: take tokenizer and weights from one commit"
            )

"""Load and save a Hugging Face causal model and its tokenizer, once for all stages."""

import errno
import json
import re
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, StageError
from tasks.stage import disk_full

MICRO, SMALL, MEDIUM = 1.5e9, 14e9, 30e9


def size_class(parameters: int) -> str:
    """The closed rule: micro < 1.5B, small to < 14B, medium 14B to 30B, above that a teacher only."""
    if parameters < MICRO:
        return "micro"
    if parameters < SMALL:
        return "small"
    return "medium" if parameters <= MEDIUM else "teacher-only"


def load_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        ArtifactError: it is missing or not JSON.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}: a Hugging Face model folder has this file") from None
    return config


def load_model(folder: Path, dtype: str = "bfloat16") -> Any:
    """The causal language model in `folder`, in evaluation mode, on the CPU or the first GPU.

    Raises:
        ArtifactError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{folder}: transformers cannot load this model: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        ArtifactError: it cannot be read or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: transformers cannot load this tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise ArtifactError(f"{folder}: the tokenizer has no chat template: choose an instruction-tuned model")
    return tokenizer


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a plain folder: bf16 safetensors in one file or shards, config, tokenizer.

    Raises:
        StageError: the disk is full.
    """
    import torch

    # A model that was read from GGUF would refuse to be saved as "quantized".
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    except Exception as error:
        # safetensors reports ENOSPC in the text of an exception of its own.
        if re.search(rf"os error {errno.ENOSPC}\b", str(error)) or getattr(error, "errno", None) == errno.ENOSPC:
            raise disk_full(out) from error
        raise


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
    found = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not found:
        raise StageError(f"{model_folder}: neither tokenizer nor generation config names an end-of-turn token")
    return found

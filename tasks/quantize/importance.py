"""An importance matrix: how large what each column of a matrix reads is, so that the columns that matter are rounded best.

The mean square over tokens, as llama.cpp's `llama-imatrix` has it. The embedding, whose rows are looked up, has none.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.frame.events import progress
from tasks.models import chat, loading
from tasks.quantize.sensitivity import tensor_names, token_ids

Importance = Mapping[str, Any]  # GGUF tensor -> a float32 NumPy array, a number a column


def importance(folder: Path, architecture: str, rows: Sequence[chat.Messages], *, tokens: int) -> Importance:
    """Of every matrix of the model in `folder` that reads activations. `rows` are read until `tokens` are reached.

    Raises:
        ArtifactError: the model or its tokenizer cannot be read.
        StageError: there is no row to read.
    """
    import torch

    model, tokenizer = loading.load_model(folder, "float32"), loading.load_tokenizer(folder)
    sums: dict[str, Any] = {}

    def add(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, read: Any, __: Any) -> None:
            squares = read[0].detach().flatten(0, 1).double().square().sum(0).cpu()
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    for module, name in tensor_names(model, architecture).items():
        if isinstance(part := model.get_submodule(module), torch.nn.Linear):
            part.register_forward_hook(add(name))
    count, device = 0, next(model.parameters()).device
    with torch.no_grad(), progress("weigh columns", tokens, "tokens") as advance:
        for ids in token_ids(tokenizer, rows, tokens):
            model(torch.tensor([ids], device=device))
            count += len(ids)
            advance(len(ids))
    return {name: (each / count).float().numpy() for name, each in sums.items()}

"""GGUF variants of mixed types: for each tensor the type that its loss asks for, at no more bytes than a plain variant.

`auto-q4_0` has no more bytes than q4_0. What each tensor would lose in each type, rounded with and without an importance matrix,
is foreseen on training rows (`sensitivity`), bits go where they save most (`allocation`), and llama.cpp's own quantizer
writes an ordinary file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.frame.events import note
from tasks.frame.stage import require_file, write_json
from tasks.models import chat
from tasks.models.sizes import Shape, Tensor, from_gguf
from tasks.quantize import allocation, ggml_types, sensitivity
from tasks.quantize.ggml_types import BITS
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import GgufAuto

# Types that a tensor may have, where its rows hold their blocks. Of those with blocks of 32 none is below 4.5 bits. Q4_1 and Q5_1
# are left out: where weights lie near the grid of a quantized source, they round away what was learned, in all tensors alike,
# and errors that are alike add up to more than is foreseen (docs/measured.md).
BLOCKS_OF_32 = ("q4_0", "iq4_nl", "q5_0", "q8_0")
BLOCKS_OF_256 = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")


def quantize(variant: str, options: GgufAuto, inputs: Inputs, out: Path) -> None:
    """Write `out`/model.gguf and `out`/types.json: the type of each tensor, and the loss that is foreseen.

    Raises:
        StageError: the disk is full, llama.cpp refuses, or no row can be read.
    """
    base = variant.removeprefix("auto-")
    shape = _shape(require_file(inputs.f16, ggml_types.SOURCE))
    rows = chat.read_rows(inputs.data / "train.jsonl")
    matrices = {tensor.name: tensor for tensor in shape.tensors if tensor.matrix}
    foreseen = sensitivity.foresee(
        inputs.student, shape.architecture, rows, lambda name: _kinds(matrices[name]),
        tokens=options.tokens, seed=options.seed,
    )  # fmt: skip
    plain = {tensor.name: ggml_types.type_of(tensor, base, shape) for tensor in matrices.values()}
    types = choose(foreseen.losses, matrices, plain)
    loss = sum(foreseen.losses[name][kind] for name, kind in types.items())
    note(f"{variant}: a mean KLD of {loss:.3f} is foreseen on training rows")
    weighed = {name: foreseen.importance[name] for name, kind in types.items() if kind in foreseen.weighed[name]}
    ggml_types.write(variant, base, inputs.f16, out, plain | types, weighed)
    write_json(out / "types.json", {"types": plain | types, "weighed": sorted(weighed), "foreseen_kld": loss})


def choose(losses: sensitivity.Losses, matrices: Mapping[str, Tensor], plain: Mapping[str, str]) -> dict[str, str]:
    """The types of the tensors whose losses are known, at no more bytes than they have in the plain variant."""
    sizes = {name: {kind: BITS[kind] * matrices[name].elements / 8 for kind in kinds} for name, kinds in losses.items()}
    budget = sum(BITS[plain[name]] * matrices[name].elements / 8 for name in losses)
    try:
        return allocation.allocate(losses, sizes, budget)
    except ValueError:  # rows that hold no smaller type: the plain variant is the smallest that there is
        return {name: plain[name] for name in losses}


def predicted_size(variant: str, _: GgufAuto, shape: Shape) -> int:
    """Bytes of the file that `quantize` would write, at most."""
    return ggml_types.predicted_size(variant.removeprefix("auto-"), None, shape)


def obstacle(architecture: str) -> str | None:
    """Why no model of this `model_type` can be quantized so; None where nothing is known to be in the way."""
    return None


def _kinds(tensor: Tensor) -> Sequence[str]:
    return (*BLOCKS_OF_32, *(BLOCKS_OF_256 if tensor.row % 256 == 0 else ()))


def _shape(f16: Path) -> Shape:
    from gguf import GGUFReader

    reader = GGUFReader(f16)
    metadata: dict[str, Any] = {
        name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name
    }
    metadata["tokenizer.ggml.tokens"] = range(len(reader.fields["tokenizer.ggml.tokens"].data))
    tensors = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    return from_gguf(metadata["general.architecture"], metadata, tensors, header=0)

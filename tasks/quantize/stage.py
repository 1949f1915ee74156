"""One variant of the student by its quantizer."""

from pathlib import Path

from tasks.frame.cores import busy
from tasks.params import Params
from tasks.quantize.inputs import Inputs
from tasks.variants import VARIANTS


def quantize(
    params: Params, *, source: Path, student: Path, converted: Path, variant: str, out: Path
) -> dict[str, float]:
    """Write `model.gguf` or the folder `model/` into `out`; return its size in bytes.

    Raises:
        ArtifactError: an input is missing.
        StageError: the disk is full, the quantizer fails, or what it wrote does not load.
    """
    quantizer = VARIANTS[variant].quantizer
    inputs = Inputs(student / "model", converted / "student.gguf", source / "data")
    with busy(out.parent):
        quantizer.module.quantize(variant, params.quantize.of(quantizer.name), inputs, out)
    return {"size_bytes": float(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))}

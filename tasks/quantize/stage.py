"""Quantize: one variant of the student, as the file or folder that ships. One backend a variant."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tasks.frame.cores import busy
from tasks.params import Params
from tasks.quantize import ggml_types, model_builder
from tasks.quantize.params import Onnx, Variant

# backend(params.quantize.onnx, student's folder, student's F16 GGUF, out)
Backend = Callable[[Onnx, Path, Path, Path], None]


BACKENDS: Mapping[Variant, Backend] = {
    "f16": ggml_types.keep,
    **{variant: partial(ggml_types.quantize, variant) for variant in ggml_types.SHARE},
    "onnx-int4": model_builder.build,
}


def quantize(params: Params, *, student: Path, converted: Path, variant: Variant, out: Path) -> dict[str, float]:
    """Write `model.gguf` or the folder `model/` into `out`; return its size in bytes.

    Raises:
        ArtifactError: an input is missing.
        StageError: the disk is full, the back end fails, or what it wrote does not load.
    """
    with busy(out.parent):
        BACKENDS[variant](params.quantize.onnx, student / "model", converted / "student.gguf", out)
    return {"size_bytes": float(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))}

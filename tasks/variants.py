"""Every variant that can ship: what makes it, what runs it, and what lies in its folder. Nobody goes by its name.

A runtime is one file of `tasks/runtimes` and one row here; a quantizer is one file of `tasks/quantize`, its options beside
it, and one row here. Their code is imported when it is needed, by the name in the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tasks.quantize.options as options
from tasks.schema import Section


@dataclass(frozen=True)
class Runtime:
    """What runs a file on a device. `name` is also its module, which has the functions of `tasks/runtimes/protocol.py`."""

    name: str
    label: str  # for a person
    distribution: str  # the Python package whose version is recorded
    weights: str  # in a variant's folder: a file, or a folder
    mark: str  # a file there that shows that the weights are this runtime's
    # Where it has native code of its own, which proves itself by the module of this name in `tasks/selftest`:
    package: str = ""  # of Python, whose folder holds that code
    beside: tuple[str, ...] = ()  # distributions that the result of this proof depends on, too
    remedy: str = ""  # where the proof fails
    # Where its packages exclude ours, so that it lives in an environment of its own (see tasks/runtimes/environments.py):
    isolated: bool = False

    @property
    def native(self) -> bool:
        """Has it native code, which is to prove itself?"""
        return bool(self.package) or self.isolated

    @property
    def module(self) -> Any:
        """Its functions."""
        return import_module(f"tasks.runtimes.{self.name}")


@dataclass(frozen=True)
class Quantizer:
    """What makes files of one or several variants. `name` is also its module, with `quantize`, `predicted_size` and
    `obstacle`; `options` is its part of `quantize.options`.
    """

    name: str
    runtime: Runtime
    variants: tuple[str, ...]
    options: type[Section] | None = None

    @property
    def module(self) -> Any:
        """Its functions."""
        return import_module(f"tasks.quantize.{self.name}")


@dataclass(frozen=True)
class Variant:
    """One row of all that can be asked for in `quantize.variants`."""

    name: str
    quantizer: Quantizer

    @property
    def runtime(self) -> Runtime:
        return self.quantizer.runtime

    def weights(self, folder: Path) -> Path:
        """Where the weights lie in what `quantize` made."""
        return folder / self.runtime.weights


_PORTABLE = (
    "`CMAKE_ARGS=-DGGML_NATIVE=OFF infra/setup.sh` compiles it without the newest instructions of this processor, slower "
    "but right elsewhere"
)
RUNTIMES: Mapping[str, Runtime] = {
    each.name: each
    for each in (
        Runtime(
            "llama", "llama.cpp", "llama-cpp-python", "model.gguf", "model.gguf", "llama_cpp",
            ("gguf", "torch", "transformers"),
            f"`infra/setup.sh` compiles it again if it was compiled for another processor; {_PORTABLE}",
        ),
        Runtime(
            "onnx_genai", "ONNX Runtime GenAI", "onnxruntime-genai", "model", "model/genai_config.json",
            "onnxruntime_genai", ("onnxruntime", "onnx", "torch", "transformers"),
            "install it again (`pip install --force-reinstall -c constraints.txt onnxruntime onnxruntime-genai`), or "
            "leave its variants out of quantize.variants",
        ),
        Runtime(
            "openvino", "OpenVINO", "openvino-genai", "model", "model/openvino_model.xml", isolated=True,
            beside=("openvino", "openvino-tokenizers", "optimum-intel", "nncf"),
            remedy="install it again (`slmops runtimes install openvino`), or leave its variants out of quantize.variants",
        ),
    )
}  # fmt: skip
LLAMA = RUNTIMES["llama"]  # that of the F16 files, with which all others are compared

_GGML_TYPES = (
    "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_m", "q2_k",
)  # fmt: skip
QUANTIZERS: Mapping[str, Quantizer] = {
    each.name: each
    for each in (
        Quantizer("ggml_types", RUNTIMES["llama"], _GGML_TYPES, options.GgmlTypes),
        Quantizer("gguf_auto", RUNTIMES["llama"], ("auto-q5_0", "auto-q4_k_m", "auto-q4_0"), options.GgufAuto),
        Quantizer("model_builder", RUNTIMES["onnx_genai"], ("onnx-int4",), options.ModelBuilder),
        Quantizer("openvino_export", RUNTIMES["openvino"], ("openvino-int8", "openvino-int4"), options.OpenVino),
    )
}

VARIANTS: Mapping[str, Variant] = {
    name: Variant(name, quantizer) for quantizer in QUANTIZERS.values() for name in quantizer.variants
}

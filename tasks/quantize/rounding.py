"""A matrix as a ggml type would hold it: quantized by llama.cpp's own code, and back."""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tasks.frame.cores import threads

Matrix = Any  # a float32 NumPy array (rows, row length)


def rounded(matrix: Matrix, kind: str, importance: Matrix | None = None) -> Matrix:
    """The values that are left of `matrix` in the type `kind` (`q5_0`), whose blocks must fit its rows. `importance`: a
    float32 number a column, by which errors are weighed.

    Rows are quantized one by one, so neither their order nor how many there are matters.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
    from llama_cpp._ggml import libggml

    quantize = libggml.ggml_quantize_chunk
    quantize.restype, pointer, count = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    type_ = GGMLQuantizationType[kind.upper()]
    block, size = GGML_QUANT_SIZES[type_]
    libggml.ggml_quantize_init(int(type_))  # tables that several threads would make at once
    weighed = None if importance is None else importance.ctypes.data

    def part(rows: Matrix) -> Matrix:
        source = np.ascontiguousarray(rows, dtype=np.float32)
        length = source.shape[1]
        made = np.empty((len(source), length // block * size), dtype=np.uint8)
        quantize(int(type_), source.ctypes.data, made.ctypes.data, 0, len(source), length, weighed)
        return dequantize(made, type_)

    parts: Sequence[Matrix] = np.array_split(matrix, min(threads(), len(matrix)))
    with ThreadPoolExecutor(len(parts)) as pool:
        return np.concatenate(list(pool.map(part, parts)))

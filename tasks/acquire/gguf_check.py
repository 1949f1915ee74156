"""Read a GGUF file's header with every length and offset held against the file, before native code sees it.

Follows the format as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md gives it: a 24-byte head,
typed key-value pairs, tensor descriptions, padding to `general.alignment`, tensor data. Whatever the bytes
are, `check` returns or raises ArtifactError: nothing read from the file is used as a size before it was
compared with what is left of the file.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any

from tasks.errors import QUOTED, ArtifactError, brief

MAX_ENTRIES = 65_536  # key-value pairs, and tensors
MAX_STRING = 16 * 2**20  # bytes of one string; the longest in use, chat templates, take some 100 kB
MAX_ELEMENTS = 2**22  # array elements in the whole file; a vocabulary of 256,000 needs under 2 million
MAX_OTHER_ELEMENTS = 2**16  # of one array that is no vocabulary
MAX_DEPTH = 4  # arrays in arrays
MAX_DIMENSIONS = 4
MAX_NAME = 64  # bytes of a tensor's name

# name, elements in a block, bytes of a block, by type id
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

_STRING, _ARRAY, _BOOL = 8, 9, 7
_UINT32 = 4
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", _UINT32: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` as the file gives it, the fastest dimension first; `offset` from the file's start."""

    name: str
    type: str
    type_id: int
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes


@dataclass(frozen=True)
class GgufInfo:
    """The header of a checked file."""

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def parameters(self) -> int:
        """Weights in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


def check(path: Path) -> GgufInfo:
    """Read and check the header of a GGUF file, version 2 or 3, little-endian.

    Raises:
        ArtifactError: it is not a whole and well-formed GGUF file; names the byte offset.
    """
    try:
        with path.open("rb") as file:
            return _header(_Reader(path, file, path.stat().st_size))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}: name a readable GGUF file") from None


class _Reader:
    """A file read forwards; no read goes past its end."""

    def __init__(self, path: Path, file: IO[bytes], size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0
        self.elements = 0

    def refuse(self, problem: str, at: int | None = None) -> ArtifactError:
        where = self.at if at is None else at
        problem = problem if len(problem) <= 2 * QUOTED else brief(problem)
        return ArtifactError(
            f"{self.path} is not a usable GGUF file: at byte {where}: {problem}: fetch the file again, "
            "or take one that llama.cpp can read"
        )

    def room(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.refuse(f"{what} needs {count} bytes, {self.size - self.at} are left: the file is cut short")

    def take(self, count: int, what: str) -> bytes:
        self.room(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.refuse(f"{what}: the file became shorter while it was read")
        self.at += count
        return data

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        start = self.at
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise self.refuse(f"{what} is said to have {length} bytes, at most {limit} are allowed", start)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is not UTF-8", start) from None


def _header(read: _Reader) -> GgufInfo:
    if (magic := read.take(4, "the magic")) != b"GGUF":
        raise read.refuse(f"the file begins with {magic!r}, not b'GGUF'", 0)
    version = read.number("I", "the version")
    if version and version & 0xFFFF == 0:
        raise read.refuse("the file is big-endian: convert it with gguf's gguf-convert-endian", 4)
    if version not in (2, 3):
        raise read.refuse(f"version {version} is not supported, only 2 and 3", 4)
    tensor_count = read.number("Q", "the tensor count")
    pair_count = read.number("Q", "the metadata count")
    for count, what, at in ((tensor_count, "tensors", 8), (pair_count, "metadata entries", 16)):
        if count > MAX_ENTRIES:
            raise read.refuse(f"{count} {what} are announced, at most {MAX_ENTRIES} are allowed", at)
    if tensor_count == 0:
        raise read.refuse("the file holds no tensors", 8)

    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        start = read.at
        key = read.string("a metadata key", 65_535)
        if not key:
            raise read.refuse("a metadata key is empty", start)
        if key in metadata:
            raise read.refuse(f"the metadata key {key!r} comes twice", start)
        kind_at = read.at
        kind = read.number("I", f"the type of {key}")
        metadata[key] = _value(read, kind, key, 0)
        if key == "general.alignment":
            _check_alignment(read, kind, metadata[key], kind_at)
    alignment: int = metadata.get("general.alignment", 32)

    described = [_description(read) for _ in range(tensor_count)]
    data_start = -(-read.at // alignment) * alignment
    tensors, names = [], set()
    for name, kind, shape, offset, at in described:
        if name in names:
            raise read.refuse(f"the tensor {name!r} comes twice", at)
        names.add(name)
        tensors.append(_placed(read, name, kind, shape, offset, at, alignment, data_start))
    _check_overlap(read, tensors, {name: at for name, *_, at in described})
    _refuse_part(read.path, metadata)
    return GgufInfo(version, metadata, tuple(tensors))


def _refuse_part(path: Path, metadata: Mapping[str, Any]) -> None:
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 1)
    if isinstance(number, int) and isinstance(count, int) and count > 1:
        raise ArtifactError(
            f"{path} is part {number + 1} of {count} of a model: join them with llama.cpp's `llama-gguf-split --merge "
            "FIRST-PART JOINED`, and name the joined file"
        )


def _check_alignment(read: _Reader, kind: int, value: Any, at: int) -> None:
    if kind != _UINT32 or value < 8 or value & (value - 1):
        raise read.refuse(f"general.alignment is {value!r}, not a uint32 power of two of at least 8", at)


def _value(read: _Reader, kind: int, key: str, depth: int) -> Any:
    if kind == _STRING:
        return read.string(f"the value of {key}")
    if kind == _ARRAY:
        return _array(read, key, depth)
    if kind not in _SCALARS:
        raise read.refuse(f"{key} has the unknown value type {kind}", read.at - 4)
    value = read.number(_SCALARS[kind], f"the value of {key}")
    if kind != _BOOL:
        return value
    if value > 1:
        raise read.refuse(f"{key} is a boolean of value {value}", read.at - 1)
    return bool(value)


def _array(read: _Reader, key: str, depth: int) -> list[Any]:
    start = read.at
    if depth >= MAX_DEPTH:
        raise read.refuse(f"{key} nests arrays more than {MAX_DEPTH} deep")
    kind = read.number("I", f"the element type of {key}")
    count = read.number("Q", f"the length of {key}")
    if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
        raise read.refuse(f"{key} has the unknown element type {kind}", start)
    # The least an element can take: its number, a string's length, or an inner array's type and length.
    least = struct.calcsize("<" + _SCALARS[kind]) if kind in _SCALARS else 8 if kind == _STRING else 12
    read.room(count * least, f"{key} with {count} elements")
    read.elements += count
    if count > MAX_OTHER_ELEMENTS and not key.startswith("tokenizer."):
        raise read.refuse(f"{key} holds {count} elements, more than {MAX_OTHER_ELEMENTS}", start)
    if read.elements > MAX_ELEMENTS:
        raise read.refuse(f"the arrays up to {key} hold more than {MAX_ELEMENTS} elements", start)
    if kind == _STRING:
        what = f"an element of {key}"
        return [read.string(what) for _ in range(count)]
    if kind == _ARRAY:
        return [_array(read, key, depth + 1) for _ in range(count)]
    values = struct.unpack(f"<{count}{_SCALARS[kind]}", read.take(count * least, key))
    if kind != _BOOL:
        return list(values)
    if any(value > 1 for value in values):
        raise read.refuse(f"{key} holds booleans other than 0 and 1", start)
    return [bool(value) for value in values]


def _description(read: _Reader) -> tuple[str, int, tuple[int, ...], int, int]:
    """Name, type id, shape, offset in the data region; and where in the file it says so."""
    start = read.at
    name = read.string("a tensor's name", MAX_NAME)
    if not name:
        raise read.refuse("a tensor's name is empty", start)
    at = read.at
    dimensions = read.number("I", f"the dimensions of {name}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise read.refuse(f"{name} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed", at)
    shape = struct.unpack(f"<{dimensions}Q", read.take(8 * dimensions, f"the shape of {name}"))
    if 0 in shape or prod(shape) >= 2**63:
        raise read.refuse(f"{name} has the impossible shape {list(shape)}", at)
    return name, read.number("I", f"the type of {name}"), shape, read.number("Q", f"the offset of {name}"), start


def _placed(
    read: _Reader, name: str, kind: int, shape: tuple[int, ...], offset: int, at: int, alignment: int, data_start: int
) -> GgufTensor:
    if kind not in TENSOR_TYPES:
        raise read.refuse(f"{name} has the unknown type {kind}", at)
    type_name, block, block_size = TENSOR_TYPES[kind]
    if shape[0] % block:
        raise read.refuse(f"{name} has rows of {shape[0]} elements, not whole blocks of {block} ({type_name})", at)
    size = prod(shape) // block * block_size
    if offset % alignment:
        raise read.refuse(f"{name} lies at offset {offset}, which is not a multiple of {alignment}", at)
    begin = data_start + offset
    if begin + size > read.size:
        raise read.refuse(
            f"{name} reaches from byte {begin} to {begin + size}, beyond the file's end at {read.size}: "
            "the file is cut short",
            at,
        )
    return GgufTensor(name, type_name, kind, shape, begin, size)


def _check_overlap(read: _Reader, tensors: list[GgufTensor], described_at: Mapping[str, int]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.size > after.offset:
            raise read.refuse(f"{after.name} overlaps {before.name}", described_at[after.name])

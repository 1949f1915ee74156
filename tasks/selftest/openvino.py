"""OpenVINO against torch: weights of 8 bits, as its exporter makes them, prompt and token by token."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tasks.runtimes import openvino
from tasks.selftest import tiny


def steps(folder: Path) -> Iterator[tiny.Step]:
    """All that is to be computed, in turn: each is to be done before the next is asked for."""
    shape, ids = tiny.SHAPES[0], tiny.tokens()
    made = tiny.model(shape)
    tiny.save(made, folder / "source")
    out, options = folder / "model", ["--weight-format", "int8", "--disable-convert-tokenizer"]
    code, said = openvino.export(folder / "source", out, options, folder)
    if code != 0:
        raise SystemExit(f"the exporter cannot export a Llama: {said[-300:]}")
    wanted = tiny.reference(made, {}, ids)
    what = f"int8, rows of {shape.hidden} and {shape.inner}"
    yield tiny.Step(f"{what}, prompt at once", partial(_off, out, ids, wanted), tiny.EIGHT_BITS)


def _off(model: Path, ids: list[int], wanted: tiny.Array) -> tiny.Distance:
    with openvino.window_logits(model, len(ids), 1) as logits:
        return tiny.distance(logits(ids, 0), wanted[:-1])


def kernels() -> str:
    """It chooses kernels by the processor that it finds."""
    return ""

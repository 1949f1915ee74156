"""OpenVINO against torch: weights of 8 bits, as its exporter makes them, a prompt at once, and with its end cut off and computed
again in pieces.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tasks.runtimes import openvino
from tasks.selftest import tiny

NONE = tiny.Distance(0.0, 0.0)


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
    yield tiny.Step(f"{what}, cut back and token by token", partial(_unlike, out, ids), NONE)


def _off(model: Path, ids: list[int], wanted: tiny.Array) -> tiny.Distance:
    with openvino.window_logits(model, len(ids), 1) as logits:
        return tiny.distance(logits(ids, 0), wanted[:-1])


def _unlike(model: Path, ids: list[int]) -> tiny.Distance:
    """The share of next tokens that another path to the same sequence makes otherwise, where they are not about equally likely."""
    import numpy as np

    with openvino.window_logits(model, len(ids), 1) as logits:
        all_at_once = logits([*ids, 0], 0)
    step = openvino.stepper(model, 1, len(ids))
    step(ids, 0)
    half, wrong = len(ids) // 2, 0
    for at in range(half, len(ids)):
        found = step([ids[at]], at)  # the first cuts off all from there
        best = np.sort(all_at_once[at])[::-1]
        wrong += found != all_at_once[at].argmax() and best[0] - best[1] > 0.05 * np.ptp(all_at_once[at])
    share = wrong / (len(ids) - half)
    return tiny.Distance(share, share)


def kernels() -> str:
    """It chooses kernels by the processor that it finds."""
    return ""

"""Types by what they lose: the allocation, the losses foreseen against those measured, and the file that llama.cpp writes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOMS, tiny_rows
from gguf_inputs import converted, quantized
from hypothesis import given
from hypothesis import strategies as st
from package_inputs import ROWS, trained

from tasks.frame import manifest
from tasks.models import chat, loading
from tasks.models.sizes import Tensor
from tasks.quantize import ggml_types, gguf_auto, sensitivity
from tasks.quantize.allocation import allocate
from tasks.quantize.importance import importance
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import GgmlTypes
from tasks.quantize.rounding import rounded

KINDS = ("a", "b", "c", "d")
numbers = st.floats(0.125, 128, width=16)
tensors = st.lists(
    st.tuples(st.lists(numbers, min_size=4, max_size=4), st.lists(numbers, min_size=4, max_size=4)),
    min_size=1,
    max_size=4,
)


def tables(drawn: list) -> tuple[dict, dict]:
    losses, sizes = (
        {str(i): dict(zip(KINDS, each[part], strict=True)) for i, each in enumerate(drawn)} for part in (0, 1)
    )
    return losses, sizes


@given(tensors, st.floats(0, 1))
def test_the_budget_holds_and_no_plain_choice_on_the_hull_is_better(drawn: list, share: float) -> None:
    losses, sizes = tables(drawn)
    least = sum(min(each.values()) for each in sizes.values())
    budget = least + share * (sum(max(each.values()) for each in sizes.values()) - least) + 1e-6
    chosen = allocate(losses, sizes, budget)
    spent = sum(sizes[name][kind] for name, kind in chosen.items())
    lost = sum(losses[name][kind] for name, kind in chosen.items())
    assert spent <= budget + 1e-6
    # What is lost more than by the best of all choices is less than one step of one tensor.
    every = (dict(zip(losses, kinds, strict=True)) for kinds in itertools.product(KINDS, repeat=len(losses)))
    costs = [
        sum(losses[n][k] for n, k in each.items())
        for each in every
        if sum(sizes[n][k] for n, k in each.items()) <= budget
    ]
    steps = [max(each.values()) - min(each.values()) for each in losses.values()]
    assert min(costs) - 1e-6 <= lost <= min(costs) + max(steps) + 1e-6


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        allocate({"t": {"a": 1.0}}, {"t": {"a": 10.0}}, 9.0)


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0", "iq4_nl", "q4_k", "q6_k"])
def test_rounding_is_a_types_own_and_rows_stand_alone(kind: str) -> None:
    matrix = np.random.default_rng(1).standard_normal((37, 256)).astype(np.float32)
    whole = rounded(matrix, kind)
    assert 0 < np.abs(whole - matrix).mean() < {"q8_0": 0.01, "q6_k": 0.03}.get(kind, 0.15)
    assert (rounded(matrix[::-1], kind)[::-1] == whole).all()
    again = rounded(whole, kind)
    assert np.abs(again - whole).mean() < np.abs(whole - matrix).mean() / 4


@pytest.fixture(scope="module")
def rows() -> list[chat.Messages]:
    return [row["messages"] for row in tiny_rows(ROOMS[:4])]


def divergence(folder: Path, rows: list[chat.Messages], module: str, kind: str, columns: np.ndarray | None) -> float:
    """The mean KLD that rounding one matrix brings, by running the model."""
    model, tokenizer = loading.load_model(folder, "float64"), loading.load_tokenizer(folder)
    found, count = 0.0, 0
    weight = model.get_submodule(module).weight
    with torch.no_grad():
        half = weight.half().double()
        for row in rows:
            ids = torch.tensor([chat.encode(tokenizer, row, 256).ids])
            weight.copy_(half)
            before = model(ids).logits[0].log_softmax(-1)
            weight.copy_(torch.from_numpy(rounded(half.numpy(), kind, columns)))
            after = model(ids).logits[0].log_softmax(-1)
            found += float((before.exp() * (before - after)).sum())
            count += ids.shape[1]
    return found / count


def test_what_is_foreseen_is_what_running_the_model_shows(tiny_model_folder: Path) -> None:
    """All but keys and values, whose errors at several positions meet in one attention."""
    folder, wanted = trained(tiny_model_folder), ("q4_0", "q5_0")
    made = sensitivity.foresee(folder, "llama", ROWS, lambda _: wanted, tokens=2000, seed=1)
    modules = {
        "token_embd": "model.embed_tokens", "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.1.ffn_up": "model.layers.1.mlp.up_proj", "blk.2.ffn_down": "model.layers.2.mlp.down_proj",
    }  # fmt: skip
    for name, module in modules.items():
        for kind in wanted:
            tensor = f"{name}.weight"
            columns = made.importance[tensor] if kind in made.weighed[tensor] else None
            shown = divergence(folder, ROWS, module, kind, columns)
            assert 0.5 < made.losses[tensor][kind] / shown < 2, (name, kind)


def test_the_file_is_no_larger_and_has_the_types_that_were_chosen(tiny_model_folder: Path) -> None:
    from gguf import GGUFReader

    auto, plain = (quantized(tiny_model_folder, name) / "model.gguf" for name in ("auto-q4_0", "q4_0"))
    assert auto.stat().st_size <= plain.stat().st_size + 1000  # of metadata
    told = json.loads(auto.with_name("types.json").read_text())
    reader = GGUFReader(auto)
    made = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert {name: made[name] for name in told["types"]} == told["types"]
    assert len(set(told["types"].values())) > 1
    assert reader.fields["slmops.type"].contents() == "AUTO-Q4_0"
    plain_types = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(plain).tensors}
    assert plain_types != made


def test_what_rows_hold_no_smaller_type_stays_plain() -> None:
    losses = {"t": dict.fromkeys(gguf_auto.BLOCKS_OF_32, 1.0)}

    tensor = Tensor("t", row=32, elements=32, matrix=True, block=None)
    assert gguf_auto.choose(losses, {"t": tensor}, {"t": "q2_k"}) == {"t": "q2_k"}


def test_an_importance_matrix_is_the_mean_square_of_what_is_read(tiny_model_folder: Path, rows: list) -> None:
    made = importance(tiny_model_folder, "llama", rows, tokens=60)
    assert "blk.0.attn_q.weight" in made
    model, tokenizer = loading.load_model(tiny_model_folder, "float32"), loading.load_tokenizer(tiny_model_folder)
    seen, left = [], 60
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, read, __: seen.append(read[0][0]))
    with torch.no_grad():
        for row in rows:
            ids = chat.encode(tokenizer, row, 256).ids[:left]
            if len(ids):
                model(torch.tensor([ids]))
            left -= len(ids)
    wanted = torch.cat(seen).square().mean(0)
    np.testing.assert_allclose(made["blk.1.ffn_down.weight"], wanted.numpy(), rtol=1e-4)


def test_importance_changes_the_file_and_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    plain = quantized(tiny_model_folder, "q4_0") / "model.gguf"
    files = converted(tiny_model_folder)
    inputs = Inputs(tiny_model_folder, files / "student.gguf", files.with_name("source") / "data")
    ggml_types.quantize("q4_0", GgmlTypes(importance=True, tokens=100), inputs, tmp_path)
    made = tmp_path / "model.gguf"
    assert manifest.sha256(made) != manifest.sha256(plain)
    assert made.stat().st_size == pytest.approx(plain.stat().st_size, abs=300)
    assert "slmops.importance" in GGUFReader(made).fields

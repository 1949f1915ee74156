"""Packed rows: the states and gradients of separate rows, for every architecture that is packed."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import EXTRA, HEAD, ROWS, SIZES, row
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.learning import packing
from tasks.learning.packing import common_prefix, pack, states
from tasks.models.chat import Encoded
from tasks.models.sizes import DENSE


def made(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | EXTRA.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    return model


def separate(model: Any, rows: list[Encoded]) -> torch.Tensor:
    """States of the predicting tokens, each row alone in an ordinary forward pass."""
    found = []
    for each in rows:
        hidden = model.get_decoder()(input_ids=torch.tensor([each.ids]), use_cache=False).last_hidden_state[0]
        found.append(hidden[:-1][torch.tensor(each.target[1:])])
    return torch.cat(found)


@pytest.mark.parametrize("kind", sorted(DENSE))
@pytest.mark.parametrize("keys", [packing.SHORT, 0], ids=["products", "flash"])
def test_states_and_gradients_are_those_of_separate_rows(kind: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHORT", keys)
    model = made(kind)
    assert common_prefix(ROWS) == len(HEAD)
    weights = torch.randn(sum(sum(each.target) for each in ROWS), 32)
    results = []
    for way in (
        lambda m: (packed := pack(ROWS, "cpu"), states(m, packed)[packed.predicting])[1],
        lambda m: separate(m, ROWS),
    ):
        mine = copy.deepcopy(model)
        found = way(mine)
        (found * weights).sum().backward()
        results.append((found.detach(), [p.grad for p in mine.get_decoder().layers.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_an_architecture_that_is_not_known_to_be_dense_gets_ordinary_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    monkeypatch.setattr(packing, "DENSE", frozenset())
    for rows in (ROWS, ROWS[:1]):
        packed = pack(rows, "cpu")
        torch.testing.assert_close(
            states(model, packed)[packed.predicting], separate(model, rows), atol=1e-5, rtol=1e-4
        )


def test_the_attention_of_the_model_is_left_as_it_was() -> None:
    model = made("llama")
    states(model, pack(ROWS, "cpu"))
    assert model.config._attn_implementation == "eager"
    assert model.generate(torch.tensor([HEAD]), max_new_tokens=2, do_sample=False).shape[1] > len(HEAD)


tokens = st.lists(st.integers(3, 59), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    head=st.lists(st.integers(3, 59), max_size=14), rests=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5)
)
def test_every_target_is_predicted_once_whatever_the_rows_share(
    head: list[int], rests: list[tuple[list[int], list[int]]]
) -> None:
    rows = [row([1, *head, *prompt], answer) for prompt, answer in rests]
    packed = pack(rows, "cpu")
    assert packed.labels.tolist() == [i for _, answer in rests for i in answer]
    assert packed.ids.shape[1] == packed.prefix + sum(len(each.ids) - 1 - packed.prefix for each in rows)
    assert len(set(packed.place.tolist())) == packed.ids.shape[1]
    model = _MODEL
    torch.testing.assert_close(states(model, packed)[packed.predicting], separate(model, rows), atol=1e-5, rtol=1e-4)


_MODEL = made("llama")

"""The training loop: the mask, the loss, the schedule, resume, and what happens to a NaN."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOMS, tiny_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import ConfigError, StageError
from tasks.learning import training
from tasks.learning.params import Training
from tasks.models import chat, loading
from tasks.models.chat import Encoded
from tasks.models.logits import Head

SETTINGS = Training(
    epochs=4.0, learning_rate=1e-2, batch_tokens=256, evaluations=4, patience=4, freeze_embeddings=False
)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    return loading.load_model(tiny_model_folder, "float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return loading.load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Encoded]:
    return chat.encode_all(tokenizer, [row["messages"] for row in tiny_rows(ROOMS)], 128)


def test_the_mask_covers_the_answer_and_its_stop_token_only(tokenizer: Any) -> None:
    row = chat.encode(tokenizer, tiny_rows(["attic"])[0]["messages"], 128)
    learned = [i for i, wanted in zip(row.ids, row.target, strict=True) if wanted]
    assert tokenizer.decode(learned) == '{"action": "lamp", "room": "attic"}<|im_end|>'
    assert row.ids[: row.answer_start] == chat.prompt_ids(tokenizer, tiny_rows(["attic"])[0]["messages"][:-1])


def test_every_assistant_turn_is_learned_and_the_last_is_the_answer(tokenizer: Any) -> None:
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    row = chat.encode(tokenizer, [{"role": r, "content": c} for r, c in turns], 128)
    learned = tokenizer.decode([i for i, wanted in zip(row.ids, row.target, strict=True) if wanted])
    assert learned == "first<|im_end|>second<|im_end|>"
    assert tokenizer.decode(row.ids[row.answer_start :]) == "second<|im_end|>"


def test_a_row_that_is_too_long_is_refused_with_the_setting_to_change(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"task\.max_length"):
        chat.encode(tokenizer, tiny_rows(["attic"])[0]["messages"], 16)


@pytest.mark.parametrize("chunk", [1024, 16])
def test_log_probs_and_their_gradients_are_those_of_log_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHUNK", chunk)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False)
    tokens, weights = torch.randint(0, 500, (50, 5)), torch.randn(50, 5)
    results = []
    for function in (
        lambda h: training.log_probs(h, Head(head.weight), tokens),
        lambda h: head(h).log_softmax(-1).gather(-1, tokens),
    ):
        hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        head.weight.grad = None
        out = function(hidden)
        (out * weights).sum().backward()
        results.append((out.detach(), hidden.grad, head.weight.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_padding_and_prompt_do_not_touch_the_loss(model: Any, rows: list[Encoded]) -> None:
    alone = [training.validation_loss(model, [row]) * sum(row.target) for row in rows[:5]]
    together = training.validation_loss(model, rows[:5]) * sum(sum(row.target) for row in rows[:5])
    assert together == pytest.approx(sum(alone), rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    size=st.integers(60, 300),
    epochs=st.sampled_from([1.0, 2.0]),
)
def test_batches_hold_every_row_once_an_epoch_within_the_limit(lengths: list[int], size: int, epochs: float) -> None:
    steps = training.batches(lengths, size, 3, epochs)
    assert sorted(i for step in steps for i in step) == sorted(list(range(len(lengths))) * int(epochs))
    assert all(max(lengths[i] for i in step) * len(step) <= size for step in steps)
    assert steps == training.batches(lengths, size, 3, epochs)


def test_the_schedule_rises_then_falls() -> None:
    factors = [training.schedule(step, 100, 0.1) for step in range(100)]
    assert factors.index(max(factors)) in (9, 10)
    assert 0 < factors[0] < 0.2
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def _train(
    model: Any, rows: list[Encoded], scratch: Path, objective: Callable[..., Any] | None = None
) -> tuple[Any, Any]:
    mine = copy.deepcopy(model)
    scratch.mkdir(exist_ok=True)
    history = training.train(
        mine, rows, rows[:6], SETTINGS, objective or training.cross_entropy(mine), scratch, "t", seed=17
    )
    return mine, history


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns(model: Any, rows: list[Encoded], tmp_path: Path, precision: str) -> None:
    mine = copy.deepcopy(model)
    values = SETTINGS.model_copy(update={"precision": precision})
    before = training.validation_loss(mine, rows)
    history = training.train(mine, rows, rows[:6], values, training.cross_entropy(mine), tmp_path, "t", seed=17)
    assert history[-1]["validation_loss"] < 0.7 * before


@pytest.mark.parametrize(("ratio", "chosen"), [(2.0, "float32"), (1.1, "bfloat16"), (0.1, "bfloat16")])
def test_the_faster_arithmetic_of_this_machine_is_chosen(
    monkeypatch: pytest.MonkeyPatch, ratio: float, chosen: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks the CPU's rates only where they decide")
    monkeypatch.setattr(loading, "has_bf16", lambda: True)
    monkeypatch.setattr(loading, "product_rates", lambda: {"float32": ratio, "bfloat16": 1.0})
    assert loading.arithmetic("auto") == chosen
    assert [loading.arithmetic("bf16"), loading.arithmetic("fp32")] == ["bfloat16", "float32"]


def test_rates_of_products_are_measured_once() -> None:
    assert loading.product_rates() is loading.product_rates()
    assert loading.product_rates().keys() == {"float32", "bfloat16"}
    assert min(loading.product_rates().values()) > 1e7


def test_frozen_embeddings_stay_and_the_rest_moves(model: Any, rows: list[Encoded], tmp_path: Path) -> None:
    mine = copy.deepcopy(model)
    values = SETTINGS.model_copy(update={"precision": "fp32", "freeze_embeddings": True, "epochs": 1.0})
    training.train(mine, rows, rows[:6], values, training.cross_entropy(mine), tmp_path, "t", seed=17)
    moved = [n for n, p in mine.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert "model.embed_tokens.weight" not in moved
    assert len(moved) > 20


def test_rows_read_are_limited_over_all_epochs(model: Any, rows: list[Encoded], tmp_path: Path) -> None:
    limited = SETTINGS.model_copy(update={"epochs": 4.0, "most_rows": len(rows) * 2})
    found = []
    for name, values in {"limited": limited, "two": SETTINGS.model_copy(update={"epochs": 2.0})}.items():
        mine = copy.deepcopy(model)
        (tmp_path / name).mkdir()
        objective = training.cross_entropy(mine)
        found.append(training.train(mine, rows, rows[:6], values, objective, tmp_path / name, "t", seed=17))
    assert found[0] == found[1]
    assert limited.passes(len(rows) // 2) == 4.0  # so few rows that the limit is not reached
    assert limited.passes(len(rows) * 10) == pytest.approx(0.2)
    assert SETTINGS.passes(10**9) == 4.0


def test_a_run_that_stops_and_resumes_gives_the_same_weights(model: Any, rows: list[Encoded], tmp_path: Path) -> None:
    whole, history = _train(model, rows, tmp_path / "whole")
    mine = copy.deepcopy(model)
    inner, calls = training.cross_entropy(mine), 0

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 + (len(training.batches([len(r.ids) for r in rows], 256, 17, 4.0)) * 3) // 4:
            raise KeyboardInterrupt
        return inner(*args)

    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        training.train(mine, rows, rows[:6], SETTINGS, dies, tmp_path / "killed", "t", seed=17)
    assert (tmp_path / "killed/t.safetensors").is_file()
    resumed, second = _train(model, rows, tmp_path / "killed")
    assert second == history
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_best_weights_are_kept_and_patience_ends_the_run(model: Any, rows: list[Encoded], tmp_path: Path) -> None:
    mine = copy.deepcopy(model)
    wild = SETTINGS.model_copy(
        update={"learning_rate": 0.9, "patience": 1, "epochs": 16.0, "evaluations": 16, "warmup": 0.9}
    )
    history = training.train(mine, rows, rows[:6], wild, training.cross_entropy(mine), tmp_path, "t", seed=17)
    losses = [entry["validation_loss"] for entry in history]
    assert len(losses) < 8
    assert training.validation_loss(mine, rows[:6]) == pytest.approx(min(losses), rel=0.05)


def test_a_nan_loss_is_an_error_that_says_what_to_do(model: Any, rows: list[Encoded], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"the loss is nan at step 1 of \d+"):
        _train(model, rows, tmp_path / "nan", lambda hidden, *_: hidden.sum() * math.nan)

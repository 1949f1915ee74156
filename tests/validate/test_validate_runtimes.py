"""Greedy answers equal plain greedy decoding; likelihoods equal an independent computation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkout import DEFAULTS
from conftest import ROOMS, tiny_rows
from gguf_inputs import converted, quantized

from tasks import params
from tasks.errors import ArtifactError, ConfigError
from tasks.models import chat, loading
from tasks.quantize.stage import quantize
from tasks.runtimes import llama, onnx_genai
from tasks.selftest import llama as selftest_llama
from tasks.selftest import tiny
from tasks.validate import likelihood

LIMIT = 10


@pytest.fixture(scope="module")
def lively(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers differ: weights so large that every token sways the next."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(tiny_model_folder, tie_word_embeddings=False, initializer_range=0.3)
    out = tmp_path_factory.mktemp("lively")
    loading.save(LlamaForCausalLM(config), loading.load_tokenizer(tiny_model_folder), out)
    return out


class Wide(NamedTuple):
    """A random model with rows of 576 and 1536 weights, and the convert stage's output for it."""

    model: Any
    shape: tiny.Shape
    folder: Path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    folder, shape = tmp_path_factory.mktemp("wide"), tiny.SHAPES[0]
    model = tiny.model(shape)
    selftest_llama.write(model, shape, folder / "student.gguf")
    return Wide(model, shape, folder)


@pytest.fixture(scope="module")
def prompts(tiny_model_folder: Path) -> list[list[int]]:
    tokenizer = loading.load_tokenizer(tiny_model_folder)
    return [chat.prompt_ids(tokenizer, row["messages"][:-1]) for row in tiny_rows(ROOMS)]


def plain_greedy(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    """LIMIT tokens by the binding's own high-level class, one sequence and one token at a time.

    Flash attention is llama.cpp's default and that of its servers; this class alone has it off.
    """
    from llama_cpp import Llama

    runtime = Llama(str(file), n_ctx=256, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
    found = []
    for prompt in prompts:
        runtime.reset()
        runtime.eval(prompt)
        answer = []
        for _ in range(LIMIT):
            answer.append(runtime.sample(temp=0.0))
            runtime.eval(answer[-1:])
        found.append(answer)
    runtime.close()
    return found


@pytest.mark.parametrize("variant", ["q8_0", "q4_0", "q4_k_m"])
def test_a_file_as_wide_as_a_real_one_computes_what_torch_does(wide: Wide, tmp_path: Path, variant: str) -> None:
    """Rows of 576 and 1536 take kernels that those of the tiny model do not: tiles, and blocks of 256."""
    quantize(
        params.load(DEFAULTS), source=tmp_path, student=tmp_path, converted=wide.folder, variant=variant, out=tmp_path
    )
    file, ids = tmp_path / "model.gguf", tiny.tokens()
    wanted = tiny.reference(wide.model, selftest_llama.weights(file, wide.shape), ids)
    with llama.window_logits(file, len(ids), 2) as logits:
        tiny.disturb()
        whole = tiny.distance(logits(ids, 0), wanted[:-1])
    with llama.Session(file, threads=2, cells=64) as session:
        ones = [session.decode([token], [at], [0], [True])[0].copy() for at, token in enumerate(ids[:24])]
    one_by_one = tiny.distance(np.stack(ones), wanted[:24])
    for found in (whole, one_by_one):
        assert 0 < found.whole <= tiny.EIGHT_BITS.whole
        assert found.worst <= tiny.EIGHT_BITS.worst


def until(answers: list[list[int]], stops: list[int]) -> list[list[int]]:
    return [answer[: next((i for i, token in enumerate(answer) if token in stops), LIMIT)] for answer in answers]


TIE = 0.5  # of the spread of a token's logits: more than rounding turns round (0.15 seen), less than any other token lies below


def shortfalls(file: Path, prompts: list[list[int]], answers: list[list[int]], stops: list[int]) -> list[float]:
    """How far each answer's worst choice lies below the most likely token, one token at a time, in spreads of its logits.

    After an answer that is shorter than LIMIT the choice was one of `stops`.
    """
    found = []
    with llama.Session(file, threads=1, cells=256) as session:
        for prompt, answer in zip(prompts, answers, strict=True):
            session.clear()
            choices = [[token] for token in answer] + ([stops] if len(answer) < LIMIT else [])
            worst, fed = 0.0, prompt
            for at, choice in enumerate(choices, start=len(prompt)):
                positions = range(at - len(fed), at)
                logits = session.decode(fed, positions, [0] * len(fed), [i == at - 1 for i in positions])[0]
                worst = max(worst, float((logits.max() - logits[choice].max()) / logits.std()))
                fed = choice[:1]
            found.append(worst)
    return found


@pytest.mark.parametrize("variant", ["q8_0", "q5_1", "q5_0", "q4_k_m", "q4_0"])
def test_answers_are_those_of_plain_greedy_decoding(lively: Path, prompts: list[list[int]], variant: str) -> None:
    """All but what rounding decides, whatever the drafts; equal drafts give equal answers on any number of threads."""
    file = quantized(lively, variant) / "model.gguf"
    plain = plain_greedy(file, prompts)
    # Tokens from the middle of some answers: some stop early, others never.
    stops = [answer[5] for answer in plain[:8]]
    expected = until(plain, stops)
    assert 0 < sum(len(answer) < LIMIT for answer in expected) < len(expected)
    right = [[*answer, stops[0]] for answer in expected]
    wrong = [[7, stops[0]] for _ in expected]
    half = [[*answer[: i % 5], 7, 8, stops[0]] for i, answer in enumerate(expected)]
    for drafts in (right, wrong, half, [each[0] for each in zip(right, wrong, half, strict=True)][::-1]):
        counted: list[int] = []
        common = {"stops": stops, "limit": LIMIT}
        found = llama.answers(file, prompts, drafts, **common, threads=2, advance=counted.append)
        assert max(shortfalls(file, prompts, found, stops)) < TIE
        assert sum(counted) == len(prompts)
        assert found == llama.answers(file, prompts, drafts, **common, threads=1, advance=lambda _: None)
        assert not any(token in stops for answer in found for token in answer)
    other = [[7] * LIMIT for _ in expected]
    assert min(shortfalls(file, prompts, other, stops)) > 4 * TIE


@pytest.mark.parametrize("variant", ["q8_0", pytest.param("onnx-int4", marks=pytest.mark.slow)])
def test_an_answer_is_cut_where_no_end_can_make_it_right(lively: Path, prompts: list[list[int]], variant: str) -> None:
    folder = quantized(lively, variant)
    runtime, file = (onnx_genai, "model") if variant == "onnx-int4" else (llama, "model.gguf")
    common = {"stops": [2], "limit": LIMIT, "threads": 1, "advance": lambda _: None}
    whole = runtime.answers(folder / file, prompts, [[2]] * len(prompts), **common)

    def hopeless(row: int, answer: Sequence[int]) -> bool:
        return row % 2 == 0 and len(answer) >= 3

    cut = runtime.answers(folder / file, prompts, [[2]] * len(prompts), **common, hopeless=hopeless)
    assert cut == [answer[: LIMIT if row % 2 else 3] for row, answer in enumerate(whole)]


def test_more_rows_than_slots_and_a_lone_row(lively: Path, prompts: list[list[int]]) -> None:
    file = quantized(lively, "q8_0") / "model.gguf"
    many = [prompt[: len(prompt) - i % 3] for i, prompt in enumerate(prompts * 3)]
    common = {"stops": [2], "limit": LIMIT, "threads": 1, "advance": lambda _: None}
    found = llama.answers(file, many, [[2]] * len(many), **common)
    alone = [llama.answers(file, [prompt], [[2]], **common)[0] for prompt in many[:6]]
    for answers in (found[:6], alone):
        assert max(shortfalls(file, many[:6], answers, [2])) < TIE
    assert len(found) == len(many)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2], [1, 2, 3]], 1), ([[1], [2]], 0), ([[5]], 0)],
)
def test_the_shared_beginning_leaves_a_token_of_each_prompt(prompts: list[list[int]], shared: int) -> None:
    assert llama._common_prefix(prompts) == shared


# --- likelihood ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tiny_model_folder: Path) -> list[int]:
    tokenizer = loading.load_tokenizer(tiny_model_folder)
    return [id for row in tiny_rows(ROOMS) for id in tokenizer.apply_chat_template(row["messages"], return_dict=False)]


def compared(reference: Path, file: Path, windows: list[list[int]], threads: int) -> likelihood.Likelihood:
    import torch

    torch.set_num_threads(threads)
    context = len(windows[0])
    with (
        llama.window_logits(reference, context, threads) as base,
        llama.window_logits(file, context, threads) as ours,
    ):
        return likelihood.compare(base, ours, windows)


def test_perplexity_and_kld_are_those_of_the_definition(tiny_model_folder: Path, text: list[int]) -> None:
    """The same numbers from transformers' logits in float64, written down from the definition."""
    import torch

    model = loading.load_model(tiny_model_folder, "float32").to("cpu")
    halved = loading.load_model(tiny_model_folder, "float32").to("cpu")
    with torch.no_grad():
        halved.model.norm.weight.mul_(0.5)
    windows = likelihood.split(text, 96, 3, None)

    def by_transformers(of: object) -> likelihood.WindowLogits:
        return lambda window, first: of(torch.tensor([window])).logits[0, first:-1].detach().numpy()

    with llama.window_logits(converted(tiny_model_folder) / "student.gguf", 96, 1) as base, torch.no_grad():
        found = likelihood.compare(base, by_transformers(halved), windows)
        nll, base_nll, kld, same = [], [], [], []
        for window in windows:
            p = model(torch.tensor([window])).logits[0, 48:-1].double().log_softmax(-1)
            q = halved(torch.tensor([window])).logits[0, 48:-1].double().log_softmax(-1)
            target = torch.tensor(window[49:])[:, None]
            nll.append(-q.gather(1, target))
            base_nll.append(-p.gather(1, target))
            kld.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).double())
    assert found.tokens == 3 * 47
    assert found.perplexity == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(torch.cat(base_nll).mean().exp().item(), rel=1e-3)
    assert found.mean_kld == pytest.approx(torch.cat(kld).mean().item(), rel=1e-2)
    assert found.same_top_token == pytest.approx(torch.cat(same).mean().item(), abs=0.02)


def test_a_file_does_not_differ_from_itself(tiny_model_folder: Path, text: list[int]) -> None:
    f16 = converted(tiny_model_folder) / "student.gguf"
    found = compared(f16, f16, likelihood.split(text, 128, 2, None), 1)
    assert (found.mean_kld, found.same_top_token) == (0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


@pytest.mark.parametrize("variant", ["q8_0", "q4_0"])
def test_the_number_of_threads_changes_nothing(tiny_model_folder: Path, text: list[int], variant: str) -> None:
    f16, file = converted(tiny_model_folder) / "student.gguf", quantized(tiny_model_folder, variant) / "model.gguf"
    windows = likelihood.split(text, 512, 2, None)
    first, *others = (compared(f16, file, windows, threads) for threads in (1, 2, 3))
    assert first.mean_kld > 0
    assert others == [first, first]


def test_windows_do_not_overlap_and_begin_with_bos() -> None:
    tokens = list(range(100, 150))
    assert likelihood.split(tokens, 20, 9, None) == [tokens[:20], tokens[20:40]]
    assert likelihood.split(tokens, 20, 1, 1) == [[1, *tokens[1:20]]]


def test_a_short_text_makes_one_shorter_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert likelihood.split(list(range(30)), 512, 4, None) == [list(range(30))]
    assert "30 tokens" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"acquire\.data\.text"):
        likelihood.split([1, 2, 3], 512, 4, None)


def test_infinite_perplexity_is_no_crash() -> None:

    logits = np.zeros((7, 50), np.float32)
    logits[:, 0] = 2000.0
    found = likelihood.compare(lambda *_: logits * 0, lambda *_: logits, [list(range(16))])
    assert math.isinf(found.perplexity)


def test_a_damaged_file_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match=r"model\.gguf: llama\.cpp .*: .+"):
        llama.Session(tmp_path / "model.gguf", threads=1, cells=32)
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ArtifactError, match="onnx: ONNX Runtime GenAI"):
        onnx_genai.load(tmp_path / "onnx", 1)

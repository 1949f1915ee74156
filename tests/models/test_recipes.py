"""Recipes: what they set is known and differs, and models like theirs go the whole way and answer alike everywhere."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import DEFAULTS, ROOT
from conftest import ROOMS, tiny_rows, write_jsonl
from recipe_models import GEMMA_PLACE, MAKERS, TURNS

from tasks import params
from tasks.convert import windows
from tasks.convert.stage import convert
from tasks.distill.stage import distill
from tasks.errors import ArtifactError, ConfigError
from tasks.finetune.stage import finetune
from tasks.frame import stage
from tasks.models import chat, loading
from tasks.package import parity, prompt_format
from tasks.package.stage import _context
from tasks.prune.stage import prune
from tasks.quantize import gguf_auto, sensitivity
from tasks.quantize.stage import quantize
from tasks.runtimes import llama
from tasks.stages import STAGES
from tasks.teach.stage import teach

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MODELS = [recipe for recipe in RECIPES if "model" in yaml.safe_load(recipe.read_text())["acquire"]]
TALK = [
    {"role": "system", "content": "Reply with one JSON action."},
    {"role": "user", "content": "turn on the lamp"},
    {"role": "assistant", "content": '{"action": "lamp"}'},
    {"role": "user", "content": "and lock the door"},
    {"role": "assistant", "content": '{"action": "door"}'},
]
ENDS = {"qwen3": "<|im_end|>", "phi-4": "<|end|>", "gemma3": "<end_of_turn>"}


# --- the files ---------------------------------------------------------------------------------------


def values(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key path of a recipe with its value; a source stands as a whole."""
    for key, value in node.items():
        if isinstance(value, dict) and "source" not in value:
            yield from values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_a_model_like_each_is_tried() -> None:
    """SmolLM2 itself goes through `make run` and most other tests."""
    families = ("smollm2", *MAKERS)
    assert {next(name for name in families if recipe.stem.startswith(name)) for recipe in MODELS} == set(families)


@pytest.mark.parametrize("recipe", MODELS, ids=lambda recipe: recipe.stem)
def test_a_recipe_needs_nothing_but_its_commit(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 problem:\n  acquire\.model\.revision: missing"):
        params.load(DEFAULTS, params.expanded([f"@{recipe}"]))
    made = params.load(DEFAULTS, [*params.expanded([f"@{recipe}"]), f"acquire.model.revision={'a' * 40}"])
    assert made.acquire.model.source == "hub"
    command = re.search(r"git ls-remote https://huggingface\.co/(\S+) HEAD", recipe.read_text())
    assert command
    assert command[1] == made.acquire.model.repo


def test_a_quick_run_needs_nothing_and_releases_nothing_of_the_whole_ones() -> None:
    whole, quick = (
        params.load(DEFAULTS, params.expanded(given)) for given in ([], [f"@{ROOT / 'recipes/quick.yaml'}"])
    )
    assert quick.acquire.model == whole.acquire.model
    assert quick.package.name != whole.package.name


@pytest.mark.parametrize("recipe", MODELS, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_only_what_differs(recipe: Path) -> None:
    defaults = dict(values(yaml.safe_load(DEFAULTS.read_text())))
    same = [key for key, value in values(yaml.safe_load(recipe.read_text())) if defaults.get(key) == value]
    assert not same


# --- models like theirs ------------------------------------------------------------------------------


def raw_params(model: Path, root: Path) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load(DEFAULTS.read_text())
    (root / "data").mkdir(parents=True)
    shutil.copytree(model, root / "data" / "model")
    for split, rooms in {"train": ROOMS[:6], "validation": ROOMS[6:8], "test": ROOMS[8:]}.items():
        write_jsonl(root / "data" / "rows" / f"{split}.jsonl", tiny_rows(rooms))
    raw["acquire"] |= {
        "model": {"source": "local", "path": "data/model"}, "data": {"source": "local", "path": "data/rows"},
        "near_duplicate": 1.0,
    }  # fmt: skip
    few = {"epochs": 0.4, "batch_tokens": 512, "evaluations": 1, "precision": "fp32"}
    raw["finetune"] |= few
    raw["distill"] |= few
    raw["prune"] |= {"calibration_rows": 4, "candidates": 2}
    raw["teach"] |= {"unlabelled_rows": 0}
    raw["task"]["max_new_tokens"] = 16
    return raw


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory, real_tokenizer_folder: Path) -> dict[str, Path]:
    """A model of each family, as its repository would hold it."""
    home = tmp_path_factory.mktemp("families")
    texts = [message["content"] for row in tiny_rows(ROOMS) for message in row["messages"]]
    for family, maker in MAKERS.items():
        maker(texts if family == "gemma3" else real_tokenizer_folder, home / family)
    return {family: home / family for family in MAKERS}


@pytest.fixture(scope="session", params=MAKERS)
def made(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's model after acquire, two steps of training, distillation, conversion and q8_0."""
    root = tmp_path_factory.mktemp(request.param)
    raw = raw_params(originals[request.param], root)
    raw["prune"] |= {"max_parameters": 0.999, "block_share": 1.0}  # one block goes
    checked, build = params.check(raw, "test"), root / "build"
    stage.run(STAGES["acquire"], STAGES, checked, root)
    for name in ("finetune", "teach", "prune", "distill", "convert", "q8_0", "scratch", "scratch-teach"):
        (build / name).mkdir(parents=True)
    source, teacher, student = (build / name for name in ("acquire", "finetune", "distill"))
    finetune(checked, source=source, out=teacher, scratch=build / "scratch")
    taught, pruned = build / "teach", build / "prune"
    teach(checked, source=source, teacher=teacher, out=taught, scratch=build / "scratch-teach")
    prune(checked, source=source, teacher=teacher, out=pruned)
    distill(checked, source=source, taught=taught, pruned=pruned, seed=17, out=student, scratch=build / "scratch")
    convert(checked, teacher=teacher, student=student, out=build / "convert")
    quantize(checked, source=source, student=student, converted=build / "convert", variant="q8_0", out=build / "q8_0")
    return root


def family(made: Path) -> str:
    return next(name for name in MAKERS if made.name.startswith(name))


def loss_of_choice(model: Any, prompt: list[int], said: list[int]) -> float:
    """How far below the best logit, in standard deviations, what was said lies at worst."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    behind = logits.max(-1).values - logits[range(len(said)), said]
    return float((behind / logits.std(-1)).max()) if said else 0.0


@pytest.mark.parametrize(("file", "within"), [("convert/teacher.gguf", 0.05), ("q8_0/model.gguf", 0.3)])
def test_llama_cpp_answers_as_transformers_does(made: Path, file: str, within: float) -> None:
    folder = made / "build" / ("finetune" if "teacher" in file else "distill") / "model"
    model, tokenizer = loading.load_model(folder, "float32"), loading.load_tokenizer(folder)
    rows = chat.encode_all(tokenizer, chat.read_rows(made / "build/acquire/data/test.jsonl"), 999)
    prompts, drafts = ([row.ids[part(row)] for row in rows] for part in (before, after))
    stops = loading.stop_ids(folder, tokenizer)
    said = llama.answers(
        made / "build" / file, prompts, drafts, stops=stops, limit=24, threads=2, advance=lambda _: None
    )
    assert all(said)
    assert max(loss_of_choice(model, prompt, answer) for prompt, answer in zip(prompts, said, strict=True)) < within


def test_every_matrix_gets_a_type_of_its_own_choice(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused matrices and scaled embeddings, too: names of transformers' modules and of GGUF tensors are one table."""
    monkeypatch.setattr(
        gguf_auto, "BLOCKS_OF_32", ("q4_0", "q5_0", "q8_0")
    )  # without the one that takes most of the time
    build = made / "build"
    checked = params.load(DEFAULTS)
    sources = {"source": build / "acquire", "student": build / "distill", "converted": build / "convert"}
    out = build / "auto"
    out.mkdir()
    quantize(checked, **sources, variant="auto-q4_0", out=out)
    shape = gguf_auto._shape(build / "convert" / "student.gguf")
    names = set(
        sensitivity.tensor_names(loading.load_model(build / "distill/model", "float32"), shape.architecture).values()
    )
    assert names == {tensor.name for tensor in shape.tensors if tensor.matrix}
    told = json.loads((out / "types.json").read_text())
    assert set(told["types"]) == names
    assert 0 < told["foreseen_kld"] < 1


def before(row: chat.Encoded) -> slice:
    return slice(row.answer_start)


def after(row: chat.Encoded) -> slice:
    return slice(row.answer_start, None)


def test_what_is_learned_is_each_answer_and_the_end_of_its_turn(made: Path) -> None:
    folder = made / "build/distill/model"
    tokenizer = loading.load_tokenizer(folder)
    row = chat.encode(tokenizer, TALK, 999)
    learned = "".join(tokenizer.decode([i]) if wanted else "|" for i, wanted in zip(row.ids, row.target, strict=True))
    end = ENDS[family(made)]
    assert re.sub(r"\|{2,}", "||", learned) == f'||{{"action": "lamp"}}{end}||{{"action": "door"}}{end}'
    for cut in (2, 4):
        prompt = chat.prompt_ids(tokenizer, TALK[:cut])
        assert row.ids[: len(prompt)] == prompt
    assert tokenizer.convert_tokens_to_ids(end) in loading.stop_ids(folder, tokenizer)
    assert "<think>" not in tokenizer.decode(row.ids)  # what a server asks by default: a prompt without thoughts


def test_the_packaged_file_sees_the_prompts_and_stops(made: Path) -> None:
    folder, file = made / "build/distill/model", made / "build/q8_0/model.gguf"
    tokenizer, runtime = loading.load_tokenizer(folder), llama.prompt_reader(file)
    assert parity.check(folder, tokenizer, runtime, file, [TALK[:-1]]) == len(parity.CONVERSATIONS) + 1
    assert parity.needs_composed(tokenizer, runtime) == (family(made) == "qwen3")
    # Gemma's trims texts and has no system turn: only Jinja renders it.
    assert (prompt_format.probe(tokenizer, parity.CONVERSATIONS.values()) is None) == (family(made) == "gemma3")


# --- one by one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["gemma3"], indirect=True)
def test_pruned_gemma_keeps_its_windows(made: Path) -> None:
    """llama.cpp would take the sixth block for the one that sees everything, wherever pruning has put it."""
    from gguf import GGUFReader

    config = loading.load_config(made / "build/distill/model")
    wanted = [kind == "sliding_attention" for kind in config["layer_types"]]
    assert windows.moved(config) == wanted
    assert windows.moved(loading.load_config(made / "build/finetune/model")) is None
    key = "gemma3.attention.sliding_window_pattern"
    assert GGUFReader(made / "build/q8_0/model.gguf").fields[key].contents() == wanted
    assert key not in GGUFReader(made / "build/convert/teacher.gguf").fields


@pytest.mark.parametrize("made", ["phi-4"], indirect=True)
def test_many_answers_side_by_side_are_no_long_text_to_phi(made: Path) -> None:
    """llama.cpp turns to the rotary embedding for long texts by the size of the whole cache."""
    file, folder = made / "build/q8_0/model.gguf", made / "build/distill/model"
    tokenizer = loading.load_tokenizer(folder)
    row = chat.encode(tokenizer, TALK, 999)
    assert llama.first_context(file) == 4096 < llama.SLOTS * 200
    few, many = (
        llama.answers(
            file,
            [row.ids[before(row)]],
            [row.ids[after(row)]],
            stops=[],
            limit=limit,
            threads=2,
            advance=lambda _: None,
        )[0]
        for limit in (8, 200)
    )
    assert many[:8] == few


def test_phi_is_not_packaged_for_the_other_rotary_embedding() -> None:
    told = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert _context(8192, told) == 4096
    assert _context(2048, told) == 2048
    assert _context(8192, {"max_position_embeddings": 2048}) == 2048
    assert _context(8192, {}) == 8192


@pytest.mark.parametrize("made", ["phi-4"], indirect=True)
def test_what_names_code_is_left_behind(made: Path) -> None:
    assert "auto_map" in loading.load_config(made / "data/model")
    assert "auto_map" not in loading.load_config(made / "build/acquire/model")


def test_a_row_with_a_token_that_the_model_cannot_embed_is_named(originals: dict[str, Path], tmp_path: Path) -> None:
    raw = raw_params(originals["gemma3"], tmp_path)
    path = tmp_path / "data" / "rows" / "train.jsonl"
    path.write_text(path.read_text().replace("the lamp in the kitchen", f"the {GEMMA_PLACE} in the kitchen"))
    with pytest.raises(ConfigError, match=rf"train\.jsonl:1: .*'{GEMMA_PLACE}'"):
        stage.run(STAGES["acquire"], STAGES, params.check(raw, "test"), tmp_path)


def test_gemma_without_its_vocabulary_is_refused_before_hours_of_training(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    raw = raw_params(originals["gemma3"], tmp_path)
    (tmp_path / "data" / "model" / "tokenizer.model").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.model .*acquire\.model\.source"):
        stage.run(STAGES["acquire"], STAGES, params.check(raw, "test"), tmp_path)


def test_a_template_that_refuses_a_talk_has_the_eos_token_for_an_end(originals: dict[str, Path]) -> None:
    tokenizer = loading.load_tokenizer(originals["gemma3"])
    assert tokenizer.convert_ids_to_tokens(chat.end_of_turn(tokenizer)) == "<end_of_turn>"
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert chat.end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = TURNS.replace("<end_of_turn>", "")
    assert chat.end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_a_lost_vocabulary_is_seen_by_the_converter_alone(made: Path) -> None:
    """What stages hand on: the converter's files are there, and control tokens are told from words."""
    folder = made / "build/distill/model"
    told = json.loads((folder / "tokenizer_config.json").read_text())
    if family(made) == "gemma3":
        assert (folder / "tokenizer.model").read_bytes() == (made / "data/model/tokenizer.model").read_bytes()
        special = {entry["content"] for entry in told["added_tokens_decoder"].values() if entry["special"]}
        assert {"<start_of_turn>", "<end_of_turn>"} <= special
        assert "\n" not in special
    else:
        assert not (folder / "tokenizer.model").exists()
        assert (told["tokenizer_class"] == "GPT2Tokenizer") == (family(made) == "phi-4")

"""Distillation: exact KL, importance by measurement, the lossless draft, and the reports."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOMS, tiny_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tasks import params
from tasks.distill.objective import distillation, forward_kl
from tasks.distill.params import Distill
from tasks.distill.stage import distill
from tasks.errors import ArtifactError, ConfigError
from tasks.finetune.stage import finetune
from tasks.frame import manifest
from tasks.learning import generation, packing, training
from tasks.learning.params import Training
from tasks.learning.targets import read_targets, write_targets
from tasks.models import chat, loading
from tasks.models.scoring import METRICS
from tasks.prune import blockwise
from tasks.prune.blocks import remove
from tasks.prune.blockwise import prune
from tasks.prune.params import Prune
from tasks.prune.plan import planned
from tasks.prune.stage import prune as prune_stage
from tasks.prune.width import narrow
from tasks.select.params import Select
from tasks.select.stage import select
from tasks.teach.stage import teach


@pytest.fixture(scope="module")
def source(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acquired")
    (folder / "model").symlink_to(tiny_model_folder)
    for split, rooms in {"train": ROOMS[:6], "validation": ROOMS[6:8], "test": ROOMS[:4]}.items():
        write_jsonl(folder / f"data/{split}.jsonl", tiny_rows(rooms))
    prompts = [{"messages": row["messages"][:-1]} for row in tiny_rows(ROOMS[:3])]
    write_jsonl(folder / "data/unlabelled.jsonl", prompts)
    return folder


@pytest.fixture
def values(tiny_params: dict) -> params.Params:
    tiny_params["finetune"] |= {"epochs": 45.0}
    tiny_params["teach"] |= {"unlabelled_rows": 9}
    tiny_params["distill"] |= {"epochs": 8.0, "learning_rate": 3.0e-3, "control": True}
    return params.check(tiny_params, "tiny")


@pytest.fixture(scope="module")
def learned(source: Path) -> Any:
    """The tiny model, trained until it knows its training rows."""
    model, tokenizer = loading.load_model(source / "model", "float32"), loading.load_tokenizer(source / "model")
    rows = chat.encode_all(tokenizer, chat.read_rows(source / "data/train.jsonl"), 128)
    settings = Training(epochs=30.0, learning_rate=5e-3, batch_tokens=256, evaluations=1, freeze_embeddings=False)
    scratch = source / "scratch"
    scratch.mkdir()
    training.train(model, rows, rows[:4], settings, training.cross_entropy(model), scratch, "t", seed=17)
    return loading.cast(model, torch.float32), tokenizer, rows  # bf16 rounds near-ties differently from shape to shape


def test_kl_with_all_tokens_listed_is_the_true_kl_and_zero_for_equals() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(7, 40).log_softmax(-1), torch.randn(7, 40).log_softmax(-1)
    true = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), true, atol=1e-4, rtol=1e-4)
    top = teacher.topk(5).indices
    assert forward_kl(teacher.gather(-1, top), teacher.gather(-1, top)).abs().max() < 1e-5


def test_kl_over_the_tail_is_a_lower_bound_that_grows_with_k() -> None:
    torch.manual_seed(1)
    teacher, student = torch.randn(7, 40).log_softmax(-1), torch.randn(7, 40).log_softmax(-1)
    order = teacher.argsort(descending=True)
    by_k = [forward_kl(student.gather(-1, order[:, :k]), teacher.gather(-1, order[:, :k])) for k in (2, 8, 40)]
    assert (by_k[0] <= by_k[1] + 1e-5).all()
    assert (by_k[1] <= by_k[2] + 1e-5).all()


def test_cached_targets_are_the_teachers_distribution(learned: Any, tmp_path: Path) -> None:
    model, _, rows = learned
    write_targets(model, rows, {1, 3}, tmp_path / "t.safetensors", top_k=4, temperature=1.0)
    lookup = read_targets(tmp_path / "t.safetensors", model.device)
    ids, predicts = torch.tensor([rows[3].ids]), torch.tensor(rows[3].target[1:])
    with torch.no_grad():
        want = model(input_ids=ids).logits[0, :-1][predicts].float().log_softmax(-1).topk(4)
        states = model.get_decoder()(input_ids=ids).last_hidden_state[0, :-1][predicts]
    tokens, logs, hidden = lookup([3])
    with pytest.raises(ArtifactError, match=r"t\.safetensors .*row 2\b"):
        lookup([1, 2])
    torch.testing.assert_close(hidden.float(), states, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(logs, want.values, atol=1e-3, rtol=1e-3)
    assert (tokens[:, 0] == want.indices[:, 0]).all()


def test_a_student_that_is_its_teacher_has_nothing_left_to_learn(learned: Any, tmp_path: Path) -> None:
    model, _, rows = learned
    settings = Distill(epochs=1.0, learning_rate=1e-3, soft_weight=1.0)
    write_targets(model, rows, range(len(rows)), tmp_path / "t.safetensors", top_k=32, temperature=2.0)
    objective = distillation(model, read_targets(tmp_path / "t.safetensors", model.device), settings, 2.0)
    packed = packing.pack(rows[:3], model.device)
    with torch.no_grad():
        states = training.target_states(model, packed)
        assert objective(states, packed.labels, [0, 1, 2]) < 1e-3
        assert objective(states + torch.randn_like(states), packed.labels, [0, 1, 2]) > 0.1
        assert objective(states, packed.labels, [2, 1, 0]) > 1e-2  # as many targets, of other rows


def test_the_least_important_block_goes_first_and_every_removal_is_scored_again(learned: Any, tmp_path: Path) -> None:
    model, _, rows = learned
    import copy

    mine = copy.deepcopy(model)
    with torch.no_grad():  # block 2 becomes the identity: nothing depends on it
        mine.get_decoder().layers[2].self_attn.o_proj.weight.zero_()
        mine.get_decoder().layers[2].mlp.down_proj.weight.zero_()
    reference = copy.deepcopy(mine)
    block = sum(p.numel() for p in mine.get_decoder().layers[0].parameters()) / loading.count(mine)
    settings = Prune(max_parameters=1 - 2 * block, block_share=1.0, candidates=4)
    history = prune(mine, rows[:6], [], settings)["blocks"]
    assert history[0]["block"] == 2
    assert history[0]["influence"] < 1e-4
    assert len(history) == 2
    assert mine.config.num_hidden_layers == 2
    for entry in history:  # the reported loss is the loss of the model that was kept
        remove(reference, entry["position"])
        assert training.validation_loss(reference, rows[:6]) == pytest.approx(entry["loss"], rel=2e-2)


def test_what_a_removed_block_added_is_made_good(learned: Any, tmp_path: Path) -> None:
    """A block whose work is linear in the MLP before it can go without any loss; a rerun makes the same student."""
    import copy

    model, _, rows = learned
    mine = copy.deepcopy(model)
    blocks = mine.get_decoder().layers
    with torch.no_grad():  # block 2 adds nothing of its own; block 1 holds what both did
        blocks[2].self_attn.o_proj.weight.zero_()
        blocks[2].mlp.down_proj.weight.zero_()
        whole = blocks[1].mlp.down_proj.weight.clone()
        want = training.validation_loss(mine, rows)
    hooked = copy.deepcopy(mine)
    with torch.no_grad():  # now block 2 does half of block 1's work, read from block 1's inner layer
        hooked.get_decoder().layers[1].mlp.down_proj.weight.copy_(whole / 2)
    held: list[Any] = []
    hooked.get_decoder().layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    hooked.get_decoder().layers[2].register_forward_hook(lambda _, args, out: out + held.pop() @ (whole / 2).T)
    assert training.validation_loss(hooked, rows) == pytest.approx(want, rel=1e-4)
    change = blockwise._stand_in(blockwise._Ready(hooked, rows), 2)
    held.clear()
    blocks[1].mlp.down_proj.weight.data = whole / 2 + change
    remove(mine, 2)
    assert training.validation_loss(mine, rows) == pytest.approx(want, rel=0.2)

    block = sum(p.numel() for p in model.get_decoder().layers[0].parameters()) / loading.count(model)
    settings = Prune(max_parameters=1 - 2 * block, block_share=1.0, candidates=2)
    first, again = copy.deepcopy(model), copy.deepcopy(model)
    history = prune(first, rows[:6], rows, settings)["blocks"]
    assert all(entry["loss_made_good"] <= entry["loss"] for entry in history)
    assert any(entry["loss_made_good"] < entry["loss"] for entry in history)
    assert training.validation_loss(first, rows[:6]) == pytest.approx(history[-1]["loss_made_good"], rel=2e-2)
    assert prune(again, rows[:6], rows, settings)["blocks"] == history
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_channels_that_the_output_does_not_need_go_first_and_the_others_take_over(learned: Any, tmp_path: Path) -> None:
    """Half of the channels are noise that nothing reads, or a copy of another one: the narrow model is the same model."""
    import copy

    model, _, rows = learned
    wide = copy.deepcopy(model)
    inner = wide.config.intermediate_size
    with torch.no_grad():
        for layer in wide.get_decoder().layers:
            mlp = layer.mlp
            quarter = inner // 4
            mlp.down_proj.weight[:, :quarter] = 0  # noise
            for name in ("gate_proj", "up_proj"):  # the second quarter says again what the third says
                getattr(mlp, name).weight[quarter : 2 * quarter] = getattr(mlp, name).weight[2 * quarter : 3 * quarter]
    before = training.validation_loss(wide, rows)
    lost = narrow(wide, rows, inner // 2)
    assert max(lost) < 0.02
    assert training.validation_loss(wide, rows) == pytest.approx(before, rel=0.05)
    assert all(layer.mlp.up_proj.weight.shape[0] == inner // 2 for layer in wide.get_decoder().layers)
    assert wide.config.intermediate_size == inner // 2


def test_a_narrowed_student_is_made_again_and_loads_from_disk(learned: Any, tmp_path: Path) -> None:
    import copy

    model, tokenizer, rows = learned
    settings = Prune(max_parameters=0.98, block_share=0.0)
    first, again = copy.deepcopy(model), copy.deepcopy(model)
    found = prune(first, rows[:6], rows, settings)
    assert found["blocks"] == []
    assert found["channels"]["kept"] < found["channels"]["of"] == model.config.intermediate_size
    assert loading.count(first) <= 0.98 * loading.count(model)
    assert prune(again, rows[:6], rows, settings) == found
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    loading.save(first, tokenizer, tmp_path / "saved")
    loaded = loading.load_model(tmp_path / "saved", "bfloat16")
    assert training.validation_loss(loaded, rows) == pytest.approx(
        training.validation_loss(loading.cast(first, torch.bfloat16), rows), rel=1e-3
    )


@given(
    share=st.floats(0.3, 1.0), block_share=st.floats(0, 1), layers=st.integers(2, 60), hidden=st.integers(64, 4096),
    ratio=st.floats(1.5, 6), embedding=st.integers(1000, 200_000),
)  # fmt: skip
def test_what_is_planned_to_go_reaches_the_target_and_no_more_than_it_must(
    share: float, block_share: float, layers: int, hidden: int, ratio: float, embedding: int
) -> None:
    inner, channel = int(hidden * ratio) // 32 * 32, 3 * hidden
    block = inner * channel + 4 * hidden * hidden
    total = layers * block + embedding * hidden
    settings = Prune(max_parameters=share, block_share=block_share)
    gone, kept = planned(settings, total, layers, block, inner, channel)
    if gone >= layers:
        return  # refused: the embedding alone is too large
    left = total - gone * block - (layers - gone) * (inner - kept) * channel
    assert left <= share * total * (1 + 1e-9)
    assert kept == inner or kept % 32 == 0
    wide = left + (block if kept == inner else (layers - gone) * 32 * channel)
    assert wide > share * total * (1 - 1e-9) or gone == round(total * (1 - share) * block_share / block)


def test_a_target_below_the_embeddings_is_refused(learned: Any, tmp_path: Path) -> None:
    settings = Prune(max_parameters=0.1)
    with pytest.raises(ConfigError, match=r"prune\.max_parameters is 0\.1"):
        prune(learned[0], learned[2][:2], [], settings)


@pytest.mark.parametrize("limit", [24, 5])  # 5: fewer than any reference has
def test_drafted_answers_are_those_of_plain_greedy_decoding(learned: Any, source: Path, limit: int) -> None:
    model, tokenizer, _ = learned
    rows = chat.read_rows(source / "data/train.jsonl") + [row["messages"] for row in tiny_rows(ROOMS[6:])]
    random.Random(0).shuffle(rows)
    encoded = chat.encode_all(tokenizer, rows, 128)
    references = [row[-1]["content"] for row in rows]
    stops = loading.stop_ids(source / "model", tokenizer)
    metric = METRICS["json"]
    drafted = generation.answers(model, tokenizer, encoded, references, stops, limit, metric, "test")
    for row, answer, reference in zip(rows, drafted, references, strict=True):
        ids = torch.tensor([chat.prompt_ids(tokenizer, row[:-1])])
        plain = model.generate(ids, do_sample=False, max_new_tokens=limit, eos_token_id=stops, pad_token_id=stops[0])
        text = tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == text or (text.startswith(answer) and not metric.possible(answer, reference))


def prepared(values: params.Params, source: Path, teacher: Path, place: Path) -> tuple[Path, Path]:
    """What `teach` and `prune` make."""
    for name in ("taught", "pruned", "taught-scratch"):
        (place / name).mkdir()
    teach(values, source=source, teacher=teacher, out=place / "taught", scratch=place / "taught-scratch")
    prune_stage(values, source=source, teacher=teacher, out=place / "pruned")
    return place / "taught", place / "pruned"


def student_of(
    values: params.Params, source: Path, taught: Path, pruned: Path, seed: int, out: Path
) -> dict[str, float]:
    scratch = out.with_name(f"{out.name}-scratch")
    out.mkdir()
    scratch.mkdir()
    return distill(values, source=source, taught=taught, pruned=pruned, seed=seed, out=out, scratch=scratch)


def test_the_chain_from_source_to_student(source: Path, values: params.Params, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "s1").mkdir()
    finetune(values, source=source, out=tmp_path / "teacher", scratch=tmp_path / "s1")
    taught, pruned = prepared(values, source, tmp_path / "teacher", tmp_path)
    metrics = student_of(values, source, taught, pruned, 17, tmp_path / "student")
    report = json.loads((tmp_path / "student/models.json").read_text())
    assert set(report) == {"base", "pruned", "distilled", "teacher", "control"}
    assert report["teacher"]["accuracy"] > 0.9
    assert report["distilled"]["parameters"] <= values.prune.max_parameters * report["teacher"]["parameters"]
    assert report["distilled"]["accuracy"] >= report["base"]["accuracy"]
    assert metrics["accuracy"] == report["distilled"]["accuracy"]
    lines = (tmp_path / "student/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 12
    student = loading.load_model(tmp_path / "student/model", "bfloat16")
    assert student.config.num_hidden_layers == report["distilled"]["layers"] <= 4
    teacher = loading.load_config(tmp_path / "teacher/model")
    assert student.config.intermediate_size < teacher["intermediate_size"]


def test_finetune_switched_off_hands_the_model_on(source: Path, tiny_params: dict, tmp_path: Path) -> None:
    tiny_params["finetune"]["enabled"] = False
    (tmp_path / "out").mkdir()
    finetune(params.check(tiny_params, "tiny"), source=source, out=tmp_path / "out", scratch=tmp_path)
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == (source / "model/model.safetensors").read_bytes()


def test_models_with_different_vocabularies_are_not_distilled(tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model_folder, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"<\|new\|>"):
        loading.check_same_vocabulary(tiny_model_folder, tmp_path / "other")
    with pytest.raises(ArtifactError, match="49152 rows"):
        loading.check_same_vocabulary(tmp_path / "other", tmp_path / "other")


def test_of_several_students_the_one_that_validates_best_goes_on(tiny_params: dict, tmp_path: Path) -> None:
    tiny_params["select"] = {"seeds": [1, 2, 3]}
    for seed, loss, right in ((1, 0.3, 0.9), (2, 0.1, 0.7), (3, 0.2, 0.8), (4, 0.05, 1.0)):  # 4: of an earlier run
        student = tmp_path / "students" / str(seed)
        (student / "model").mkdir(parents=True)
        (student / "model" / "model.safetensors").write_text(f"weights of {seed}")
        metrics = {"validation_loss": loss, "accuracy": right}
        manifest.write(student, stage="distill", params="", inputs={}, measured=(), metrics=metrics)
    (tmp_path / "out").mkdir()
    metrics = select(params.check(tiny_params, "tiny"), students=tmp_path / "students", out=tmp_path / "out")
    assert (tmp_path / "out/model/model.safetensors").read_text() == "weights of 2"
    assert (metrics["seed"], metrics["accuracy"], metrics["accuracy_mean"]) == (2, 0.7, pytest.approx(0.8))
    assert metrics["accuracy_sd"] == pytest.approx(0.1)
    told = json.loads((tmp_path / "out/students.json").read_text())
    assert [each["seed"] for each in told if each["chosen"]] == [2]
    assert not (tmp_path / "out/manifest.json").exists()  # the stage writes its own


@pytest.mark.slow
def test_a_seed_makes_a_student_of_its_own(source: Path, values: params.Params, tmp_path: Path) -> None:
    weights = []
    values = values.model_copy(update={"select": Select(seeds=(1, 2))})
    taught, pruned = prepared(values, source, source, tmp_path)
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        student_of(values, source, taught, pruned, seed, tmp_path / name)
        weights.append((tmp_path / name / "model/model.safetensors").read_bytes())
    assert weights[0] == weights[2] != weights[1]


def test_no_block_of_a_smollm3_goes_as_llama_cpp_tells_them_by_their_places(tmp_path: Path) -> None:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    settings = Prune(max_parameters=0.9, block_share=1.0)
    with pytest.raises(ConfigError, match=r"prune\.max_parameters to 1\.0"):
        prune(SmolLM3ForCausalLM(config), [], [], settings)

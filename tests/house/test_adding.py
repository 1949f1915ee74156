"""docs/adding.md is true: a checkout in which the page was followed word for word has all six additions, and they work."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from checkout import PROFILES, ROOT
from conftest import ROOMS, tiny_rows
from package_inputs import digits_apart

from tasks.models import chat, loading

PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
COPIED = ("tasks", "flows", "tests", "docs", "params.yaml", "dvc.yaml", "pyproject.toml")
BLOCK = re.compile(r"^## (?P<title>[^\n]*)$|^(?P<fence>`{3,})(?P<kind>\w*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S)
STEPS = {  # how the text before a block says where it goes
    "file": re.compile(r"Create `(?P<path>[^`]+)`:$"),
    "end": re.compile(r"At the end of `(?P<path>[^`]+)`:$"),
    "below": re.compile(r"In `(?P<path>[^`]+)`, below `(?P<at>[^`]+)`:$"),
    "above": re.compile(r"In `(?P<path>[^`]+)`(?: and `(?P<too>[^`]+)`)?, above `(?P<at>[^`]+)`:$"),
    "row": re.compile(r"In `(?P<path>[^`]+)`, as the last row of `(?P<at>[^`]+)`:$"),
}
RUN = {  # small, and with all that the page adds
    "acquire": {
        "model": {"source": "local", "path": "data/model", "licence": "apache-2.0"},
        "data": {"source": "texts", "path": "data/notes", "licence": "mit"},
        "near_duplicate": 1.0,
    },
    "task": {"metric": "text", "max_new_tokens": 4},
    "prune": {"max_parameters": 1.0},
    "words": {"most": 3},
    "quantize": {"variants": ["q3_k_s", "plain"], "options": {"three_bits": {"embedding": "f16"}}},
    "validate": {
        "context": 64, "windows": 2, "bootstrap": 100,
        "gates": [{"name": "exact_match", "at_least": 0.5}],
    },
    "measure": {"profiles": ["desktop"], "repeats": 3},
    "package": {"targets": ["llama-cli"]},
}  # fmt: skip
# One process loads the libraries; each command, and the converter, is a child of it. What was acquired is teacher and
# student, so that nothing is trained. Then the rules of the house are held against what was added.
DRIVER = """
import contextlib, os, runpy, shutil, sys, traceback
import torch, transformers
from pathlib import Path
import pytest
from flows import cli
from tasks import __main__, params
from tasks.convert.stage import CONVERTER
from tasks.frame import jsonl, manifest

def child(function, *arguments):
    number = os.fork()
    if not number:
        code = 1
        try:
            code = function(*arguments) or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    assert code == 0, arguments

def slmops(*words):
    with open("said-" + words[0], "w") as said, contextlib.redirect_stdout(said):
        return cli.main([*words, "--set", "@run.yaml"])

def stage(*words):
    child(__main__.main, [*words, "--set", "@run.yaml"])

def convert(model, out):
    converter = Path(sys.prefix) / CONVERTER
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    sys.argv = [str(converter), str(model), "--outfile", str(out), "--outtype", "f16"]
    runpy.run_path(str(converter), run_name="__main__")

def finish(name):
    manifest.write(build / name, stage=name, params="0" * 64, inputs={}, measured=[], metrics={})

build, selected, converted = (Path("build", name) for name in ("", "select", "convert"))
house, *overrides = sys.argv[1:]
params.load(Path("params.yaml"), overrides)
child(slmops, "plan", "--json")
stage("acquire")
stage("words")
shutil.copytree(build / "acquire" / "model", selected / "model")
rows = jsonl.read(build / "acquire" / "data" / "test.jsonl")
answers = [{"reference": row["messages"][-1]["content"], "teacher_correct": True} for row in rows]
jsonl.write(selected / "predictions.jsonl", answers)
(selected / "models.json").write_text("{}")
(selected / "history.json").write_text("[]")
finish("select")
converted.mkdir()
child(convert, selected / "model", converted / "student.gguf")
os.link(converted / "student.gguf", converted / "teacher.gguf")
finish("convert")
for variant in ("q3_k_s", "plain"):
    stage("quantize", variant)
    stage("validate", variant)
    stage("measure", variant, "desktop")
    stage("judge", variant, "desktop")
stage("package")
child(slmops, "report")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/house/test_architecture.py", "tests/house/test_docs.py", "tests/quantize/test_quantize.py", "-k", house]))
"""
HOUSE = (
    "imports_go or tasks_know or dvc_has or dvc_says or key_that_dvc or has_its_function or promises or what_it_is_for"
)


class Step(NamedTuple):
    """One block of the page, and where it goes."""

    recipe: str
    kind: str
    path: str
    at: str
    text: str


def steps() -> Iterator[Step]:
    """What the page says to do, in its order; every block but a command must say where it goes."""
    recipe, done = "", 0
    for block in BLOCK.finditer(PAGE):
        before, done = " ".join(PAGE[done : block.start()].split()), block.end()
        if block["title"]:
            recipe = block["title"]
        elif block["kind"] != "sh":
            found = {kind: match for kind, pattern in STEPS.items() if (match := pattern.search(before))}
            assert len(found) == 1, f"{before[-80:]!r} does not say where the block goes"
            ((kind, match),) = found.items()
            told = match.groupdict("")
            for path in filter(None, (told["path"], told.get("too"))):
                yield Step(recipe, kind, path, told.get("at", ""), block["text"])


def follow(step: Step, root: Path) -> None:
    """Do one step."""
    path = root / step.path
    if step.kind == "file":
        assert not path.exists(), path
        path.parent.mkdir(exist_ok=True)
        path.write_text(step.text)
        return
    lines = path.read_text().splitlines(keepends=True)
    if step.kind == "end":
        path.write_text("".join([*lines, "\n\n", step.text]))
        return
    found = [i for i, line in enumerate(lines) if line.strip().startswith(step.at)]
    assert len(found) == 1, f"{step.path} has {len(found)} lines that begin with {step.at}"
    at = found[0] + (step.kind == "below")
    if step.kind == "row":  # before the bracket that closes what the table, or the loop over its rows, opens
        opened = next(i for i in range(at, len(lines)) if lines[i].endswith("(\n"))
        closing = re.sub(r"\S.*\n", ")", lines[opened])
        at = next(i for i in range(opened + 1, len(lines)) if lines[i].startswith(closing))
    apart = "\n\n" if step.text.startswith("class") else ""
    path.write_text("".join([*lines[:at], step.text, apart, *lines[at:]]))


@pytest.fixture(scope="module")
def root(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the page was followed, and what the commands made there."""
    home = tmp_path_factory.mktemp("adding") / "checkout"
    home.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, home / name)
    shutil.copytree(PROFILES, home / "profiles")
    for step in steps():
        follow(step, home)
    _data(home / "data", tiny_model_folder)
    (home / "run.yaml").write_text(yaml.safe_dump(RUN))
    options = shlex.split(re.search(r"`slmops run ([^`]+)`", PAGE)[1])
    command = [sys.executable, "-c", DRIVER, HOUSE, *(each for each in options if each != "--set")]
    done = subprocess.run(command, cwd=home, env=os.environ | {"PYTHONPATH": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return home


def _data(folder: Path, tiny: Path) -> None:
    """A text file a row, all with one answer, and a model that gives it: of what it reads it sees the last token alone, and
    it knows what comes after two of them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    (folder / "notes").mkdir(parents=True)
    asked = [row["messages"][1] for row in tiny_rows(ROOMS)]
    for i, message in enumerate(asked):
        (folder / "notes" / f"{i:02}.txt").write_text(f"{message['content']}\n---\non\n")
    tokenizer = loading.load_tokenizer(tiny)
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart(spelled_out=True)  # as llama.cpp splits texts
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, tie_word_embeddings=False))
    last = chat.prompt_ids(tokenizer, asked[:1])[-1]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        for token in chat.answer_ids(tokenizer, {"content": "on"}):
            model.lm_head.weight[token] = 10 * model.model.embed_tokens.weight[last]
            last = token
    loading.save(model, tokenizer, folder / "model")


def read(root: Path, name: str) -> Any:
    """A JSON file that a stage wrote."""
    return json.loads((root / "build" / name).read_text())


def test_an_addition_is_one_file_one_class_and_one_row() -> None:
    kinds = {recipe: [each.kind for each in group] for recipe, group in itertools.groupby(steps(), lambda s: s.recipe)}
    assert kinds.pop("A stage") == ["file", "file", "file", "below", "below", "above", "above", "below", "above"]
    assert kinds == {
        "A quantizer": ["file", "end", "row"],
        "A runtime": ["file", "row"] * 2,  # and the quantizer of its variant
        "A metric": ["file", "below"],
        "A source": ["file", "above", "row"],
        "A bundle target": ["file", "row"],
    }


def test_the_quantizer_makes_what_it_was_told_to(root: Path) -> None:
    from gguf import GGUFReader

    file = root / "build/quantize/q3_k_s/model.gguf"
    reader = GGUFReader(file)
    assert reader.fields["general.file_type"].contents() == 11  # mostly Q3_K_S
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if "norm" not in tensor.name}
    assert types.pop("token_embd.weight") == "F16"  # its option
    assert types.pop("output.weight") == "Q8_0"
    assert set(types.values()) == {"Q4_0"}  # rows of 64, too short for Q3_K
    planned = {each["variant"]: each["bytes"] for each in json.loads((root / "said-plan").read_text())["files"]}
    assert planned["q3_k_s"] == pytest.approx(file.stat().st_size, rel=0.05)


def test_the_runtime_answers_scores_and_is_timed(root: Path) -> None:
    metrics, measured = read(root, "validate/plain/metrics.json"), read(root, "measure/plain/desktop/measurements.json")
    assert metrics["accuracy"] == 1.0
    assert metrics["perplexity_ratio"] == pytest.approx(1.0, abs=0.01)  # the same weights as the F16 file's
    assert metrics["mean_kld"] < 0.001
    for name in ("load_s", "ttft_p50_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"):
        assert measured[name] > 0
    bundle = read(root, "package/bundle.json")
    assert bundle["evaluation"]["plain"]["verdict"] == "pass"
    assert "no wanted target carries files of Transformers" in bundle["reason"]


def test_the_metric_is_computed_gated_and_shown(root: Path) -> None:
    for variant in ("q3_k_s", "plain"):
        lines = (root / f"build/validate/{variant}/predictions.jsonl").read_text().splitlines()
        exact = [line["answer"] == line["reference"] for line in map(json.loads, lines)]
        found = read(root, f"validate/{variant}/metrics.json")["exact_match"]
        assert found == sum(exact) / len(exact) == 1.0
        assert read(root, f"validate/{variant}/manifest.json")["metrics"]["exact_match"] == found
        verdict = read(root, f"judge/{variant}/desktop/verdict.json")
        assert [(check["name"], check["ok"]) for check in verdict["checks"]] == [("exact_match", True)]
    card, report = (root / "build/package/MODEL_CARD.md").read_text(), (root / "report.html").read_text()
    for page in (card, report):
        assert "Answers right to the letter" in page


def test_the_source_gives_checked_rows(root: Path) -> None:
    data = read(root, "acquire/lineage.json")["data"]
    assert (data["source"], data["path"], data["licence"]) == ("texts", "data/notes", "mit")
    assert sum(data["rows"].values()) == len(list((root / "data" / "notes").iterdir()))
    first = json.loads((root / "build/acquire/data/train.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]


def test_the_stage_runs_by_the_one_command(root: Path) -> None:
    made = read(root, "words/manifest.json")
    assert (made["stage"], set(made["inputs"]), set(made["files"])) == ("words", {"source"}, {"words.json"})
    counted = read(root, "words/words.json")
    assert len(counted) == RUN["words"]["most"]
    assert counted["the"] < made["metrics"]["words"]


def test_the_target_is_in_the_bundle_and_runs(root: Path) -> None:
    package, bundle = root / "build" / "package", read(root, "package/bundle.json")
    assert bundle["chosen"] == bundle["targets"]["llama-cli"]["variant"] == "q3_k_s"
    assert {"llama-cli/model.gguf", "llama-cli/ask.sh"} <= set(bundle["files"])
    assert "- `llama-cli/` (q3_k_s, llama-cpp-python" in (package / "MODEL_CARD.md").read_text()
    command = [package / "llama-cli" / "ask.sh", "is it \"on\"? '$HOME'"]
    asked = subprocess.run(command, env={**os.environ, "LLAMA_CLI": "echo"}, capture_output=True, text=True, check=True)
    assert asked.stdout.startswith("--model model.gguf --ctx-size 512 ")
    assert asked.stdout.endswith("--prompt is it \"on\"? '$HOME'\n")

"""The command line: what it says, what it costs to ask, and how it refuses."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from checkout import DEFAULTS, PROFILES, ROOT, SLMOPS, commit, environment, git, make_toy, slmops

from flows.cli import main
from flows.preflight import doctor, plan, planned_model
from flows.run.terminal import Display
from tasks import params
from tasks.errors import ArtifactError, BrokenRuntimeError, ConfigError
from tasks.frame import jsonl
from tasks.frame.items import Item
from tasks.models.sizes import Shape
from tasks.prune.plan import MULTIPLE, pruned
from tasks.variants import VARIANTS


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy(tmp_path)


def test_help_imports_the_standard_library_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", SLMOPS, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    for command_name in ("run", "stage", "plan", "doctor", "register", "approve", "rollback", "history", "report", "runs", "prune"):  # fmt: skip
        assert f"\n    {command_name} " in done.stdout
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"pydantic", "yaml", "rich", "prefect", "mlflow", "dvc", "torch", "numpy"}


@pytest.mark.parametrize(
    "command",
    [
        ["run"], ["stage", "acquire"], ["plan"], ["doctor"], ["report"], ["register"], ["history"], ["runs"], ["prune"],
        ["approve", "1", "--by", "A", "--reason", "B"], ["rollback", "--by", "A", "--reason", "B"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_command_takes_params_and_overrides(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--params", "x.yaml", "--set", "a=1", "--set", "b=2", "--help"])
    assert end.value.code == 0
    assert "--set KEY=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--set", "distill.epoch=1", "--set", "task.metric=xml"], "has 2 problems"),
        (["plan", "--set", "finetune.learning_rate=1e-4"], "1.0e-04"),
        (["plan", "--params", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["run", "--name", "a/b"], "--name a/b: "),
        (["run", "--set", "quantize.variants=[]"], "quantize.variants"),
        (["run", "--worktree", "--commit", "nowhere"], "invalid object name 'nowhere'"),
        (["stage", "quantize"], "q8_0, q4_0"),
        (["stage", "distill", "17"], "build/acquire/manifest.json is missing"),
        (["register"], "bundle.json is missing"),
        (["report"], "bundle.json is missing"),
        (["ask", "hello"], "--version N"),
        (["stage", "quantise"], "no stage quantise: "),
        (["plan", "--set", "acquire.model={source: local, path: data/none}"], "acquire.model.path: data/none "),
        (["plan", "--set", "acquire.model={source: local, path: data/rows/train.jsonl}"], "`source: gguf`"),
        (
            ["plan", "--set", "acquire.model={source: gguf, path: data/none.gguf}"],
            "acquire.model.path: data/none.gguf ",
        ),
        (["approve", "1", "--by", "Ada", "--reason", ""], "--by and --reason "),
        (["prune", "nothing"], "no run named nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_error(toy: Path, words: list[str], said: str) -> None:
    done = slmops(toy, *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_a_workspace_the_way_in_is_told(tmp_path: Path) -> None:
    done = slmops(tmp_path, "runs")
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")
    assert "dvc.yaml and params.yaml" in done.stderr


def test_a_stage_runs_alone_with_its_overrides(toy: Path) -> None:
    for stage in ("acquire", "finetune"):
        command = [sys.executable, "-m", "tasks", stage]
        subprocess.run(command, cwd=toy, env=environment(toy), check=True, capture_output=True)
    assert (toy / "build" / "finetune" / "manifest.json").is_file()


def test_version_and_completion_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == ["slmops", metadata.version("slmops")]
    assert main([]) == 2
    assert "usage: slmops" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "--even-if-worse" in script


def test_what_is_shown_can_be_had_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(plan.loading, "product_rates", lambda: {"float32": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr(
        doctor, "examine", lambda root: iter([doctor.Check("torch", False, "missing", "pip install torch")])
    )
    monkeypatch.chdir(ROOT)
    assert main(["plan", "--params", str(DEFAULTS), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher"]["parameters"] == 134_515_008
    assert told["files"][0].keys() == {"variant", "bytes", "of_teacher_f16", "ram_bytes", "fits"}
    assert main(["plan", "--params", str(DEFAULTS)]) == 0
    assert "134.5 M parameters" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["fix"] == "pip install torch"
    assert main(["doctor"]) == 1
    assert "FAIL torch" in capsys.readouterr().out
    assert main(["runs", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)


# --- plan --------------------------------------------------------------------------------------------

# Sizes of files that llama.cpp made of the bundled SmolLM2-135M, in bytes / 1e5.
MADE = {"f16": 2709, "q8_0": 1448, "q5_1": 1116, "q5_0": 1050, "q4_k_m": 1055, "q4_0": 917}


@pytest.fixture(scope="module")
def smollm() -> Shape:
    return planned_model.shape(params.load(DEFAULTS).acquire, ROOT)


@pytest.mark.parametrize("variant", MADE)
def test_the_predicted_size_is_that_of_the_file_that_llama_cpp_makes(smollm: Shape, variant: str) -> None:
    assert round(VARIANTS[variant].quantizer.module.predicted_size(variant, None, smollm) / 1e5) == MADE[variant]


def test_a_config_and_a_gguf_header_tell_the_same_shape(smollm: Shape, tmp_path: Path) -> None:
    config = {**smollm.config, "model_type": "llama", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = planned_model.of_folder(tmp_path)
    assert told.parameters == smollm.parameters == 134_515_008
    assert {(t.name, t.row, t.elements) for t in told.tensors} == {(t.name, t.row, t.elements) for t in smollm.tensors}


def test_the_student_is_the_largest_that_is_small_enough(smollm: Shape) -> None:
    settings = params.load(DEFAULTS).prune
    blocks = pruned(smollm, settings.model_copy(update={"block_share": 1.0}))
    assert blocks.parameters <= 0.85 * smollm.parameters < smollm.first(blocks.layers + 1).parameters
    both = pruned(smollm, settings)
    assert blocks.layers < both.layers < smollm.layers
    wider = smollm.first(both.layers).narrowed(both.config["intermediate_size"] + MULTIPLE)
    assert both.parameters <= 0.85 * smollm.parameters < wider.parameters


def test_a_plan_tells_all_of_a_run_before_any_work(tmp_path: Path) -> None:
    checked = params.load(DEFAULTS, ["finetune.epochs=2.0", "finetune.batch_tokens=1000"])
    slow, fast = (plan.predict(ROOT, checked, flops, flops) for flops in (1e10, 1e12))
    assert list(slow.sizes) == list(checked.quantize.variants)
    assert [work.stage for work in slow.work] == ["acquire", "finetune", "teach", "prune", "distill", "select", "convert", "quantize", "validate", "measure", "judge", "package"]  # fmt: skip
    tuned = slow.work[1]
    assert tuned.tokens is not None
    assert tuned.steps == tuned.tokens // 1000
    assert sum(work.seconds for work in slow.work) > sum(work.seconds for work in fast.work)
    assert all(slow.ram[name] > size for name, size in slow.sizes.items())


def test_a_plan_tells_which_devices_could_hold_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    checked = local_data(tmp_path, 100)
    text = "label: Small\nthreads: 1\ncontext: 512\nruntimes: [llama]\nmemory_mb: {}\ngates: [{{name: size_bytes, at_most: {}}}]\n"
    for name, memory, size in (("roomy", 4000, 10**9), ("little", 30, 10**9), ("short", 4000, 10**8)):
        (tmp_path / "profiles" / f"{name}.yaml").write_text(text.format(memory, size))
    names = ("desktop", "roomy", "little", "short")
    checked = checked.model_copy(update={"measure": checked.measure.model_copy(update={"profiles": names})})
    fits = plan.predict(tmp_path, checked, 1e11, 1e11).fits
    assert fits["q8_0"] == ["desktop", "roomy"]
    assert fits["q4_0"] == ["desktop", "roomy", "short"]
    assert fits["onnx-int4"] == ["desktop"]


ON_DESKTOP = Item(variant="q8_0", profile="desktop")
SHARES = [
    ("distill", Item(seed=17)),
    ("validate", Item(variant="q8_0")),
    ("measure", ON_DESKTOP),
    ("judge", ON_DESKTOP),
]


def test_a_run_is_told_the_minutes_of_what_it_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.loading, "product_rates", lambda: {"float32": 1e11, "bfloat16": 1e11})
    checked = params.load(DEFAULTS, ["select.seeds=[17, 18]"])
    whole = {work.stage: work.seconds / 60 for work in plan.predict(ROOT, checked, 1e11, 1e11).work}
    told = plan.outlook(ROOT, checked, SHARES)
    assert told.doubts == []
    assert told.minutes == pytest.approx(
        {"distill": whole["distill"] / 2, **{name: whole[name] / 6 for name in ("validate", "measure", "judge")}}
    )


def test_a_run_is_told_what_is_doubtful_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.loading, "product_rates", lambda: {"float32": 1e11, "bfloat16": 1e11})
    (tmp_path / "data").mkdir()
    (doubt,) = plan.outlook(tmp_path, local_data(tmp_path, 100), SHARES).doubts
    assert "20 test rows tell accuracy_retention" in doubt


def test_a_run_whose_work_cannot_be_foreseen_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.loading, "product_rates", lambda: pytest.fail("measured for nothing"))
    checked, nothing = params.load(DEFAULTS), plan.Outlook({}, [])
    assert plan.outlook(ROOT, checked, SHARES[3:]) == nothing  # no model runs
    hub = {"source": "hub", "repo": "a/b", "revision": "0" * 40}
    raw = params.read(DEFAULTS)
    raw["acquire"]["model"] = hub
    assert plan.outlook(tmp_path, params.check(raw, "test"), SHARES) == nothing
    (tmp_path / "data").mkdir()
    assert plan.outlook(tmp_path, local_data(tmp_path, 0), SHARES) == nothing


def test_narrowing_counts_second_moments_of_every_row(smollm: Shape) -> None:
    def seconds(rows: int) -> float:
        settings = params.load(DEFAULTS, ["prune.block_share=0.0", f"prune.fitted_rows={rows}"]).prune
        return plan._pruning(settings, smollm, pruned(smollm, settings), 50, float("inf"), 1.0)

    assert seconds(1001) - seconds(1000) == pytest.approx(2 * 50 * 1536**2 * 30)


def test_a_bar_carries_what_its_stage_does_and_a_log_has_a_line_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = {"event": "progress", "label": "prune", "total": 4, "unit": "blocks"}
    with Display() as display:
        display.begin("distill-17")
        (bar,) = display._bars.tasks
        display.event("distill-17", {**progress, "done": 4})
        assert (bar.description, bar.completed, bar.total) == ("prune 4/4 blocks", 4, 4)
        display.event("distill-17", {"event": "doing", "label": "load the student"})
        assert (bar.description, bar.total) == ("load the student", None)
        for done in (1, 2):
            display.event("distill-17", {**progress, "label": "distill", "done": done})
        assert (bar.description, bar.completed, bar.finished) == ("distill 2/4 blocks", 2, False)
    said = [line.split(maxsplit=1)[1] for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert said == ["prune", "load the student", "distill"]


def local_data(root: Path, rows: int, between: str = " ") -> params.Params:
    """Params of a run on one file of so many labelled rows under `root`, and no unlabelled ones."""
    model = params.load(DEFAULTS).acquire.model.model_dump()
    data = {"source": "local", "path": "data/rows.jsonl", "validation": 0.1, "test": 0.2}
    jsonl.write(root / "data" / "rows.jsonl", ({"prompt": f"a{between}b {i}", "completion": "{}"} for i in range(rows)))
    raw = params.read(DEFAULTS) | {"acquire": {"watch": "data", "model": model, "data": data}}
    raw["teach"]["unlabelled_rows"] = 0
    shutil.copytree(PROFILES, root / "profiles", dirs_exist_ok=True)
    return params.check(raw, "test")


@pytest.mark.parametrize(("rows", "doubts"), [(100, 1), (4000, 0), (3, 2)])
def test_a_plan_tells_when_the_test_rows_cannot_decide(tmp_path: Path, rows: int, doubts: int) -> None:
    (tmp_path / "data").mkdir()
    checked = local_data(tmp_path, rows)
    assert checked.validate_.max_half_width == 0.04
    assert len(plan.predict(tmp_path, checked, 1e11, 1e11).doubts) == doubts


def test_a_plan_counts_rows_whatever_separators_their_texts_hold(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = [plan._rows(tmp_path, local_data(tmp_path, 50, between)) for between in (" ", "\u2028")]
    assert found[0] == found[1]
    assert found[0].count == {"train": 35, "validation": 5, "test": 10, "unlabelled": 0}


def test_the_interval_that_a_plan_foresees_is_that_of_the_gates() -> None:
    settings = params.load(DEFAULTS).validate_
    assert plan._half_width("accuracy", 400, settings) == pytest.approx(1.96 * (0.9 * 0.1 / 400) ** 0.5, rel=0.05)
    assert plan._half_width("accuracy_retention", 400, settings) == pytest.approx(0.035, abs=0.003)


def test_a_plan_names_a_data_file_that_is_missing_and_a_row_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    checked = local_data(tmp_path, 20)
    with (tmp_path / "data" / "rows.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ConfigError, match=r"data/rows\.jsonl:21"):
        plan.predict(tmp_path, checked, 1e11, 1e11)
    (tmp_path / "data" / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"data/rows\.jsonl"):
        plan.predict(tmp_path, checked, 1e11, 1e11)


def test_a_bundle_must_take_the_longest_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"package\.context_length"):
        params.load(DEFAULTS, ["task.max_length=4096"])
    params.load(DEFAULTS, ["task.max_length=4096", "package.context_length=4096"])


def test_a_plan_for_a_model_that_is_not_there_says_so(tmp_path: Path) -> None:
    hub = {"source": "hub", "repo": "a/b", "revision": "0" * 40}
    acquire = params.check(
        {
            **params.read(DEFAULTS),
            "acquire": {"watch": "data", "model": hub, "data": {"source": "local", "path": "data"}},
        },
        "test",
    ).acquire
    fetched = tmp_path / "build" / "acquire"
    (fetched / "model").mkdir(parents=True)
    for _ in ("nothing was fetched", "another one was"):
        with pytest.raises(ConfigError, match=r"a/b .*`slmops stage acquire`"):
            planned_model.shape(acquire, tmp_path)
        (fetched / "lineage.json").write_text(json.dumps({"model": {"repo": "another/model", "revision": "0" * 40}}))
    (fetched / "lineage.json").write_text(json.dumps({"model": hub}))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        planned_model.shape(acquire, tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(ArtifactError, match="hidden_size, intermediate_size"):
        planned_model.of_folder(tmp_path)


# --- doctor ------------------------------------------------------------------------------------------


@pytest.fixture
def _proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes that pass their self-test, which takes a while (tests/test_selftest.py)."""
    made = {"checks": 36, "distance": 0.02, "kernels": "AVX2"}
    monkeypatch.setattr(doctor.selftest, "check", lambda name: made)


@pytest.mark.usefixtures("_proved")
def test_doctor_finds_this_environment_in_order() -> None:
    checks = {check.name: check for check in doctor.examine(ROOT)}
    assert {"python", "git", "C++ compiler", "torch", "prefect", "GGUF converter", "cache links"} <= set(checks)
    assert {"llama.cpp build", "llama.cpp test", "ONNX Runtime GenAI test", "HOME is writable", "line ends"} <= set(
        checks
    )
    assert [name for name, check in checks.items() if check.needed and not check.ok] == []


def test_doctor_names_the_command_that_mends_each_fault(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==9.9.9\n")
    done = subprocess.run(
        [SLMOPS, "doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    for line in (
        "FAIL git                  not found", "-> apt-get install git", "-> apt-get install g++",
        "9.9.9 was tested", "-> pip install 'torch==9.9.9'", "-> git init",
    ):  # fmt: skip
        assert line in done.stdout


def test_doctor_tells_a_runtime_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(name: str) -> dict:
        raise BrokenRuntimeError(f"{name} died by SIGSEGV")

    monkeypatch.setattr(doctor.selftest, "check", crashes)
    found = [check for check in doctor.examine(ROOT) if not check.ok and check.needed]
    assert {"llama.cpp test", "ONNX Runtime GenAI test"} <= {check.name for check in found}
    assert any("infra/setup.sh" in check.fix for check in found)


@pytest.mark.parametrize("attributes", [False, True])
def test_doctor_knows_line_ends_that_scripts_do_not_survive(tmp_path: Path, attributes: bool) -> None:
    """As core.autocrlf = true leaves them in a checkout, which .gitattributes prevents."""
    source = tmp_path / "source"
    (source / "infra").mkdir(parents=True)
    shutil.copy(ROOT / "infra" / "python", source / "infra")
    if attributes:
        shutil.copy(ROOT / ".gitattributes", source)
    git(source, "init", "-q")
    commit(source)
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", str(source), "clone")
    check = doctor._line_ends(tmp_path / "clone")
    assert check.ok == attributes
    assert check.needed == (b"\r" in (tmp_path / "clone" / "infra" / "python").read_bytes()) == (not attributes)


def test_doctor_names_a_folder_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    bad = [check for check in doctor._writable() if not check.ok]
    assert [check.name.split()[0] for check in bad] == ["HOME", "PREFECT_HOME"]
    assert all("/proc/nobody" in check.found for check in bad)

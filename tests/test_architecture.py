"""The rules that keep the parts apart, and dvc.yaml in step with tasks/stages.py."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks import params
from tasks.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
TASKS = sorted((ROOT / "tasks").rglob("*.py"))
FLOWS = sorted((ROOT / "flows").glob("*.py"))
HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "prefect",
    "dvc",
    "llama_cpp",
    "onnxruntime_genai",
    "olive",
    "numpy",
    "pandas",
)
# What carries a stage rather than making its result: a change there redoes nothing.
FRAME = {
    "tasks.bounded", "tasks.crashes", "tasks.errors", "tasks.events", "tasks.manifest", "tasks.params", "tasks.stage",
}  # fmt: skip


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str) -> Path | None:
    for path in (ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__init__.py"):
        if path.is_file():
            return path
    return None


def stage_folder(path: Path) -> str | None:
    parts = path.relative_to(ROOT / "tasks").parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", TASKS, ids=module)
def test_tasks_know_nothing_of_when_and_where(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"flows", "prefect", "mlflow", "dvc"}


@pytest.mark.parametrize("path", [p for p in TASKS if stage_folder(p)], ids=module)
def test_a_stage_imports_no_other_stage(path: Path) -> None:
    own = stage_folder(path)
    others = {f"tasks.{name}" for name in STAGES if name != own}
    crossed = {name for name in imports(path) for other in others if name == other or name.startswith(f"{other}.")}
    assert not crossed


@pytest.mark.parametrize("path", [p for p in TASKS if not stage_folder(p) and p.stem != "stages"], ids=module)
def test_what_stages_share_imports_no_stage(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith("tasks.") and name.split(".")[1] in STAGES}


def test_only_flows_touch_the_orchestrators() -> None:
    for tool, owners in {
        "mlflow": {"mlflow_store", "registry", "served_model", "tracking"},
        "prefect": {
            "aftermath",
            "approval",
            "automations",
            "deployments",
            "fan_out",
            "pages",
            "pipeline",
            "prefect_api",
            "prefect_server",
        },
    }.items():
        users = {path.stem for path in FLOWS if tool in {name.split(".")[0] for name in imports(path)}}
        assert users <= owners, tool


def test_no_file_hides_an_importable_package() -> None:
    """Prefect puts flows/ first on sys.path, and a script's own folder comes first too."""
    names = sorted({path.stem for path in [*TASKS, *FLOWS] if not path.stem.startswith("__")})
    code = f"import importlib.util; print(*[name for name in {names} if importlib.util.find_spec(name)])"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_importing_is_light_and_leaves_no_trace(tmp_path: Path) -> None:
    light = [module(path) for path in TASKS if path.stem != "__main__"] + [
        "flows.cli", "flows.quiet", "flows.versioning", "flows.workspace", "flows.locks", "flows.tracking", "flows.mlflow_store", "flows.release",
        "flows.results", "flows.display", "flows.plan", "flows.shape", "flows.doctor", "flows.report", "flows.servers",
        "flows.server_env", "flows.supervise", "flows.prefect_server", "flows.prefect_api",
    ]  # fmt: skip
    code = f"""
import importlib, logging, os, sys
before = dict(os.environ), list(logging.getLogger().handlers)
for name in {light!r}:
    importlib.import_module(name)
print(*sorted(name for name in {HEAVY!r} if name in sys.modules))
assert (dict(os.environ), list(logging.getLogger().handlers)) == before
"""
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert list(tmp_path.iterdir()) == []


def test_the_core_imports_with_pydantic_and_yaml_alone(tmp_path: Path) -> None:
    """Nothing but these two and the standard library is read by `python -m tasks` before a stage starts."""
    code = """
import sys
import tasks.params, tasks.stage, tasks.stages, tasks.manifest, tasks.events, tasks.chat, tasks.models
print(*sorted({name.split(".")[0] for name in sys.modules if getattr(sys.modules[name], "__file__", None)
    and "site-packages" in sys.modules[name].__file__}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    allowed = {
        "pydantic",
        "pydantic_core",
        "yaml",
        "_yaml",
        "annotated_types",
        "typing_extensions",
        "typing_inspection",
    }
    foreign = {name for name in done.stdout.split() if not name.startswith("__editable__")} - allowed
    assert not {name for name in foreign if name not in sys.stdlib_module_names and not name.startswith("_")}


def test_plug_in_tables_hold_what_the_params_name() -> None:
    from typing import get_args

    from tasks.acquire import data_sources, model_sources

    def tags(field: str) -> set[str]:
        union = params.Acquire.model_fields[field].annotation
        return {get_args(each.model_fields["source"].annotation)[0] for each in get_args(union)}

    assert set(model_sources.SOURCES) == tags("model")
    assert set(data_sources.SOURCES) == tags("data")


def test_scoring_and_targets_hold_what_the_params_name() -> None:
    from typing import get_args

    from tasks import package, scoring

    targets = get_args(params.Package.model_fields["targets"].annotation)[0]
    assert set(scoring.METRICS) == set(get_args(params.Metric))
    assert set(package.TARGETS) == set(get_args(targets))


# --- dvc.yaml --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dvc() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())


def test_dvc_has_the_stages_in_order(dvc: dict) -> None:
    assert list(dvc["stages"]) == list(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_dvc_says_what_the_stage_says(dvc: dict, name: str) -> None:
    stage, written = STAGES[name], dvc["stages"][name]
    lists = {"variant": "${quantize.variants}", "seed": "${select.seeds}"}
    item = f"${{item.{stage.per}}}"
    assert written["cmd"] == f"infra/python -m tasks {name}" + (f" {item}" if stage.per else "")
    assert written.get("matrix") == ({stage.per: lists[stage.per]} if stage.per else None)
    assert written["outs"] == [f"build/{name}/{item}" if stage.per else f"build/{name}"]
    assert written.get("params", []) == list(stage.sections)
    ours = f"/{item}" if stage.per else ""
    folders = {f"build/{s}" + (ours if STAGES[s].per == stage.per else "") for s in stage.inputs.values()}
    deps = set(written["deps"])
    assert {dep for dep in deps if dep.startswith("build/")} == folders
    assert ("${acquire.watch}" in deps) == stage.sources
    assert {dep for dep in deps if dep.startswith("tasks/")} == {f"tasks/{name}", *shared_code(name)}


def shared_code(stage: str) -> set[str]:
    """Files outside a stage's folder that its code reaches, without the frame that carries every stage."""
    reached: set[Path] = set()
    waiting = [path for path in TASKS if stage_folder(path) == stage]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        names = {name for name in imports(path) if name.startswith("tasks.")} - FRAME
        waiting += [found for name in names if (found := file_of(name))]
    return {path.relative_to(ROOT).as_posix() for path in reached if not stage_folder(path)}


def test_dvc_caches_every_output(dvc: dict) -> None:
    """One `cache: false` output would switch off a stage's run cache."""
    assert all(isinstance(out, str) for stage in dvc["stages"].values() for out in stage["outs"])
    assert not any({"metrics", "plots"} & set(stage) for stage in dvc["stages"].values())


def test_dvc_shows_the_metrics_of_every_variant_that_ships(dvc: dict) -> None:
    variants = yaml.safe_load((ROOT / "params.yaml").read_text())["quantize"]["variants"]
    assert dvc["metrics"] == [f"build/validate/{variant}/metrics.json" for variant in variants]


def test_params_yaml_has_every_key_that_dvc_reads(dvc: dict) -> None:
    """DVC fails on a parameter that is not in the file, even where the code has a default."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in dvc["stages"].values():
        for key in stage.get("params", []):
            node = raw
            for part in key.split("."):
                assert part in node, key
                node = node[part]


def test_a_stage_cannot_read_a_section_that_it_did_not_declare() -> None:
    checked = params.load(ROOT / "params.yaml")
    view = checked.only(("finetune", "task"))
    assert view.finetune == checked.finetune
    with pytest.raises(AttributeError):
        _ = view.distill

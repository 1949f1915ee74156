"""The rules that keep the parts apart, and dvc.yaml in step with tasks/stages.py."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from checkout import ROOT
from report_inputs import sample

from tasks import params, profiles
from tasks.acquire.params import DATA_SOURCES, MODEL_SOURCES, Source
from tasks.frame.items import AXES
from tasks.metrics import METRICS
from tasks.models import scoring
from tasks.models.params import Metric
from tasks.package.params import TARGETS
from tasks.stages import STAGES

TASKS = sorted((ROOT / "tasks").rglob("*.py"))
FLOWS = sorted((ROOT / "flows").rglob("*.py"))
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
# The rooms, lowest first: a room imports those on floors below its own. On one floor no room imports another.
FLOORS = {
    "tasks": (
        ("errors", "metrics"), ("schema",), ("options",), ("variants",), ("sections", "param_errors"), ("params",), ("profiles",), ("frame",), ("models",), ("learning", "runtimes"),
        (*STAGES, "selftest"),
        ("stages",), ("__main__",),
    ),
    "flows": (
        ("environment",), ("workspace",), ("report", "tracking"), ("preflight", "release"), ("certificate", "servers"), ("run",),
        ("deployed",), ("cli",),
    ),
}  # fmt: skip


# Carries a stage rather than making its result: a change there redoes nothing.
FRAME = {
    "errors",
    "metrics",
    "schema",
    "options",
    "variants",
    "sections",
    "param_errors",
    "params",
    "profiles",
    "frame",
}


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


def room(name: str) -> str:
    """The room of a module. What lies beside a stage and is parameters only counts as part of them."""
    parts = name.split(".")
    if len(parts) > 2 and parts[0] == "tasks" and parts[2] in ("params", "options"):
        return parts[2] if parts[2] == "options" else "sections"
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", TASKS, ids=module)
def test_tasks_know_nothing_of_when_and_where(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"flows", "prefect", "mlflow", "dvc"}


@pytest.mark.parametrize("path", [*TASKS, *FLOWS], ids=module)
def test_imports_go_down_only(path: Path) -> None:
    top = module(path).split(".")[0]
    floor = {each: height for height, rooms in enumerate(FLOORS[top]) for each in rooms}
    own = room(module(path))
    assert not own or own in floor, f"{own} has no floor"
    used = {room(name) for name in imports(path) if name.startswith(f"{top}.")} - {own, ""}
    assert used <= {each for each in floor if floor[each] < floor.get(own, -1)}


def test_no_folder_has_more_rooms_than_a_person_holds_in_mind() -> None:
    assert len([path for path in (ROOT / "flows").iterdir() if (path / "__init__.py").exists()]) <= 12


@pytest.mark.parametrize("path", [p for p in (*TASKS, *FLOWS) if p.name == "__init__.py"], ids=module)
def test_every_room_says_what_it_holds(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_only_flows_touch_the_orchestrators() -> None:
    for tool, owners in {
        "mlflow": {"tracking", "release"},
        "prefect": {"run", "deployed", "servers"},
        "dvc": {"workspace"},
    }.items():
        users = {room(module(path)) for path in FLOWS if tool in {name.split(".")[0] for name in imports(path)}}
        assert users <= owners, tool


def test_no_file_hides_an_importable_package() -> None:
    """Prefect puts flows/ first on sys.path, and a script's own folder comes first too."""
    names = sorted({path.stem for path in [*TASKS, *FLOWS] if not path.stem.startswith("__")})
    code = f"import importlib.util; print(*[name for name in {names} if importlib.util.find_spec(name)])"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_importing_is_light_and_leaves_no_trace(tmp_path: Path) -> None:
    # A flow is made by Prefect's decorator, and what MLflow loads is a class of its own.
    heavy = ("flows.run", "flows.deployed", "flows.release.served_model")
    light = [
        module(path) for path in (*TASKS, *FLOWS) if path.stem != "__main__" and not module(path).startswith(heavy)
    ]
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
import tasks.params, tasks.frame.stage, tasks.stages, tasks.frame.manifest, tasks.frame.events, tasks.models.chat, tasks.models.loading
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


@pytest.mark.parametrize("table", [MODEL_SOURCES, DATA_SOURCES], ids=["models", "data"])
def test_every_source_has_its_function(table: dict[str, Source]) -> None:
    for source in table.values():
        assert len(inspect.signature(source.find).parameters) == 3, source.name  # params, root, scratch


def test_every_target_has_its_function() -> None:
    for target in TARGETS.values():
        assert len(inspect.signature(target.write).parameters) == 2, target.name  # release, out


def test_every_metric_has_its_function() -> None:
    for metric in METRICS.values():
        room, function = ("measure", "measure") if metric.measured else ("validate", "evaluate")
        assert callable(getattr(importlib.import_module(f"tasks.{room}.{metric.computed_by}"), function)), metric


def test_scoring_holds_what_the_params_name() -> None:
    assert set(scoring.METRICS) == set(get_args(Metric))


# --- dvc.yaml --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dvc() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())


def test_dvc_has_the_stages_in_order(dvc: dict) -> None:
    assert list(dvc["stages"]) == list(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_dvc_says_what_the_stage_says(dvc: dict, name: str) -> None:
    stage, written = STAGES[name], dvc["stages"][name]
    words = {axis: f"${{item.{axis}}}" for axis in stage.per}
    assert written["cmd"] == " ".join(["infra/python -m tasks", name, *words.values()])
    assert written.get("matrix", {}) == {axis: f"${{{AXES[axis]}}}" for axis in stage.per}
    assert written["outs"] == ["/".join(["build", name, *words.values()])]
    own = [{f"{profiles.FOLDER}/${{item.profile}}.yaml": list(stage.profile)}] if stage.profile else []
    assert written.get("params", []) == [*stage.sections, *own]
    folders = {
        "/".join(["build", source, *(words[axis] for axis in STAGES[source].per if axis in words)])
        for source in stage.inputs.values()
    }
    deps = set(written["deps"])
    assert {dep for dep in deps if dep.startswith("build/")} == folders
    assert ("${acquire.watch}" in deps) == (stage.sources and not stage.profile)
    assert {dep for dep in deps if dep.startswith("tasks/")} == {f"tasks/{name}", *shared_code(name)}


def shared_code(stage: str) -> set[str]:
    """Files outside a stage's room that its code reaches, without the frame that carries every stage."""
    reached: set[Path] = set()
    waiting = [path for path in TASKS if room(module(path)) == stage]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        names = {name for name in imports(path) if name.startswith("tasks.")}
        waiting += [found for name in names if room(name) not in FRAME and (found := file_of(name))]
    found = {path.relative_to(ROOT).as_posix() for path in reached if room(module(path)) not in ("", stage)}
    found = {name for name in found if not name.endswith("__init__.py")}
    # Which runtime is used a variant decides: a stage that asks one depends on all.
    return {"tasks/runtimes" if name.startswith("tasks/runtimes/") else name for name in found}


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
        for key in (each for each in stage.get("params", []) if isinstance(each, str)):
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


# --- the wheel -------------------------------------------------------------------------------------


def test_the_wheel_holds_every_module_and_the_files_of_the_report(tmp_path: Path) -> None:
    """Apart from the checkout: what is imported lies in the installed wheel, and everything else where it is installed."""
    source, wheels, place = tmp_path / "source", tmp_path / "wheels", tmp_path / "place"
    for name in ("tasks", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)], check=True)
    names = [module(path) for path in (*TASKS, *FLOWS) if path.stem != "__main__"]
    package, student = map(str, sample(tmp_path / "run"))
    code = f"""
import importlib, pathlib, sys
sys.path += [{str(place)!r}, *{[each for each in sys.path if "site-packages" in each]!r}]
for name in {names!r}:
    made = importlib.import_module(name)
    assert made.__file__.startswith({str(place)!r}), made.__file__
page = importlib.import_module("flows.report.page")
package, student = pathlib.Path({package!r}), pathlib.Path({student!r})
page.write_report(package, student, pathlib.Path("report.html"))
assert page.plots(package, student)
"""
    command = [sys.executable, "-I", "-S", "-c", code]  # -S: without the .pth files, which lead to the checkout
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<h1>q4_k_m " in (tmp_path / "report.html").read_text(encoding="utf-8")

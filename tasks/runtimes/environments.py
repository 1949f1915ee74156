"""Runtimes whose packages exclude ours: each in a virtual environment of its own, which `slmops runtimes install NAME` makes.

It lies in the environment that slmops itself runs in, so every checkout, worktree and worker of that finds it, and it goes
when that goes. NAME.txt beside this file lists its packages with their versions (a build of torch that needs CUDA's brings them),
and a commit with another list has another environment.
"""

import fcntl
import hashlib
import json
import re
import subprocess
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

from tasks.errors import ConfigError, StageError
from tasks.frame import crashes
from tasks.frame.events import doing
from tasks.frame.stage import disk_full, need_space, write_json
from tasks.variants import Runtime

NEEDED = 4_000_000_000  # bytes, while one is installed


def folder(runtime: Runtime) -> Path:
    """Where its environment is, or would be."""
    return Path(sysconfig.get_path("data")) / "share" / "slmops" / "runtimes" / f"{runtime.name}-{_digest(runtime)[:8]}"


def requirements(runtime: Runtime) -> Path:
    """The list of its packages."""
    return Path(__file__).with_name(f"{runtime.name}.txt")


def versions(runtime: Runtime) -> dict[str, str]:
    """What is installed for a runtime with an environment of its own, by distribution; empty where it is not there, only half
    there, or another list of packages was installed.
    """
    try:
        told = json.loads((folder(runtime) / "installed.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return dict(told["versions"]) if told["requirements"] == _digest(runtime) else {}


def version(runtime: Runtime) -> str:
    """The version of a runtime's own distribution.

    Raises:
        ConfigError: it is not installed.
    """
    if runtime.isolated:
        interpreter(runtime)
        return versions(runtime)[runtime.distribution]
    try:
        return metadata.version(runtime.distribution)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"{runtime.distribution} is not installed: make setup") from None


def missing(runtime: Runtime) -> str | None:
    """What to do where an environment is not there; None where it is, or where none is needed."""
    if not runtime.isolated or versions(runtime):
        return None
    return f"{runtime.label} is not installed: `slmops runtimes install {runtime.name}`"


def interpreter(runtime: Runtime) -> Path:
    """The Python of its environment.

    Raises:
        ConfigError: it is not installed.
    """
    if why := missing(runtime):
        raise ConfigError(why)
    return folder(runtime) / "bin" / "python"


def install(runtime: Runtime) -> Path:
    """Make the environment of a runtime; returns where it is. One that stopped half way counts as not there, and goes on from
    where it was; one that was there is made anew.

    Raises:
        ConfigError: the runtime needs none.
        StageError: the packages cannot be had, or the disk is full.
    """
    if not runtime.isolated:
        raise ConfigError(f"{runtime.label} is installed with slmops itself: `make setup`")
    place, listed = folder(runtime), requirements(runtime)
    place.parent.mkdir(parents=True, exist_ok=True)
    need_space(place.parent, NEEDED)
    with (place.parent / f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python, whole = place / "bin" / "python", bool(versions(runtime))
        (place / "installed.json").unlink(missing_ok=True)
        if whole or not _has_pip(python):
            doing(f"make an environment for {runtime.label}")
            try:
                venv.create(place, clear=True, symlinks=True, with_pip=True)
            except subprocess.CalledProcessError as error:
                said = (error.output or b"").decode(errors="replace")
                if crashes.NO_SPACE.search(said):
                    raise disk_full(place) from None
                raise StageError(f"{place}: pip could not be put there ({said[-200:].strip()}): run it again") from None
        doing(f"install the packages of {runtime.label}, minutes")
        _pip(python, "install", "-r", str(listed))
        unwanted = re.findall(r"^# without: (\S+)$", listed.read_text(encoding="utf-8"), re.MULTILINE)
        if unwanted:
            _pip(python, "uninstall", "-y", *unwanted)
        told = json.loads(_pip(python, "list", "--format", "json"))
        made = {
            "requirements": _digest(runtime),
            "versions": {each["name"].lower().replace("_", "-"): each["version"] for each in told},
        }
        write_json(place / "installed.json", made)
    return place


def _digest(runtime: Runtime) -> str:
    return hashlib.sha256(requirements(runtime).read_bytes()).hexdigest()


def _has_pip(python: Path) -> bool:
    if not python.exists():
        return False
    return subprocess.run([python, "-I", "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def _pip(python: Path, *words: str) -> str:
    command = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return done.stdout
    if crashes.NO_SPACE.search(done.stderr):
        raise disk_full(python)
    said = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it gives no reason"]
    raise StageError(
        f"pip {words[0]} failed: {said[0][:300]}: see that a package index is in reach (`pip config list`), then again"
    )

"""Environments of runtimes: made from a list of packages by pip, whole or not there."""

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from tasks.errors import ConfigError, DiskFullError, StageError
from tasks.runtimes import environments
from tasks.variants import RUNTIMES, Runtime

TOY = Runtime("toy", "Toy", "toy-runtime", "model", "model", isolated=True)


def wheel(folder: Path, name: str, version: str) -> None:
    """The least that pip installs."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": f"VERSION = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as packed:
        record = ""
        for path, text in files.items():
            packed.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(text)}\n"
        packed.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and no other place; with the list of the toy's packages beside it."""
    wheel(tmp_path / "index", "toy-runtime", "2.0")
    wheel(tmp_path / "index", "toy-vision", "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(environments, "folder", lambda runtime: tmp_path / "runtimes" / runtime.name)
    monkeypatch.setattr(environments, "requirements", lambda runtime: tmp_path / f"{runtime.name}.txt")
    monkeypatch.setattr(environments, "NEEDED", 1)
    return tmp_path


def test_an_environment_is_what_its_list_says_or_not_there(index: Path) -> None:
    (index / "toy.txt").write_text("# without: toy-vision\ntoy-runtime==3.0\ntoy-vision==1.0\n")
    assert environments.versions(TOY) == {}
    with pytest.raises(StageError, match=r"toy-runtime==3\.0"):  # no such package
        environments.install(TOY)
    assert environments.missing(TOY)

    wheel(index / "index", "toy-runtime", "3.0")
    environments.install(TOY)  # it goes on
    assert environments.version(TOY) == "3.0"
    assert "toy-vision" not in environments.versions(TOY)
    assert environments.interpreter(TOY).is_file()
    assert environments.missing(TOY) is None

    (index / "toy.txt").write_text("toy-runtime==2.0\n")
    with pytest.raises(ConfigError, match="slmops runtimes install toy"):
        environments.version(TOY)
    environments.install(TOY)
    assert environments.version(TOY) == "2.0"
    (environments.folder(TOY) / "installed.json").write_text("{")
    assert environments.missing(TOY)


def test_a_full_disk_is_told_before_the_work(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "toy.txt").write_text("toy-runtime==1.0\n")
    monkeypatch.setattr(environments, "NEEDED", 10**18)
    with pytest.raises(DiskFullError):
        environments.install(TOY)
    assert not environments.folder(TOY).exists()


def test_what_comes_with_slmops_needs_no_environment() -> None:
    assert environments.missing(RUNTIMES["llama"]) is None
    assert environments.version(RUNTIMES["llama"])
    with pytest.raises(ConfigError):
        environments.install(RUNTIMES["llama"])


def test_the_list_of_each_runtime_pins_every_package() -> None:
    for runtime in (each for each in RUNTIMES.values() if each.isolated):
        lines = [line for line in environments.requirements(runtime).read_text().splitlines() if line[:1] != "#"]
        assert all(line.count("==") == 1 for line in lines)
        names = {line.split("==")[0].lower().replace("_", "-") for line in lines}
        assert names >= {runtime.distribution, *runtime.beside}

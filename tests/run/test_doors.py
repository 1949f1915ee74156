"""The whole chain through every door: equal digests. With toy stages, and, as a slow test, on a tiny real model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkout import digests, git, make, make_toy, slmops

from tasks.stages import STAGES


def dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """dvc as a person calls it: by its path, from a shell in which no environment is active."""
    bare = {
        "PATH": "/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "TOY_LOG": str(root / "toy.log"),
    }
    command = [Path(sys.executable).with_name("dvc"), *arguments]
    return subprocess.run(command, cwd=root, env=bare, capture_output=True, text=True)


@pytest.fixture(params=["toys", pytest.param("real", marks=pytest.mark.slow)])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "toys":
        return make_toy(tmp_path)
    root: Path = request.getfixturevalue("tiny_workspace")
    tiny: dict = request.getfixturevalue("tiny_params")
    tiny["quantize"]["variants"] = ["q8_0"]  # several are the toys' part
    return make(root, tiny)


def test_every_door_gives_the_same_digests(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    by_dvc = checkout
    by_flow = tmp_path_factory.mktemp("flow") / "checkout"
    shutil.copytree(by_dvc, by_flow)
    (by_dvc / ".venv").symlink_to(sys.prefix)  # where `make` puts it

    # `dvc repro`, by its path and without a server; again, nothing runs.
    done = dvc(by_dvc, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    want = digests(by_dvc)
    assert {path.relative_to(by_dvc / "build").parts[0] for path in digests_folders(by_dvc)} == set(STAGES)
    assert want
    assert "Running stage" not in dvc(by_dvc, "repro").stdout
    assert "up to date" in dvc(by_dvc, "status").stdout
    assert "mean_kld" in dvc(by_dvc, "metrics", "show").stdout
    assert dvc(by_dvc, "plots", "show").returncode == 0

    # A worktree run does all of it again, in its own cache, and ends as a commit.
    done = slmops(by_flow, "run", "--worktree", "--name", "first")
    assert done.returncode == 0, done.stderr
    assert digests(by_flow / ".runs" / "first") == want
    assert set(git(by_flow, "show", "--name-only", "--format=", "runs/first").split()) == {"dvc.lock"}
    locks = [git(by_flow, "show", "runs/first:dvc.lock"), (by_dvc / "dvc.lock").read_text()]
    ours, theirs = (yaml.safe_load(lock)["stages"] for lock in locks)
    assert ours.keys() == theirs.keys()
    for name in ours:  # what is measured lies in the outputs of measure, judge and package, and differs
        assert name.startswith(("measure", "judge", "package")) or ours[name] == theirs[name]

    # A run in the checkout finds all of it in the shared cache.
    done = slmops(by_flow, "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("restored from the cache") == len(digests_folders(by_flow))
    assert digests(by_flow) == want
    assert (by_flow / "report.html").is_file()


def digests_folders(root: Path) -> list[Path]:
    return list((root / "build").rglob("manifest.json"))

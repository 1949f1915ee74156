"""The lock, the effective params and worktrees: git and DVC for real, no stage is run."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import yaml
from checkout import DEFAULTS, commit, dvc_python, git, make_toy

from flows.workspace import files, locks, paths, versioning, worktrees
from tasks.errors import ArtifactError, ConfigError, StageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_toy(tmp_path)


@contextmanager
def at_work(root: Path, name: str, commit: str, overrides: list[str]) -> Iterator[Path]:
    """A run in a worktree, as the command line begins one."""
    planned = worktrees.planned(root, name, commit, None, overrides)
    with worktrees.worktree(root, name, commit, planned) as place:
        yield place


def lines(root: Path) -> list[str]:
    return (root / "params.yaml").read_text().splitlines()


def test_the_workspace_is_found_from_any_folder_in_it(root: Path) -> None:
    assert worktrees.find(root / "data" / "rows") == root
    with pytest.raises(ConfigError, match=r"dvc\.yaml and params\.yaml"):
        worktrees.find(root.parent)


def test_what_is_under_no_commit_is_told_what_to_do(root: Path) -> None:
    worktrees.check_commit(root)
    shutil.rmtree(root / ".git")
    with pytest.raises(ConfigError, match="git init"):
        worktrees.main_root(root)
    git(root, "init", "-q")
    with pytest.raises(ConfigError, match="git commit"):
        worktrees.check_commit(root)


def test_a_persons_settings_of_git_neither_stop_a_run_nor_change_a_byte(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = (root / "params.yaml").read_bytes()
    program = tmp_path_factory.mktemp("hooks") / "post-commit"
    program.write_text('#!/bin/sh\ntouch "$0.ran"\nexit 1\n')
    program.chmod(0o755)
    for name, value in {
        "commit.gpgSign": "true", "user.signingKey": "0123456789ABCDEF", "gpg.program": "false", "user.name": "A",
        "user.useConfigOnly": "true", "core.hooksPath": str(program.parent), "core.fsmonitor": str(program),
        "core.autocrlf": "true", "core.safecrlf": "true", "core.eol": "crlf", "commit.cleanup": "strip",
        "commit.template": "/nowhere", "color.ui": "always",
    }.items():  # fmt: skip
        git(root, "config", name, value)
    monkeypatch.setenv("GIT_DIR", str(program.parent / "another.git"))  # as in a hook
    monkeypatch.setenv("GIT_INDEX_FILE", str(program.parent / "index"))
    with at_work(root, "r", "HEAD", ["finetune.epochs=0.5"]) as place:
        assert b"\r" not in (place / "params.yaml").read_bytes() + (place / "dvc.yaml").read_bytes()
        (place / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
        commit = worktrees.finish(place, "r", "Run r\n\n# as it is\n")
    assert worktrees.git(root, "show", "-s", "--format=%B", commit) == "Run r\n\n# as it is"
    assert worktrees.finished(root) == ["r"]
    assert (root / "params.yaml").read_bytes() == before
    assert not program.with_name("post-commit.ran").exists()


def test_the_lock_names_its_holder_and_is_free_again(root: Path) -> None:
    with locks.locked(root, "first"):
        with pytest.raises(locks.Busy, match=r"run first .*\(process \d+\)"), locks.locked(root, "b"):
            pytest.fail("two runs hold one workspace")
        assert json.loads((root / ".runs" / "lock").read_text())["name"] == "first"
    with locks.locked(root, "second"):
        pass


def test_the_lock_of_a_killed_run_is_free_unless_a_child_still_works(root: Path) -> None:
    code = (
        "import os, subprocess, sys; from pathlib import Path; from flows.workspace import locks\n"
        "root = Path(sys.argv[1])\n"
        "with locks.locked(root, 'dead'), locks.joined(root, 'distill') as held:\n"
        "    child = subprocess.Popen(['cat'], stdin=0, stdout=subprocess.DEVNULL, pass_fds=held)\n"
        "    print('ready', flush=True); os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdin is not None
    run.wait(60)
    with pytest.raises(locks.Busy, match=rf"run dead .*\(process {run.pid} was killed"), locks.locked(root, "b"):  # fmt: skip
        pytest.fail("a stage of the killed run works in there")
    run.stdin.close()  # the child ends
    assert run.stdout is not None
    run.stdout.read()
    _until_free(root)


def _until_free(root: Path) -> None:
    for _ in range(1000):
        try:
            with locks.locked(root, "next"):
                return
        except locks.Busy:
            continue
    pytest.fail("the lock never became free")


def test_overrides_are_written_with_every_comment_kept(root: Path) -> None:
    source = DEFAULTS
    made = worktrees.effective(source.read_bytes(), "params.yaml", ["distill.epochs=3.5", "package.choose=fastest"])
    assert (made.params.distill.epochs, made.params.package.choose) == (3.5, "fastest")
    before, after = source.read_text().splitlines(), made.text.splitlines()
    assert len(before) == len(after)
    changed = [new.split(":")[0].strip() for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["epochs", "choose"]


def test_wrong_values_leave_params_yaml_alone(root: Path) -> None:
    before = lines(root)
    with pytest.raises(ConfigError, match=r"distill\.epoch: .*'epochs'"), worktrees.in_place(root, "a", None, ["distill.epoch=3"]):  # fmt: skip
        pytest.fail("a run would start")
    assert lines(root) == before


def test_a_params_file_never_replaces_changes_that_are_not_committed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("recipes") / "other.yaml"
    raw = yaml.safe_load((root / "params.yaml").read_text())
    raw["finetune"]["epochs"] = 5.0
    other.write_text(yaml.safe_dump(raw))
    (root / "params.yaml").write_text((root / "params.yaml").read_text() + "# mine\n")
    with (
        pytest.raises(ConfigError, match=r"params\.yaml .*--params .*--worktree"),
        worktrees.in_place(root, "a", other, []),
    ):
        pytest.fail("a run would start")
    assert lines(root)[-1] == "# mine"
    git(root, "checkout", "params.yaml")
    with worktrees.in_place(root, "a", other, ["distill.epochs=6.0"]) as checked:
        assert checked.distill.epochs == 6.0
    assert yaml.safe_load((root / "params.yaml").read_text())["finetune"]["epochs"] == 5.0
    assert yaml.safe_load((root / "params.yaml").read_text())["distill"]["epochs"] == 6.0


def test_a_worktree_has_its_own_params_the_shared_cache_and_an_end_on_its_branch(root: Path) -> None:
    (root / "notes.txt").write_text("staged, and none of a run's business")
    git(root, "add", "notes.txt")
    with at_work(root, "one", "HEAD", ["distill.epochs=7.0"]) as place:
        assert place == root / ".runs" / "one"
        assert yaml.safe_load((place / "params.yaml").read_text())["distill"]["epochs"] == 7.0
        assert versioning.cache_folder(place) == versioning.cache_folder(root)
        assert [(run.name, run.state) for run in worktrees.runs(root)] == [("one", "running")]
        with pytest.raises(ConfigError, match="run one still works"):
            worktrees.prune(root, ["one"])
        (place / "dvc.lock").write_text("schema: '2.0'\n")
        made = worktrees.finish(place, "one", "Run one")
    assert git(root, "rev-parse", "runs/one") == made
    assert set(git(root, "show", "--name-only", "--format=", "runs/one").split()) == {"params.yaml", "dvc.lock"}
    assert git(root, "status", "--porcelain") == "A  notes.txt"
    assert [(run.name, run.state) for run in worktrees.runs(root)] == [("one", "finished")]

    assert worktrees.prune(root) == ["one"]
    assert worktrees.runs(root) == []
    assert not (root / ".runs" / "one").exists()
    assert git(root, "rev-parse", "runs/one") == made
    with (
        pytest.raises(ConfigError, match="branch runs/one"),
        at_work(root, "one", "HEAD", []),
    ):
        pytest.fail("a finished run would be overwritten")


def test_a_run_that_stopped_is_taken_up_again(root: Path) -> None:
    with at_work(root, "two", "HEAD", ["distill.epochs=7.0"]) as place:
        (place / "build").mkdir()
        (place / "build" / "left").write_text("half a run")
    assert [run.state for run in worktrees.runs(root)] == ["stopped"]
    assert worktrees.prune(root) == []
    with at_work(root, "two", "HEAD", []) as place:
        assert (place / "build" / "left").exists()
        assert yaml.safe_load((place / "params.yaml").read_text())["distill"]["epochs"] == 7.0
    assert worktrees.prune(root, ["two"]) == ["two"]
    assert git(root, "branch", "--list", "runs/two") == ""
    with pytest.raises(ConfigError, match="two: `slmops runs`"):
        worktrees.prune(root, ["two"])


def test_a_commit_needs_no_configured_person(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    with at_work(root, "anon", "HEAD", []) as place:
        (place / "dvc.lock").write_text("schema: '2.0'\n")
        worktrees.finish(place, "anon", "Run anon")
    assert git(root, "log", "-1", "--format=%an", "runs/anon") == "slmops"


@pytest.mark.parametrize(
    ("name", "revision", "override", "message"),
    [
        ("../out", "HEAD", "machine.retries=0", "--name .* 63 "),
        ("a b", "HEAD", "machine.retries=0", "--name .* 63 "),
        ("logs", "HEAD", "machine.retries=0", "--name .* 63 "),
        ("x", "nowhere", "machine.retries=0", "invalid object name"),
        ("x", "HEAD", "quantize.variants=[q9]", "quantize.variants"),
        ("x", "HEAD", "acquire.watch=elsewhere", r"watch \(elsewhere\)"),
    ],
)
def test_a_worktree_that_cannot_be_leaves_nothing_behind(
    root: Path, name: str, revision: str, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message), at_work(root, name, revision, [override]):
        pytest.fail("it was made")
    assert git(root, "branch", "--list", "runs/*") == ""
    assert git(root, "worktree", "list").count("\n") == 0


def test_local_inputs_must_be_part_of_the_commit(root: Path) -> None:
    git(root, "rm", "-rq", "--cached", "data")
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "/data\n")
    commit(root)
    with pytest.raises(ConfigError, match=r"acquire\.watch \(data\).*`dvc add`"), at_work(root, "x", "HEAD", []):  # fmt: skip
        pytest.fail("the data would be missing")

    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=root, check=True)
    git(root, "add", "-f", "data.dvc")
    commit(root)
    with at_work(root, "x", "HEAD", []) as place:
        assert (place / "data" / "rows" / "train.jsonl").read_text() == "{}\n"


def test_a_file_that_no_commit_holds_is_refused_before_a_worktree_is_made(root: Path) -> None:
    (root / "data" / "mine.jsonl").write_text("{}\n")
    with (
        pytest.raises(ConfigError, match=r"data/mine\.jsonl .*commit HEAD"),
        at_work(root, "x", "HEAD", ["acquire.data.path=data/mine.jsonl"]),
    ):
        pytest.fail("there would be no such file")
    assert not (root / ".runs" / "x").exists()
    commit(root)
    with at_work(root, "x", "HEAD", ["acquire.data.path=data/mine.jsonl"]) as place:
        assert (place / "data" / "mine.jsonl").is_file()


def test_changes_that_a_worktree_does_not_see_are_listed(root: Path) -> None:
    assert worktrees.uncommitted(root) == []
    (root / "params.yaml").write_text((root / "params.yaml").read_text() + "# mine\n")
    assert worktrees.uncommitted(root) == ["params.yaml"]
    assert worktrees.new_files(root) == []
    (root / "data" / "mine.jsonl").write_text("{}\n")
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("a")
    assert worktrees.new_files(root) == ["data/mine.jsonl", "notes/"]


# --- DVC's own files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content", "way_out"),
    [
        (".dvc/tmp/rwlock", '{"read": {', "rwlock is damaged"),
        (".dvc/tmp/rwlock", "[]", "rwlock is damaged"),
        ("dvc.lock", "schema: '2.0'\nstages:\n  acquire: {cmd", "git checkout dvc.lock"),
        ("dvc.lock", "", "git checkout dvc.lock"),
    ],
)
def test_what_a_kill_left_of_dvcs_files_is_named_with_the_way_out(
    root: Path, path: str, content: str, way_out: str
) -> None:
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(content)
    with pytest.raises(ArtifactError, match=way_out):
        versioning.check_state(root)
    # The same when dvc stumbles over it in the middle of a run.
    with pytest.raises(ArtifactError, match=way_out):
        versioning.repro(root, "acquire", log=root / ".runs" / "log")


def test_a_lock_of_dvcs_by_a_number_that_came_round_again_is_named(root: Path) -> None:
    path = root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(exist_ok=True)
    with subprocess.Popen(["sleep", "600"]) as other, subprocess.Popen(["sh", "-c", ": dvc; sleep 600; :"]) as dvc:
        held = {"pid": other.pid, "cmd": "dvc repro"}
        for text in ({"write": {"build/acquire": held}}, {"read": {"build/acquire": [held]}}):
            path.write_text(json.dumps(text))
            with pytest.raises(ArtifactError, match=f"{path} .*{other.pid}.*sleep 600"):
                versioning.check_state(root)
        other.kill()
        other.wait()
        versioning.check_state(root)  # DVC sees that
        path.write_text(json.dumps({"write": {"build/acquire": held | {"pid": dvc.pid}}}))
        versioning.check_state(root)  # it works
        dvc.kill()


def test_a_missing_section_is_explained(root: Path) -> None:
    raw = yaml.safe_load((root / "params.yaml").read_text())
    del raw["task"]
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"'task' .*params\.yaml .*dvc\.yaml"):
        versioning.repro(root, "acquire", log=root / ".runs" / "log")


@pytest.mark.parametrize(("section", "key"), [("task", None), ("measure", "repeats"), ("select", "seeds")])
def test_a_key_that_dvc_reads_is_missed_before_the_work(root: Path, section: str, key: str | None) -> None:
    raw = yaml.safe_load((root / "params.yaml").read_text())
    if key:
        del raw[section][key]
    else:
        del raw[section]
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    with (
        pytest.raises(ConfigError, match=f"{section}.{key}" if key else section),
        worktrees.in_place(root, "a", None, []),
    ):
        pytest.fail("a run would start")


def test_a_missing_pointer_in_the_cache_is_a_stage_error(root: Path) -> None:
    with pytest.raises(StageError, match=r"dvc checkout nothing\.dvc"):
        versioning.checkout(root, "nothing.dvc")


def ended(root: Path, name: str, *overrides: str) -> Path:
    """A worktree whose run is finished."""
    with at_work(root, name, "HEAD", overrides) as place:
        (place / "dvc.lock").write_text("schema: '2.0'\n")
        worktrees.finish(place, name, f"Run {name}")
    return place


def test_a_worktree_uses_the_remotes_and_local_settings_of_its_checkout(root: Path) -> None:
    for command in (
        ["remote", "add", "-d", "store", "../store"],  # not committed
        ["remote", "modify", "--local", "store", "verify", "false"],
        ["remote", "add", "--local", "cloud", "s3://models/here"],
        ["remote", "modify", "--local", "cloud", "secret_access_key", '100%, "quoted" # secret'],
    ):
        dvc(root, *command)
    before = dvc(root, "config", "--list")
    with at_work(root, "shares", "HEAD", []) as place:
        assert dvc(place, "config", "core.remote") == "store\n"
        remotes = [line.split()[:2] for line in dvc(place, "remote", "list").splitlines()]
        assert remotes == [["store", str(root.parent / "store")], ["cloud", "s3://models/here"]]
        secret = "remote.cloud.secret_access_key="
        (ours,) = [line for line in before.splitlines() if line.startswith(secret)]
        assert ours in dvc(place, "config", "--list").splitlines()
        assert (place / ".dvc" / "config.local").stat().st_mode & 0o077 == 0
        assert "config.local" not in git(place, "status", "--porcelain")


def dvc(root: Path, *arguments: str) -> str:
    done = subprocess.run([*dvc_python(), *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_commit_that_git_would_take_for_an_option_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="--commit --output="):
        worktrees.planned(root, "one", f"--output={root}/x", None, [])
    assert worktrees.planned(root, "one", "HEAD~0", None, [])


def test_a_branch_of_a_remote_is_fetched_before_it_is_run(root: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(root, "clone", "-q", str(root), str(clone))
    git(root, "commit", "-q", "--allow-empty", "-m", "newer")
    branch = git(root, "branch", "--show-current")
    for asked, new in (("HEAD", False), (f"origin/{branch}", True)):
        worktrees.fetch(clone, asked)
        assert (git(clone, "rev-parse", f"origin/{branch}") == git(root, "rev-parse", "HEAD")) == new


def test_one_run_at_a_time_holds_a_model(root: Path) -> None:
    def hold(model: str, name: str) -> AbstractContextManager[None]:
        return locks.one_at_a_time(root, model, name)

    busy = pytest.raises(locks.Busy, match=r"run first .*lamps: .*package\.name")
    with hold("lamps", "first"), hold("doors", "beside"), busy, hold("lamps", "second"):
        pytest.fail("two runs work on one model")
    with hold("lamps", "second"):
        pass


def test_the_model_of_a_killed_run_is_free_at_once(root: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from flows.workspace import locks\n"
        "with locks.one_at_a_time(Path(sys.argv[1]), 'lamps', 'dead'):\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        with pytest.raises(locks.Busy, match=r"run dead .*lamps"), locks.one_at_a_time(root, "lamps", "next"):
            pytest.fail("two runs work on one model")
        run.kill()
        run.wait()
        with locks.one_at_a_time(root, "lamps", "next"):
            assert (root / ".runs" / "models" / "lamps").read_text() == "next"


def test_old_worktrees_go_but_none_that_works_or_waits(root: Path) -> None:
    for name in ("a", "b", "c", "d"):
        ended(root, name)
    files.write(paths.question(root / ".runs" / "b"), "{}")
    with locks.locked(root / ".runs" / "a", "a"):
        assert worktrees.retire(root, 1) == ["c"]
    assert [(run.name, run.state) for run in worktrees.runs(root)] == [
        ("a", "finished"), ("b", "waiting"), ("d", "finished"),
    ]  # fmt: skip
    assert git(root, "show", "runs/c:params.yaml")
    assert set(worktrees.finished(root)) == {"a", "b", "c", "d"}
    with pytest.raises(ConfigError, match="run b waits for approval"):
        worktrees.prune(root, ["b"])
    assert worktrees.retire(root, 5) == []
    for name in ("e", "f"):  # runs that stopped on the way
        with at_work(root, name, "HEAD", []):
            pass
    assert worktrees.retire(root, 1) == ["a", "e"]
    assert git(root, "branch", "--list", "runs/*", "--format=%(refname:short)").split() == [
        f"runs/{each}" for each in "abcdf"
    ]


def test_gc_keeps_what_branches_worktrees_and_the_checkout_need_and_asks_first(root: Path) -> None:
    cache = versioning.cache_folder(root) / "files" / "md5"

    def held(place: Path | None, name: str) -> Path:
        """A file in the cache that a .dvc file in `place` names."""
        digest = hashlib.md5(name.encode()).hexdigest()
        path = cache / digest[:2] / digest[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        out = {"md5": digest, "size": len(name), "hash": "md5", "path": name}
        if place:
            (place / f"{name}.dvc").write_text(yaml.safe_dump({"outs": [out]}))
        return path

    git(root, "checkout", "-q", "-b", "runs/done")
    kept = [held(root, "of-a-branch")]
    commit(root)
    git(root, "checkout", "-q", "main")
    tree = root / ".runs" / "stopped"
    git(root, "worktree", "add", "-q", "-b", "runs/stopped", str(tree))
    versioning.share(tree, root)
    kept += [held(tree, "of-a-worktree"), held(root, "of-the-checkout")]
    loose = held(None, "of-nothing")
    worktrees.collect(root, do=False)
    assert loose.exists()
    worktrees.collect(root, do=True)
    assert [path.exists() for path in [*kept, loose]] == [True, True, True, False]
    with locks.locked(tree, "stopped"), pytest.raises(ConfigError, match="stopped"):
        worktrees.collect(root, do=True)

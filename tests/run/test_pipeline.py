"""What the flow does around the stages, with toy stages."""

import json
import os
import signal
import sqlite3
import subprocess
import urllib.error
from pathlib import Path

import pytest
from checkout import (
    SLMOPS,
    ask,
    environment,
    git,
    holding,
    make_toy,
    prefect_server,
    read,
    run_toy,
    runs,
    slmops,
    started,
    wait_for,
)

from flows.tracking import mlflow_store
from flows.workspace import versioning
from tasks import params
from tasks.errors import BrokenRuntimeError, ConfigError, PipelineError, StageError
from tasks.frame import jsonl
from tasks.frame.items import Item
from tasks.stages import STAGES

DEADLINE_S = 300
ONE = ("--set", "quantize.variants=[q4_0]")  # where it is not the variants that matter
SLOW_SIGTERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)  # what is stopped in a background is, by it


def test_params_that_are_edited_during_a_run_end_it_at_the_first_stage_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.run import stage_task
    from flows.workspace import worktrees

    toy = make_toy(tmp_path)
    path = toy / "params.yaml"
    began = params.load(path)

    def work(stage: str) -> stage_task.StageRun:
        return stage_task.StageRun(toy, "r", stage, Item(), False, began.digest(STAGES[stage].sections))

    monkeypatch.setenv("TOY_LOG", str(toy / "toy.log"))
    monkeypatch.setattr(stage_task, "_artifact", lambda name: lambda event: None)  # Prefect's part needs its server
    with worktrees.in_place(toy, "r", None, ()):
        path.write_text(path.read_text().replace("keep_runs: 5", "keep_runs: 6"))  # no stage reads it
        assert stage_task.reproduce(work("acquire")).how == "ran"
        path.write_text(path.read_text().replace("epochs: 1.0", "epochs: 2.0"))
        with pytest.raises(ConfigError):
            stage_task.reproduce(work("finetune"))
    assert started(toy) == ["acquire"]
    assert [event["event"] for event in jsonl.read(work("finetune").events)] == ["begin", "fail"]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy(tmp_path)


def test_a_run_is_told_everywhere_and_the_next_finds_it_done(toy: Path) -> None:
    done = run_toy(toy, "--name", "one", HF_TOKEN="hf_planted")
    assert done.returncode == 0, done.stderr
    everything = ["acquire", "finetune", "teach", "prune", "distill-17", "select", "convert"]
    variants = {f"{stage}-{variant}" for stage in ("quantize", "validate") for variant in ("q8_0", "q4_0")}
    variants |= {f"{stage}-{variant}-desktop" for stage in ("measure", "judge") for variant in ("q8_0", "q4_0")}
    assert started(toy)[:7] == everything
    assert set(started(toy)[7:-1]) == variants
    assert started(toy)[-1] == "package"
    assert "q4_0" in done.stderr
    assert "version 1 registered" in done.stdout

    names = dict(runs(toy))
    assert names == dict.fromkeys(("one", "acquire", "finetune", "teach", "prune", "distill@17", "select", "convert", "quantize@q8_0", "quantize@q4_0", "validate@q8_0", "validate@q4_0", "measure@q8_0-desktop", "measure@q4_0-desktop", "judge@q8_0-desktop", "judge@q4_0-desktop", "package"), "FINISHED")  # fmt: skip
    store = mlflow_store.client(toy)
    by_name = {run.data.tags["mlflow.runName"]: run for run in store.search_runs([mlflow_store.experiment(store, toy)])}
    parent, child = by_name["one"], by_name["validate@q4_0"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["slmops.cached"] == "false"
    assert child.data.metrics["accuracy"] == 0.9
    assert by_name["measure@q4_0-desktop"].data.metrics["ttft_p95_s"] == 0.2
    assert [point.value for point in store.get_metric_history(by_name["distill@17"].info.run_id, "loss")] == [1, 1 / 2, 1 / 3, 1 / 4]  # fmt: skip
    assert parent.data.params["package.name"] == "home-commands"
    assert parent.data.tags["slmops.git_commit"] == git(toy, "rev-parse", "HEAD")
    assert len(parent.data.tags["slmops.dvc_lock"]) == 64
    assert by_name["acquire"].inputs.dataset_inputs[0].dataset.name == "train"
    assert parent.data.metrics["accuracy"] == 0.9  # of what it ships, so that runs can be compared
    (model,) = parent.outputs.model_outputs
    measured = {metric.key: metric.value for metric in store.get_logged_model(model.model_id).metrics}
    assert (measured["accuracy_retention"], measured["ttft_p95_s"]) == (0.98, 0.2)
    assert store.get_model_version("home-commands", "1").source == f"models:/{model.model_id}"
    assert parent.inputs.dataset_inputs[0].dataset.name == "train"
    assert "report.html" in {file.path for file in store.list_artifacts(parent.info.run_id)}

    with sqlite3.connect(Path(environment(toy)["PREFECT_HOME"]) / "prefect.db") as prefect:
        (data,) = prefect.execute("select data from artifact where key = 'result' order by created desc").fetchone()
        known = {"distill-17", "quantize-q4_0", "validate-q8_0"}  # the server writes them down when it comes to it
        wait_for(lambda: known <= {name for (name,) in prefect.execute("select name from task_run")})
        pictures = dict(prefect.execute("select key, data from artifact where type = 'image'"))
    assert "| q4_0 | pass | 90.0 % |" in data
    assert {"size-accuracy", "first-token", "decode-speed", "fine-tuning"} <= pictures.keys()
    assert all("data:image/svg+xml;base64," in picture for picture in pictures.values())

    assert "planted" not in done.stdout + done.stderr
    assert [*holding(toy, b"planted"), *holding(Path(environment(toy)["PREFECT_HOME"]), b"planted")] == []

    # Where nothing is to be done no server is asked, and nothing is recorded; a report that is gone is written again.
    (toy / "report.html").unlink()
    again = slmops(toy, "run", "--name", "two", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert again.returncode == 0, again.stderr
    assert len(started(toy)) == 16
    assert "everything is up to date" in again.stdout
    assert "version 1 was registered before" in again.stdout
    assert "q4_0" in again.stderr
    assert (toy / "report.html").is_file()
    assert dict(runs(toy)) == names


def test_work_that_failed_is_tried_again(toy: Path) -> None:
    fails = json.dumps({"finetune": ["StageError", 1]})
    done = run_toy(toy, *ONE, TOY_FAIL=fails)
    assert done.returncode == 0, done.stderr
    assert started(toy).count("finetune") == 2
    assert runs(toy).count(("finetune", "FINISHED")) == 1


@pytest.mark.parametrize(
    "family",
    ["ConfigError", *(pytest.param(each, marks=pytest.mark.slow) for each in ("DiskFullError", "BrokenRuntimeError"))],
)
def test_what_waiting_does_not_mend_is_not_tried_again(toy: Path, family: str) -> None:
    done = run_toy(toy, "--name", "wrong", TOY_FAIL=json.dumps({"finetune": [family, 9]}))
    assert (done.returncode, started(toy)) == (1, ["acquire", "finetune"])
    assert done.stderr.splitlines()[-1] == "error: finetune: told to fail: do not tell it"
    assert "Traceback" not in done.stderr
    assert dict(runs(toy)) == {"wrong": "FAILED", "acquire": "FINISHED", "finetune": "FAILED"}


def test_one_failing_variant_stops_only_what_needs_it(toy: Path) -> None:
    done = run_toy(toy, TOY_FAIL=json.dumps({"quantize-q4_0": ["ArtifactError", 9]}))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: quantize@q4_0: told to fail: do not tell it"
    assert "validate-q8_0" in started(toy)
    assert not {"validate-q4_0", "measure-q4_0-desktop", "judge-q4_0-desktop", "package"} & set(started(toy))


def test_a_bug_in_a_stage_is_told_with_its_log(toy: Path) -> None:
    (toy / "tasks" / "finetune" / "stage.py").write_text("def finetune(params, **rest):\n    os.getcwd()\n")
    done = run_toy(toy, "--set", "machine.retries=0", "--name", "bug")
    assert done.returncode == 1
    assert "finetune ended with exit code 1" in done.stderr
    assert "NameError: name 'os' is not defined" in done.stderr
    assert "Traceback" in (toy / ".runs" / "logs" / "bug" / "finetune.log").read_text()


@pytest.mark.parametrize(
    ("end", "family", "words"),
    [
        ("ctypes.string_at(0)", BrokenRuntimeError, ["SIGSEGV", "tasks/acquire/stage.py", "slmops doctor"]),
        ("os.kill(os.getpid(), 9)", StageError, ["SIGKILL", "machine.parallel"]),
    ],
)
def test_a_stage_that_ends_by_a_signal_is_told_as_that(
    toy: Path, monkeypatch: pytest.MonkeyPatch, end: str, family: type[Exception], words: list[str]
) -> None:
    code = f"import ctypes, os\n\ndef acquire(params, **rest):\n    {end}\n"
    (toy / "tasks" / "acquire" / "stage.py").write_text(code)
    for name, value in environment(toy).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError) as told:
        versioning.repro(toy, "acquire", log=toy / "acquire.log")
    assert type(told.value) is family
    for word in ("acquire", *words):
        assert word in str(told.value)
    assert ("machine.parallel" in str(told.value)) == (family is StageError)


@pytest.mark.parametrize("number", [signal.SIGINT, SLOW_SIGTERM])
def test_a_run_that_is_stopped_ends_truly(toy: Path, number: signal.Signals) -> None:
    # Where pytest itself runs in a shell's background, SIGINT is ignored, and would be by what it starts.
    command = ["env", "--default-signal=INT", SLMOPS, "run", "--name", "stopped"]
    env = environment(toy, PREFECT_API_URL=prefect_server(), TOY_WAIT=json.dumps({"distill-17": 600}))
    with subprocess.Popen(command, cwd=toy, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: "distill-17" in started(toy))
        run.send_signal(number)
        _, said = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert said.splitlines()[-1].startswith("error: stopped")
    assert dict(runs(toy)) == {
        "stopped": "KILLED",
        "acquire": "FINISHED",
        "finetune": "FINISHED",
        "teach": "FINISHED",
        "prune": "FINISHED",
        "distill@17": "KILLED",
    }

    again = run_toy(toy, *ONE)
    assert again.returncode == 0, again.stderr
    assert started(toy).count("finetune") == 1


def test_ctrl_c_at_a_terminal_ends_a_run_with_a_server_of_its_own(toy: Path) -> None:
    """A terminal sends it to all processes of the run at once: Prefect's server must still be there to hear how it ended."""
    command = ["env", "--default-signal=INT", SLMOPS, "run", "--name", "stopped"]
    env = environment(toy, TOY_WAIT=json.dumps({"finetune": 600}))
    with subprocess.Popen(
        command, cwd=toy, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        wait_for(lambda: "finetune" in started(toy))
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 130
    assert said.splitlines()[-1].startswith("error: stopped by hand")
    assert "they are lost" not in said
    assert dict(runs(toy)) == {"stopped": "KILLED", "acquire": "FINISHED", "finetune": "KILLED"}
    with sqlite3.connect(Path(environment(toy)["PREFECT_HOME"]) / "prefect.db") as prefect:
        states = dict(prefect.execute("select name, state_name from task_run"))
    assert states["finetune"] not in ("Running", "Pending")


def test_what_is_stopped_in_a_background_starts_nothing_more(toy: Path) -> None:
    """A shell's background jobs ignore SIGINT, and under nohup SIGHUP."""
    words = f"trap '' INT HUP; exec {SLMOPS} run --name stopped --set machine.parallel=1"
    slow = {"quantize-q8_0": 600, "quantize-q4_0": 600}
    env = environment(toy, PREFECT_API_URL=prefect_server(), TOY_WAIT=json.dumps(slow))
    with subprocess.Popen(["/bin/sh", "-c", words], cwd=toy, env=env, stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: "quantize-q8_0" in started(toy))
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(2)
        run.send_signal(signal.SIGTERM)
        try:
            _, said = run.communicate(timeout=DEADLINE_S)
        finally:
            run.kill()
    assert run.returncode == 143, said
    assert started(toy)[-1] == "quantize-q8_0"
    log = (toy / ".runs" / "logs" / "stopped" / "quantize-q8_0.log").read_text()
    assert "stopped by hand" in log  # the stage heard it, and was not killed


def test_a_second_run_is_refused_by_name(toy: Path) -> None:
    command = [SLMOPS, "run", "--name", "long"]
    env = environment(toy, TOY_WAIT=json.dumps({"distill-17": 600}))
    with subprocess.Popen(command, cwd=toy, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        try:
            wait_for(lambda: "distill-17" in started(toy))
            before = (toy / "params.yaml").read_text()
            with pytest.raises(urllib.error.HTTPError) as refused:  # its own Prefect server is for nobody else
                ask(f"http://127.0.0.1:{own_port(run.pid)}/api/flows/filter", {})
            second = slmops(toy, "run", "--name", "second", "--set", "distill.epochs=9.0")
        finally:
            run.kill()
    assert refused.value.code == 401
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: run long works in {toy} since ")
    assert (toy / "params.yaml").read_text() == before

    # The stage ends with the killed run, and the next run takes up and ends what else is left.
    assert len(carriers(run.pid)) >= 3  # Prefect's server, dvc and the stage
    third = slmops(toy, "run", *ONE)
    assert third.returncode == 0, third.stderr
    assert started(toy).count("finetune") == 1
    assert runs(toy).count(("long", "KILLED")) == 1
    assert runs(toy).count(("distill@17", "KILLED")) == 1
    wait_for(lambda: not carriers(run.pid))


def carriers(pid: int) -> list[int]:
    """Processes that a run started, known by the mark that they carry."""
    wanted = f"SLMOPS_RUN_PID={pid}".encode()
    found = [
        int(entry.name) for entry in Path("/proc").glob("[0-9]*") if wanted in read(entry / "environ").split(b"\0")
    ]
    return [each for each in found if each != pid]


def own_port(pid: int) -> int:
    """Where the Prefect server that a run started for itself listens."""
    commands = [read(Path(f"/proc/{each}/cmdline")).split(b"\0") for each in carriers(pid)]
    command, *_ = (words for words in commands if b"prefect.server.api.server:create_app" in words)  # and its watcher's
    return int(command[command.index(b"--port") + 1])


def test_where_one_student_fails_for_good_no_other_begins(toy: Path) -> None:
    done = run_toy(toy, "--set", "select.seeds=[1, 2]", TOY_FAIL=json.dumps({"distill-1": ["ConfigError", 9]}))
    assert done.stderr.splitlines()[-1] == "error: distill@1: told to fail: do not tell it"
    assert started(toy) == ["acquire", "finetune", "teach", "prune", "distill-1"]

"""The whole stage on tiny files: its reports, equal bytes whatever the threads, clear errors."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import DEFAULTS, wait_for
from conftest import ROOMS, tiny_rows, write_jsonl
from gguf_inputs import ROOT, converted, quantized, stage_input

from tasks import params
from tasks.errors import ArtifactError
from tasks.frame import cores
from tasks.metrics import METRICS
from tasks.models.params import Task
from tasks.validate.params import Validate
from tasks.validate.stage import validate
from tasks.variants import VARIANTS

EXACT = {metric.name for metric in METRICS.values() if metric.better and not metric.measured}


@pytest.fixture(scope="module")
def inputs(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("inputs")
    rows = tiny_rows(ROOMS[:4])
    write_jsonl(home / "source" / "data" / "test.jsonl", rows)
    distilled = stage_input(tiny_model_folder, home / "distilled")
    references = [row["messages"][-1]["content"] for row in rows]
    taught = [{"reference": text, "teacher_correct": i % 4 != 0} for i, text in enumerate(references)]
    write_jsonl(distilled / "predictions.jsonl", taught)
    return {"source": home / "source", "distilled": distilled, "converted": converted(tiny_model_folder)}


def settings(**changes: object) -> params.Params:
    return params.load(DEFAULTS).only(("task", "validate")).model_copy(
        update={
            "validate_": Validate(context=64, windows=3, gates=(), **changes),
            "task": Task(max_new_tokens=8),
        }
    )  # fmt: skip


def run(inputs: dict[str, Path], artifact: Path, variant: str, out: Path) -> dict[str, float]:
    out.mkdir(parents=True)
    return validate(settings(), **inputs, artifact=artifact, variant=variant, out=out)


@pytest.fixture(scope="module", params=["q8_0", "onnx-int4"])
def done(request: pytest.FixtureRequest, inputs: dict, tiny_model_folder: Path, tmp_path_factory) -> tuple:
    artifact = quantized(tiny_model_folder, request.param)
    out = tmp_path_factory.mktemp("validate") / request.param
    return request.param, artifact, out, run(inputs, artifact, request.param, out)


def test_the_reports_hold_what_their_readers_expect(done: tuple, inputs: dict) -> None:
    variant, artifact, out, returned = done
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) > EXACT
    assert set(returned) <= EXACT
    assert all(returned[name] == metrics[name] for name in returned)
    shipped = VARIANTS[variant].weights(artifact)
    files = [shipped] if shipped.is_file() else list(shipped.iterdir())
    assert metrics["size_bytes"] == sum(file.stat().st_size for file in files)
    yardstick = (inputs["converted"] / "teacher.gguf").stat().st_size
    assert metrics["size_ratio"] == pytest.approx(metrics["size_bytes"] / yardstick)
    assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / metrics["reference_perplexity"])
    assert 0 < metrics["mean_kld"] < 1


def test_predictions_follow_the_test_rows(done: tuple, inputs: dict) -> None:
    lines = [json.loads(line) for line in (done[2] / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (inputs["source"] / "data" / "test.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == [row["messages"][-1]["content"] for row in rows]
    assert {tuple(line) for line in lines} == {("reference", "answer", "correct", "teacher_correct")}
    assert [line["teacher_correct"] for line in lines] == [i % 4 != 0 for i in range(len(lines))]


def test_quality_is_the_same_bytes_whatever_the_threads(
    done: tuple, inputs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, artifact, out, _ = done
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        run(inputs, artifact, variant, tmp_path / threads)
        for name in ("metrics.json", "predictions.jsonl"):
            assert (tmp_path / threads / name).read_bytes() == (out / name).read_bytes()


def test_text_that_came_with_the_data_is_scored(inputs: dict, tiny_model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(inputs["source"], source)
    (source / "data" / "text.txt").write_text("The lamp in the kitchen went on. " * 40)
    run(inputs | {"source": source}, quantized(tiny_model_folder, "q8_0"), "q8_0", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["scored_tokens"] == 3 * 31


def test_predictions_of_other_rows_are_refused(inputs: dict, tiny_model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_jsonl(source / "data" / "test.jsonl", tiny_rows(ROOMS[4:6]))
    with pytest.raises(ArtifactError, match="other test rows"):
        run(inputs | {"source": source}, quantized(tiny_model_folder, "q8_0"), "q8_0", tmp_path / "out")


def test_a_missing_file_is_named(inputs: dict, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.gguf .*quantize q4_0"):
        run(inputs, tmp_path, "q4_0", tmp_path / "out")


HOLDER = """
import sys
from pathlib import Path
from tasks.frame import cores
name, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
log = (folder / "log").open("a", buffering=1)
with getattr(cores, kind)(folder):
    log.write(name + " in\\n")
    sys.stdin.read()
    log.write(name + " out\\n")
"""


def test_a_measurement_waits_for_work_and_keeps_new_work_out(tmp_path: Path) -> None:
    running: dict[str, subprocess.Popen] = {}
    log = tmp_path / "log"
    log.touch()

    def start(name: str, kind: str) -> None:
        command = [sys.executable, "-c", HOLDER, name, kind, str(tmp_path)]
        running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)

    def queued() -> bool:
        """Whether someone stands in the turnstile, waiting for the lock."""
        with (tmp_path / ".quiet.turnstile").open("a") as turnstile:
            try:
                fcntl.flock(turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    try:
        for name in ("first", "second"):
            start(name, "busy")
            wait_for(lambda name=name: f"{name} in" in log.read_text(), log.read_text)  # side by side
        start("measurement", "quiet")
        wait_for(queued, log.read_text)
        start("later", "busy")
        for name in ("first", "second", "measurement", "later"):
            wait_for(lambda name=name: f"{name} in" in log.read_text(), log.read_text)
            running[name].stdin.close()
            wait_for(lambda name=name: f"{name} out" in log.read_text(), log.read_text)
        assert log.read_text().split("\n")[:-1] == [
            "first in", "second in", "first out", "second out", "measurement in", "measurement out", "later in", "later out",
        ]  # fmt: skip
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def test_threads_come_from_the_callers_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores.threads() == 3
    for unset in ("", "0", "four"):
        monkeypatch.setenv("OMP_NUM_THREADS", unset)
        assert cores.threads() == cores.available()

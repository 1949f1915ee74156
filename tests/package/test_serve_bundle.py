"""The bundles run: the server answers over HTTP what the model answers in training's own library, and stops."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_inputs import ROWS, add_variant, answer, inputs, settings, to_gguf, to_onnx, trained

from tasks.models import chat, loading
from tasks.package.stage import package

DEADLINE = 120.0  # seconds; a busy machine is slow, a broken server never comes


@pytest.fixture(scope="session")
def model(tiny_model_folder: Path) -> Path:
    return trained(tiny_model_folder)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """The llama-server bundle, started by its own start command on a free port."""
    import yaml
    from checkout import DEFAULTS

    root = tmp_path_factory.mktemp("serve")
    folders = inputs(root / "build", model)
    add_variant(root / "build", "f16", to_gguf(model))
    raw = yaml.safe_load(DEFAULTS.read_text())
    package(settings(raw, ["f16"], targets=["llama-server"]), **folders, out=root / "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHON": sys.executable, "PORT": str(port), "HOST": "127.0.0.1"}
    bundle = root / "out" / "llama-server"
    with (root / "server.log").open("wb") as log:
        server = subprocess.Popen([bundle / "start.sh"], env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + DEADLINE
        while not _healthy(bundle, environment):
            assert server.poll() is None, (root / "server.log").read_text()
            assert time.monotonic() < end, (root / "server.log").read_text()
        yield bundle, port
    finally:
        server.terminate()
        server.wait(timeout=DEADLINE)


def _healthy(bundle: Path, environment: dict[str, str]) -> bool:
    command = [sys.executable, bundle / "healthcheck.py"]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def ask(port: int, request: dict) -> dict:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    body = json.dumps(request).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=60
    ) as got:
        return json.load(got)


@pytest.mark.parametrize("row", ROWS, ids=[row[1]["content"] for row in ROWS])
def test_the_server_answers_as_the_model_does_and_stops(served: tuple[Path, int], model: Path, row: chat.Messages):
    reply = ask(served[1], {"messages": row[:-1], "temperature": 0, "repeat_penalty": 1.0, "max_tokens": 64})
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == answer(model, row[:-1]) == row[-1]["content"]
    assert reply["usage"]["prompt_tokens"] == len(chat.prompt_ids(loading.load_tokenizer(model), row[:-1]))


def test_the_request_in_the_readme_gives_the_answer_in_the_readme(served: tuple[Path, int]):
    text = (served[0] / "README.md").read_text()
    request = json.loads(re.search(r"<<'JSON'\n(.*?)\nJSON\n", text, re.S)[1])
    expected = re.search(r"expected answer here: `(.*)`", text)[1]
    assert ask(served[1], request)["choices"][0]["message"]["content"] == expected


def test_the_onnx_bundle_answers_as_its_readme_says(model: Path, tmp_path: Path, tiny_params: dict):
    folders = inputs(tmp_path / "build", model)
    add_variant(tmp_path / "build", "onnx-int4", to_onnx(model))
    out = tmp_path / "out"
    package(settings(tiny_params, ["onnx-int4"], targets=["onnx-genai"]), **folders, out=out)
    code = re.search(r"```python\n(.*?)```", (out / "onnx-genai/README.md").read_text(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out / "onnx-genai", capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith(ROWS[0][-1]["content"])
    entry = json.loads((out / "onnx-genai" / "register.json").read_text())
    assert entry["task"] == "chat-completion"
    assert entry["prompt_template"]["user"] == "<|im_start|>user\n{Content}<|im_end|>\n"
    assert entry["prompt_template"]["prompt"].endswith("<|im_start|>assistant\n")


# --- slmops ask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS[:2], ids=[row[1]["content"] for row in ROWS[:2]])
def test_a_bundle_is_asked_as_the_model_was_trained(served: tuple[Path, int], model: Path, row: chat.Messages):
    from flows.release.ask import answer as ask_bundle

    place = served[0].parent
    assert ask_bundle(place, row[1]["content"]) == answer(model, row[:-1]) == row[-1]["content"]
    assert ask_bundle(place, row[1]["content"], row[0]["content"]) == row[-1]["content"]


def test_a_bundle_with_a_stray_file_is_not_asked(served: tuple[Path, int]):
    from flows.release.ask import answer as ask_bundle
    from tasks.errors import ArtifactError, ConfigError

    stray = served[0] / "aaa.gguf"
    stray.write_bytes(b"GGUF")
    try:
        with pytest.raises(ArtifactError, match=r"unexpected llama-server/aaa\.gguf"):
            ask_bundle(served[0].parent, "hello")
    finally:
        stray.unlink()
    with pytest.raises(ConfigError):
        ask_bundle(served[0].parent, " ")
    with pytest.raises(ArtifactError):
        ask_bundle(served[0], "no bundle is here")

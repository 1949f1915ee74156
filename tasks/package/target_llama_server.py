"""The llama.cpp server bundle: OpenAI's HTTP interface by llama-cpp-python's own server, contained or not."""

import json
from pathlib import Path

from tasks.frame.stage import place
from tasks.package import escaping
from tasks.package.release import Release, write

PORT = 8080

CONTAINERFILE = """\
FROM docker.io/library/python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
# Not tuned to the machine that builds the image.
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF"
RUN python -m venv /opt/llama && /opt/llama/bin/pip install --no-cache-dir "llama-cpp-python[server]=={version}"

FROM docker.io/library/python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \\
 && useradd --system --uid 10001 --no-create-home slm
COPY --from=build /opt/llama /opt/llama
COPY --chmod=0444 model.gguf server.json LICENSE /model/
COPY --chmod=0555 start.sh healthcheck.py /model/
ENV PATH="/opt/llama/bin:$PATH" HOST=0.0.0.0 PORT={port}
WORKDIR /model
USER 10001
EXPOSE {port}
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "healthcheck.py"]
CMD ["./start.sh"]
"""

START = """\
#!/bin/sh
# The server without a container. HOST and PORT override server.json; PYTHON names the interpreter.
# Needs: pip install "llama-cpp-python[server]=={version}"
cd "$(dirname "$0")" && exec "${{PYTHON:-python3}}" -m llama_cpp.server --config_file server.json
"""

HEALTHCHECK = """\
\"\"\"Exit code 0 when the server answers.\"\"\"

import os
import urllib.request

urllib.request.urlopen(f"http://127.0.0.1:{{os.environ.get('PORT', '{port}')}}/v1/models", timeout=4).close()
"""

README = """# {name} ({variant}) for the llama.cpp server

```sh
./start.sh                                   # or, contained and with the model read-only:
podman build --format docker -t {name} . && podman run --rm --read-only --cap-drop=all -p {port}:{port} {name}
```

```sh
curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d @- <<'JSON'
{request}
JSON
```

`temperature` 0 and `repeat_penalty` 1 are how the model was validated: the server's own defaults (0.8 and 1.1)
sample and punish repetition. The expected answer here: {answer}

`python healthcheck.py` exits 0 when the server answers. It listens on the loopback interface unless `HOST` says
otherwise, and asks for no key: `api_key` in server.json sets one.
"""


def llama_server(release: Release, out: Path) -> list[str]:
    """Write the bundle into `out`."""
    place(release.weights, out / "model.gguf")
    config = {
        "host": "127.0.0.1",
        "port": PORT,
        "models": [
            {
                "model": "model.gguf",
                "model_alias": release.name,
                "n_ctx": release.context_length,
                "n_threads": -1,  # all; the server's default leaves half of an edge device idle
                # The GGUF's own template. Left out, the server may put a built-in one in its place.
                "chat_format": "chat_template.default",
                "logits_all": False,  # context x vocabulary floats that only `logprobs` would need
                "verbose": False,
            }
        ],
    }
    request = {"model": release.name, "messages": release.example, "temperature": 0, "repeat_penalty": 1.0}
    known = {
        "name": release.name, "variant": release.variant, "version": release.runtime_version, "port": PORT,
        "request": json.dumps(request, indent=2, ensure_ascii=False), "answer": escaping.code(release.answer),
    }  # fmt: skip
    write(out / "server.json", json.dumps(config, indent=2) + "\n")
    write(out / "Containerfile", CONTAINERFILE.format(**known))
    write(out / "start.sh", START.format(**known), executable=True)
    write(out / "healthcheck.py", HEALTHCHECK.format(**known))
    write(out / "LICENSE", release.licence)
    write(out / "README.md", README.format(**known))
    return []

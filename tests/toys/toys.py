"""What every toy stage does; in a toy checkout this is `tasks/toys.py`, and the files beside it are the stages.

A toy writes the smallest valid output. It waits as TOY_WAIT or the file TOY_WAIT_FILE says ({"stage": seconds}), and fails as
TOY_FAIL says ({"stage": ["the error's family", how many times]}). Each start is a line of the file TOY_LOG.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from tasks import errors
from tasks.frame import events

MODEL = {"accuracy": 0.9, "parameters": 1000, "layers": 4, "per_group": {"lamp": 0.9}}
METRICS = {"accuracy": 0.9, "accuracy_retention": 0.98, "mean_kld": 0.02, "size_bytes": 400, "size_ratio": 0.3}
MEASURED = {"decode_tokens_per_s": 123.0, "ttft_p50_s": 0.1, "ttft_p95_s": 0.2, "ttft_p99_s": 0.3}
DEVICE = {"label": "Desktop", "memory_mb": None, "threads": None, "context": 512, "runtimes": None}
VERDICT = {"verdict": "pass", "checks": [], "device": DEVICE}


def work(name: str) -> dict[str, float]:
    """Say that the stage starts, wait, fail if that is asked for; its metrics. `name`: as the flow calls it, `quantize-q4_0`."""
    log = Path(os.environ["TOY_LOG"])
    with log.open("a") as lines:
        lines.write(name + "\n")
    told = os.environ.get("TOY_WAIT_FILE")
    wait = json.loads(Path(told).read_text() if told else os.environ.get("TOY_WAIT", "{}")).get(name, 0)
    with events.progress(name, 4) as advance:
        for step in range(4):
            events.metric("loss", 1.0 / (step + 1), step)
            advance()
            time.sleep(wait / 4)
    family, times = json.loads(os.environ.get("TOY_FAIL", "{}")).get(name, ("", 0))
    if log.read_text().splitlines().count(name) <= times:
        raise getattr(errors, family)("told to fail: do not tell it")
    return {"answer": 42.0}


def write(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value))

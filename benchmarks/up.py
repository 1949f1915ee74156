"""`slmops up`: seconds until all servers are healthy, and the memory each holds when idle.

Twice: the first start makes the databases, the second finds them. Memory is the proportional set size (shared
pages are divided among those that share them) of a server with its children, some seconds after it became
healthy. Prints one JSON object; exit code 1 when a start takes longer than 40 s.

    python benchmarks/up.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from checkout import free_ports  # noqa: E402

LIMIT_S, SETTLE_S, DEADLINE_S = 40.0, 20.0, 300.0
# By what a server's first process is known among the processes of `up`.
SERVERS = {"prefect": "prefect\0server", "mlflow": "mlflow\0server", "worker": "prefect\0worker"}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="slmops-up-") as name:
        root = Path(name) / "checkout"
        root.mkdir()
        for file in ("dvc.yaml", "params.yaml"):  # by these two a workspace is known
            shutil.copy(ROOT / file, root)
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        results = [measure(root, Path(name) / "prefect") for _ in range(2)]
    starts = dict(zip(("first_start_s", "second_start_s"), (result["start_s"] for result in results), strict=True))
    kept = all(seconds <= LIMIT_S for seconds in starts.values())
    memory = results[-1]["memory_mb"]
    print(json.dumps({**starts, "limit_s": LIMIT_S, "kept": kept, "cores": len(os.sched_getaffinity(0)), "idle_pss_mb": memory, "total_pss_mb": round(sum(memory.values()), 1)}, indent=1))  # fmt: skip
    return 0 if kept else 1


def measure(root: Path, home: Path) -> dict:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    path = os.pathsep.join((str(ROOT), kept.get("PYTHONPATH", "")))
    prefect, mlflow = free_ports()
    command = [sys.executable, "-m", "flows.cli", "up", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
    output = root / "up.txt"
    with output.open("w") as out:
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=root, env={**kept, "PREFECT_HOME": str(home), "PYTHONPATH": path}, stdout=out, stderr=out
        )
    try:
        while not re.search(r"^all healthy", output.read_text(), re.M):
            if process.poll() is not None or time.monotonic() - began > DEADLINE_S:
                raise SystemExit(f"`slmops up` did not come up:\n{output.read_text()}")
            time.sleep(0.05)
        start_s = time.monotonic() - began
        time.sleep(SETTLE_S)
        return {"start_s": round(start_s, 1), "memory_mb": memory(process.pid)}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def memory(up: int) -> dict[str, float]:
    """Megabytes of each server, with all its descendants, and of `up` itself."""
    found = {"up": pss(up)}
    for child in children(up):
        command = Path(f"/proc/{child}/cmdline").read_text()
        [name] = [name for name, words in SERVERS.items() if words in command]
        found[name] = sum(pss(pid) for pid in descendants(child))
    return {name: round(size, 1) for name, size in found.items()}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    return [pid, *(each for child in children(pid) for each in descendants(child))]


def pss(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)[1]) / 1000


if __name__ == "__main__":
    sys.exit(main())

"""200 runs of one deployment queued at once: is one lost, is one run twice, and does Prefect's server stay responsive?

On the real server and worker of `slmops up`. The deployment's flow has the tasks of the pipeline's stages, and none
does any work. How many run at once is the pool's limit (`slmops up --runs`): each is a process that imports Prefect.
While they run the server is asked, again and again, what its UI asks: the list of runs. Prints a table.

    python benchmarks/queued_runs.py [RUNS [CLIENTS AT A TIME]] [--database postgresql://USER@HOST/NAME]
"""

import argparse
import collections
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkout import ask, make_toy  # noqa: E402 (the toy checkout of the tests)
from running import own, start, stop  # noqa: E402

from flows.servers import stack  # noqa: E402

FLOW = """
import os
from pathlib import Path
from prefect import flow, runtime, task
from tasks.stages import STAGES

@task
def nothing(stage):
    pass

@flow
def idle():
    with Path("ran.txt").open("a") as ran:
        ran.write(runtime.flow_run.id + "\\n")
    for stage in STAGES:
        nothing(stage)

if __name__ == "__main__":
    here = str(Path(__file__).parent)
    idle.from_source(here, "idle.py:idle").deploy("idle", work_pool_name="slmops", job_variables={"working_dir": here})
"""
DEADLINE_S = 4 * 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=200)
    parser.add_argument("clients", type=int, nargs="?", default=1)
    parser.add_argument("--database", help="as that of `slmops up` (default: SQLite); an empty one")
    args = parser.parse_args()
    where = ("--database", args.database) if args.database else ()
    with tempfile.TemporaryDirectory(prefix="slmops-queue-") as name:
        root = Path(name) / "checkout"
        root.mkdir()
        make_toy(root)
        up = start(root, *where)
        try:
            whole = measure(root, args.runs, args.clients)
        finally:
            stop(up)
            print(up.text())  # a server that was started again is told here
    print(f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} over the last minute")
    return 0 if whole else 1


def measure(root: Path, count: int, clients: int) -> bool:
    """Queue the runs and watch them; were all completed, each once?"""
    (root / "idle.py").write_text(FLOW)
    env = {**own(root), **stack.settings(root)}
    subprocess.run([sys.executable, "idle.py"], cwd=root, env=env, check=True, capture_output=True)
    api = f"{stack.running(root).prefect}/api"
    (deployment,) = ask(f"{api}/deployments/filter", {"deployments": {"name": {"any_": ["idle"]}}})

    def queue(number: int) -> str:
        where = f"{api}/deployments/{deployment['id']}/create_flow_run"
        return ask(where, {"state": {"type": "SCHEDULED"}, "idempotency_key": f"run {number}"})["id"]

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        queued = list(pool.map(queue, range(count)))
    queued_s, took, away = time.monotonic() - began, [], 0
    states: collections.Counter[str] = collections.Counter()
    while sum(states[each] for each in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")) < count:
        if time.monotonic() - began > DEADLINE_S:
            break
        time.sleep(0.5)
        asked = time.monotonic()
        try:
            found = ask(f"{api}/flow_runs/filter", {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}, "limit": 200})  # fmt: skip
        except OSError:
            away += 1
            continue
        took.append(time.monotonic() - asked)
        states = collections.Counter(run["state_type"] for run in found)
    ran = collections.Counter((root / "ran.txt").read_text().split())
    took.sort()
    rows = {
        "runs queued": count,
        f"seconds to queue them, {clients} at a time": f"{queued_s:.1f}",
        "seconds until the last had ended": f"{time.monotonic() - began:.1f}",
        "ended as": ", ".join(f"{state.lower()} {number}" for state, number in states.items()),
        "lost (never ran)": len(set(queued) - set(ran)),
        "run twice": sum(number > 1 for number in ran.values()),
        "list of 200 runs, p50": f"{took[len(took) // 2] * 1000:.0f} ms",
        "list of 200 runs, p95": f"{took[int(len(took) * 0.95)] * 1000:.0f} ms",
        "list of 200 runs, slowest": f"{took[-1] * 1000:.0f} ms, of {len(took)}",
        "lists that were not answered": away,
        "largest process": f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000:.0f} MB",
    }
    for name, value in rows.items():
        print(f"{name:<40}{value}", flush=True)
    return states["COMPLETED"] == count and set(ran.values()) == {1} and len(ran) == count


if __name__ == "__main__":
    sys.exit(main())

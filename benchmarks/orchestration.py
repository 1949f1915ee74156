"""What orchestration costs: a run of the deployment `train-and-release` from queue to finish, less the stages' own time.

On the real servers of `slmops up`, with toy stages that only wait. Twice: the first run makes everything, the second
finds all of it in DVC's cache. It makes as many variants as params.yaml names by default. Prints a table for each: the
seconds from the moment the run was queued, a stage's own seconds (its command's, as it told them), and what was spent
around them. Where stages work side by side, a second in which at least one works counts as work. Exit code 1 above the
limits.

    python benchmarks/orchestration.py [SECONDS A STAGE]
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkout import DEFAULTS, ask, commit, make_toy  # noqa: E402 (the toy checkout of the tests)
from running import Servers, start, stop  # noqa: E402

from flows.run.graph import title  # noqa: E402
from flows.run.pipeline import covered  # noqa: E402
from tasks import params  # noqa: E402
from tasks.frame import jsonl  # noqa: E402
from tasks.stages import STAGES  # noqa: E402

LIMITS_S = {"a full run": 25.0, "everything cached": 30.0}


def main() -> int:
    work_s = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    with tempfile.TemporaryDirectory(prefix="slmops-orchestration-") as name:
        root = Path(name) / "checkout"
        root.mkdir()
        make_toy(root)
        params_file = root / "params.yaml"
        params_file.write_text(params_file.read_text().replace("approval: manual", "approval: auto"))
        commit(root)
        defaults = params.load(DEFAULTS)
        variants = defaults.quantize.variants
        names = [title((stage.name, item)) for stage in STAGES.values() for item in stage.items(defaults)]
        waits = dict.fromkeys(names, work_s)
        up = start(root, TOY_WAIT=json.dumps(waits))
        try:
            held = [show(what, limit, root, Servers(up), variants) for what, limit in LIMITS_S.items()]
        finally:
            stop(up)
    print(f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} over the last minute")
    return 0 if all(held) else 1


def show(what: str, limit: float, root: Path, servers: Servers, variants: Sequence[str]) -> bool:
    """Queue a run, wait for its end, and print where the time went; is that within the limit?"""
    queued = time.time()
    asked = {"variants": list(variants)}
    run = servers.wait(servers.run("train-and-release", asked), "Completed")
    inner = ask(f"{servers.prefect}/flow_runs/filter", {"flows": {"name": {"any_": ["slmops"]}}, "sort": "START_TIME_DESC", "limit": 1})[0]  # fmt: skip
    tasks = ask(
        f"{servers.prefect}/task_runs/filter",
        {"flow_runs": {"id": {"any_": [inner["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"},
    )
    logs = root / ".runs" / run["name"] / ".runs" / "logs" / run["name"]
    rows = [("a process for the run", queued, at(run["start_time"]), 0.0)]
    rows.append(("worktree, params", at(run["start_time"]), at(inner["start_time"]), 0.0))
    rows.append(("what is to be done", at(inner["start_time"]), at(tasks[0]["start_time"]), 0.0))
    for task in tasks:
        rows.append((task["name"], at(task["start_time"]), at(task["end_time"]), own(logs / f"{task['name']}.jsonl")))
    rows.append(("report, registry", at(tasks[-1]["end_time"]), at(inner["end_time"]), 0.0))
    rows.append(("commit, release", at(inner["end_time"]), at(run["end_time"]), 0.0))
    total = at(run["end_time"]) - queued
    spent = total - covered([(end - seconds, end) for _, _, end, seconds in rows if seconds])
    print(f"{what}\n  {'':<24}{'from':>8}{'to':>8}{'own':>8}{'around':>8}   seconds")
    for name, begin, end, seconds in rows:
        print(f"  {name:<24}{begin - queued:8.1f}{end - queued:8.1f}{seconds:8.1f}{end - begin - seconds:8.1f}")
    print(f"  {'queue to finish':<24}{'':8}{total:8.1f}{total - spent:8.1f}{spent:8.1f}   wanted: at most {limit:.0f}\n", flush=True)  # fmt: skip
    return spent <= limit


def own(events: Path) -> float:
    """The seconds that the stage's command worked, 0 if DVC had no need of it."""
    told = jsonl.read(events) if events.exists() else []
    return sum(event["seconds"] for event in told if event["event"] == "finished")


def at(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


if __name__ == "__main__":
    sys.exit(main())

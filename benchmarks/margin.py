"""By what margin the default run passes: over seeds and arithmetic, not on one machine by luck.

Trains the teacher and the student of params.yaml with each seed in float32 and in bfloat16, makes the files and lets each
answer all test rows in its own runtime: the stages themselves, one workspace a run under .cache/margin. A stage that was
done is not done again, so the benchmark can be stopped and started; a whole one takes hours on two cores. The numbers of
each run lie in benchmarks/margin_runs with the processor that made them, so that runs of several machines make one table:
what is there of students of the same parameters, whatever files were made of them, is not made again (--again makes it;
--recorded shows it and makes nothing). Exit code 1 when a promise of the README does not hold: every student keeps 96 % of
its teacher's accuracy, 97.5 % on average, with at most 85 % of the parameters, and in each run two files of at most 40 % of
the teacher's F16 pass all gates on quality.

    python -m benchmarks.margin [--seeds 17 18 19] [--precision fp32 bf16] [--recorded | --again] [--json] [--set key=value]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tasks import params
from tasks.frame import jsonl, manifest
from tasks.frame.stage import folder, read_json, write_json
from tasks.judge import gates
from tasks.metrics import METRICS
from tasks.stages import STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "margin_runs"
LEAST, MEAN, PARAMETERS = 0.96, 0.975, 0.85  # of the teacher's accuracy in each run and on average, of its parameters
SMALL, FILES = 0.40, 2  # so many files of at most this share of the teacher's F16 pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "margin", help="where the runs lie")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true", help="make runs that are on record too")
    which.add_argument("--recorded", action="store_true", help="make none: show those that are on record")
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON object, not as a table")
    args = parser.parse_args()
    wanted = [Run(seed, precision, args.overrides) for precision in args.precision for seed in args.seeds]
    runs = []
    for run in wanted:
        known = None if args.again else run.known()
        if known is None and not args.recorded:
            known = run.made(args.folder)
        if known is not None:
            runs.append(known)
    if not runs:
        parser.error("none of these runs is on record for these parameters")
    if missing := len(wanted) - len(runs):
        print(f"{missing} of {len(wanted)} runs are not on record: what holds, holds for those shown", file=sys.stderr)
    report = {"runs": runs, **spread(runs)}
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0 if report["holds"] else 1


class Run:
    """One seed in one arithmetic, and its record."""

    def __init__(self, seed: int, precision: str, overrides: list[str]) -> None:
        self.seed, self.precision = seed, precision
        self.settings = [
            *overrides, f"finetune.seed={seed}", f"select.seeds=[{seed}]",
            f"finetune.precision={precision}", f"distill.precision={precision}",
        ]  # fmt: skip
        self.values = params.load(ROOT / "params.yaml", self.settings)
        self.digest = self.values.digest({key for stage in until("select") for key in stage.sections})
        self.record = RECORDS / f"{precision}-{seed}.json"

    def known(self) -> dict[str, Any] | None:
        """The numbers on record, where they are of the same parameters."""
        found: dict[str, Any] | None = read_json(self.record) if self.record.is_file() else None
        return found if found and found.get("parameters") == self.digest else None

    def made(self, parent: Path) -> dict[str, Any]:
        """The numbers of the run, made in a workspace under `parent` and recorded."""
        made = one_run(parent / self.record.stem, self.values, self.settings)
        run = {
            "seed": self.seed, "precision": self.precision, "parameters": self.digest, "processor": processor(), **made
        }  # fmt: skip
        RECORDS.mkdir(exist_ok=True)
        write_json(self.record, run)
        return run


def until(last: str) -> list[Stage]:
    """The stages up to that one."""
    names = list(STAGES)
    return [STAGES[name] for name in names[: names.index(last) + 1]]


def one_run(root: Path, values: params.Params, settings: list[str]) -> dict[str, Any]:
    """Every stage that is not done yet, and its numbers."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "data").exists():
        (root / "data").symlink_to(ROOT / "data")
    for stage in until("validate"):
        for item in stage.items(values):
            if not (folder(root, stage.name, *item.words) / manifest.NAME).is_file():
                run_stage(root, settings, stage.name, *item.words)
    (seed,) = values.select.seeds
    student = manifest.load(folder(root, "distill", str(seed))).metrics
    made = {name: student[name] for name in ("retention", "accuracy", "parameters_ratio", "validation_loss")}
    made["teacher_accuracy"] = manifest.load(folder(root, "teach")).metrics["accuracy"]
    return made | {"files": {variant: judged(root, values, variant) for variant in values.quantize.variants}}


def run_stage(root: Path, settings: list[str], *stage: str) -> None:
    """`python -m tasks STAGE`, as every way in runs it."""
    print(f"{root.name}: {' '.join(stage)}", file=sys.stderr, flush=True)
    sets = [word for text in settings for word in ("--set", text)]
    command = [sys.executable, "-m", "tasks", *stage, "--params", str(ROOT / "params.yaml"), "--root", str(root), *sets]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"{root.name}: {' '.join(stage)} failed, see above")


def judged(root: Path, values: params.Params, variant: str) -> dict[str, Any]:
    """What a file keeps, and which gates on quality and size it misses. Those on speed and memory want a quiet machine."""
    made, settings = folder(root, "validate", variant), values.validate_
    metrics, answers = read_json(made / "metrics.json"), jsonl.read(made / "predictions.jsonl")
    ours, theirs = ([bool(line[name]) for line in answers] for name in ("correct", "teacher_correct"))
    rules = [gate for gate in settings.gates if not METRICS[gate.name].measured]
    verdict = gates.judge(settings, rules, metrics, gates.intervals(ours, theirs, settings.bootstrap, settings.seed))
    missed = [check["name"] for check in verdict["checks"] if not check["ok"] or check.get("undecided")]
    names = ("accuracy", "accuracy_retention", "mean_kld", "size_ratio")
    return {name: metrics[name] for name in names} | {"missed": missed}


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the runs, and whether what is promised holds."""
    kept = [run["retention"] for run in runs]
    small = [sum(not file["missed"] and file["size_ratio"] <= SMALL for file in run["files"].values()) for run in runs]
    return {
        "retention_mean": statistics.fmean(kept),
        "retention_sd": statistics.stdev(kept) if len(kept) > 1 else 0.0,
        "retention_least": min(kept),
        "small_files_that_pass": small,
        "holds": min(kept) >= LEAST
        and statistics.fmean(kept) >= MEAN
        and min(small) >= FILES
        and max(run["parameters_ratio"] for run in runs) <= PARAMETERS,
    }


def table(report: dict[str, Any]) -> str:
    """The runs as a Markdown table, as docs show it."""
    variants = list(dict.fromkeys(name for run in report["runs"] for name in run["files"]))
    lines = [
        f"| arithmetic | seed | processor | teacher | student | of the teacher's | {' | '.join(variants)} |",
        "|---" * (6 + len(variants)) + "|",
    ]
    for run in report["runs"]:
        files = [
            f"{file['accuracy_retention']:.1%}" + (f" ({', '.join(file['missed'])})" if file["missed"] else "")
            if (file := run["files"].get(name))
            else "-"
            for name in variants
        ]
        lines.append(
            f"| {run['precision']} | {run['seed']} | {run['processor']} | {run['teacher_accuracy']:.3f} | {run['accuracy']:.3f} | "
            f"{run['retention']:.1%} | {' | '.join(files)} |"
        )
    lines += [
        "",
        f"Students keep {report['retention_mean']:.1%} on average, with a standard deviation of {report['retention_sd']:.1%}, "
        f"at least {report['retention_least']:.1%}. Files of at most {SMALL:.0%} of the teacher's F16 that pass, a run: "
        f"{', '.join(map(str, report['small_files_that_pass']))}. What is promised {'holds' if report['holds'] else 'does NOT hold'}.",
    ]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, its cores, and what it has for bf16."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if f" {flag}" in text]
    cores = len(os.sched_getaffinity(0))
    return f"{name or platform.machine()}, {cores} core{'s' * (cores > 1)}, {' and '.join(found) or 'no bf16 instructions'}"


if __name__ == "__main__":
    sys.exit(main())

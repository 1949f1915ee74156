"""`slmops plan`: what a run will make and what it will take, told before any work from the config alone.

Sizes are exact for GGUF (see shape.py). Times are estimates: work in floating-point operations divided by a speed
that matrix products measure here in the arithmetic that the work uses, times the share of it that each kind of work
was seen to reach with a 135M model on two cores.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import shape
from tasks import models, params
from tasks.package.memory import minimum_ram

# Speed of real work relative to the matrix product of the probe. Above 1 where most of the model need not be computed.
TRAIN, FORWARD = 0.95, 2.9
PREFILL, DECODE_BYTES_PER_S = 0.8, 1.5e10  # llama.cpp, float32: prompts are bound by arithmetic, answers by memory
TOKENS_A_ROW = 60  # where the data cannot be read before acquire
CHARACTERS_A_TOKEN = 2.8
OVERHEAD_S = {
    "acquire": 15.0,
    "select": 2.0,
    "convert": 10.0,
    "quantize": 3.0,
    "validate": 8.0,
    "judge": 1.0,
    "package": 10.0,
}


@dataclass(frozen=True)
class Work:
    """One stage: steps and tokens where it trains or generates, all for its variants or seeds together."""

    stage: str
    steps: int | None
    tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All that `show` prints. Sizes and memory in bytes."""

    base: shape.Shape
    student: shape.Shape
    sizes: dict[str, int]
    ram: dict[str, int]
    work: list[Work]
    disk: int


@dataclass(frozen=True)
class _Rows:
    count: dict[str, int]
    tokens: int  # of a row with its answer, on average


def show(root: Path, path: Path, overrides: Sequence[str]) -> None:
    """Print the plan.

    Raises:
        PipelineError: the params are wrong, or the model is not there.
    """
    from rich.console import Console
    from rich.table import Table

    checked = params.load(path, overrides)
    rates = models.product_rates()
    plan = predict(root, checked, rates[models.arithmetic(checked.finetune.precision)], rates["float32"])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    for name, model in (("teacher", plan.base), ("student", plan.student)):
        console.print(
            f"{name}: {model.architecture}, {model.parameters / 1e6:.1f} M parameters ({models.size_class(model.parameters)}), "
            f"{model.layers} layers"
        )
    table = Table("variant", title="Student's files", title_justify="left")
    for heading in ("MB", "of teacher's F16", f"RAM at {checked.package.context_length} tokens, MB"):
        table.add_column(heading, justify="right")
    whole = shape.size(plan.base, "f16", checked.quantize.onnx)
    for variant, size in plan.sizes.items():
        table.add_row(variant, f"{size / 1e6:.1f}", f"{size / whole:.0%}", f"{plan.ram[variant] / 1e6:.0f}")
    console.print(table)
    table = Table("stage", title="Work (times are estimates, on this machine)", title_justify="left")
    for heading in ("steps", "tokens", "minutes"):
        table.add_column(heading, justify="right")
    for work in plan.work:
        steps, tokens = (f"{number:,}" if number else "" for number in (work.steps, work.tokens))
        table.add_row(work.stage, steps, tokens, f"{work.seconds / 60:.1f}")
    table.add_row("total", "", "", f"{sum(work.seconds for work in plan.work) / 60:.1f}")
    console.print(table)
    free = shutil.disk_usage(root).free
    console.print(f"disk: {plan.disk / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    if plan.disk > free:
        console.print("warning: the disk is too small for this run: make room first", style="bold")


def predict(root: Path, checked: params.Params, training: float, plain: float) -> Plan:
    """The plan for a machine that multiplies matrices at `training` operations a second in the arithmetic of training, and
    at `plain` in float32.
    """
    base = shape.read(checked.acquire, root)
    student = base.pruned(checked.distill.max_parameters)
    sizes: dict[str, int] = {
        variant: shape.size(student, variant, checked.quantize.onnx) for variant in checked.quantize.variants
    }
    ram: dict[str, int] = {
        variant: minimum_ram(
            "onnx" if variant.startswith("onnx") else "gguf", size, student.config, checked.package.context_length
        )
        for variant, size in sizes.items()
    }
    work = _work(checked, base, student, sizes, _rows(root, checked), training, plain)
    # bf16 folders of base, teacher and students, the checkpoint (fp32 weights and two moments), two F16 files.
    folders = 2 * 2 * base.parameters + 2 * len(checked.select.seeds) * student.parameters + 12 * base.parameters
    files = 2 * base.parameters + 2 * student.parameters + sum(sizes.values())
    return Plan(base, student, sizes, ram, work, int(1.1 * (folders + files)))


def _work(
    checked: params.Params,
    base: shape.Shape,
    student: shape.Shape,
    sizes: dict[str, int],
    rows: _Rows,
    training: float,
    plain: float,
) -> list[Work]:
    train = rows.count["train"]
    forward, training = training * FORWARD, training * TRAIN
    taught = train + min(checked.distill.unlabelled_rows, rows.count["unlabelled"])
    test = rows.count["test"] * rows.tokens

    def trained(rows_used: int, settings: params.Training, model: shape.Shape) -> tuple[int, int, float]:
        tokens = int(rows_used * rows.tokens * settings.epochs)
        return max(1, tokens // settings.batch_tokens), tokens, 6 * model.parameters * tokens / training

    steps, tokens, seconds = trained(train, checked.finetune, base) if checked.finetune.enabled else (0, 0, 0.0)
    found = [
        Work("acquire", None, None, OVERHEAD_S["acquire"] + 1.0e-7 * base.parameters),
        Work("finetune", steps, tokens, seconds),
    ]
    steps, tokens, seconds = trained(taught, checked.distill, student)
    # Each removal tries every candidate from its block on: half the model on average, after one whole pass.
    tried = (base.layers - student.layers) * (1 + checked.distill.candidates / 2)
    calibration = 2 * base.parameters * checked.distill.calibration_rows * rows.tokens * tried / forward
    # What a removed block added is fitted on the blocks up to it, again half the model on average.
    calibration += (
        base.parameters * checked.distill.fitted_rows * rows.tokens * (base.layers - student.layers) / forward
    )
    # The teacher reads and answers; four models take the test.
    answering = 2 * base.parameters * (2 * taught * rows.tokens + 4 * 2 * test) / forward
    students = len(checked.select.seeds)
    each = seconds + calibration + answering
    found.append(Work("distill", students * steps, students * tokens, students * each))
    found.append(Work("select", None, None, OVERHEAD_S["select"]))
    found.append(Work("convert", None, None, OVERHEAD_S["convert"] + 8 * base.parameters / 1e9))
    count = len(sizes)
    found.append(Work("quantize", None, None, count * (OVERHEAD_S["quantize"] + 4 * student.parameters / 1e9)))
    prompts = test + checked.validate_.windows * checked.validate_.context * 3
    each = 2 * student.parameters * prompts / (plain * PREFILL)
    answers = sum(rows.count["test"] * 16 * size / DECODE_BYTES_PER_S for size in sizes.values())
    found.append(Work("validate", None, prompts * count, count * (OVERHEAD_S["validate"] + each) + answers))
    found.append(Work("judge", None, None, count * OVERHEAD_S["judge"]))
    found.append(Work("package", None, None, OVERHEAD_S["package"]))
    return found


def _rows(root: Path, checked: params.Params) -> _Rows:
    """Rows of each split and their length, from the local files; guessed where they are not local."""
    data = checked.acquire.data
    count = {"train": 2000, "test": 400, "unlabelled": 0}
    if data.source != "local":
        return _Rows(count, TOKENS_A_ROW)
    path = root / data.path
    if path.is_dir():
        lines = {split: _lines(path / f"{split}.jsonl") for split in count}
        found = {split: len(each) for split, each in lines.items()}
    else:
        lines = {"train": _lines(path)}
        total = len(lines["train"])
        extra = len(_lines(root / data.unlabelled)) if data.unlabelled else 0
        found = {
            "train": int(total * (1 - data.test - data.validation)),
            "test": int(total * data.test),
            "unlabelled": extra,
        }
    characters = [
        sum(len(message["content"]) + 12 for message in row["messages"]) for row in map(_row, lines["train"]) if row
    ]
    tokens = int(sum(characters) / len(characters) / CHARACTERS_A_TOKEN) if characters else TOKENS_A_ROW
    return _Rows(found, tokens)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _row(line: str) -> dict[str, Any]:
    """A row, or nothing: acquire is the one to refuse a malformed line, with its number."""
    try:
        found = json.loads(line)
        sum(len(message["content"]) for message in found["messages"])
    except (ValueError, KeyError, TypeError):
        return {}
    return dict(found)

"""`slmops plan`: what a run will make and what it will take, told before any work from the config alone.

Sizes are exact for GGUF (see tasks/models/sizes.py). Times are estimates: work in floating-point operations divided by a speed
that matrix products measure here in the arithmetic that the work uses, times the share of it that each kind of work
was seen to reach with a 135M model on two cores.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from flows.preflight import checks, planned_model
from flows.workspace.paths import Workspace
from tasks import params, profiles
from tasks.acquire import data_sources, rows, watched
from tasks.acquire.params import LocalData
from tasks.errors import PipelineError
from tasks.frame import cores
from tasks.frame.items import Item
from tasks.judge import gates
from tasks.learning.params import Training
from tasks.measure.speed import ROUNDS
from tasks.measure.timed import CONTEXT, DECODED
from tasks.models import loading, sizes
from tasks.models.sizes import Shape
from tasks.prune import width as width_pruning
from tasks.prune.params import Prune
from tasks.prune.plan import pruned
from tasks.stages import STAGES
from tasks.validate.params import Validate
from tasks.variants import VARIANTS

# Speed of real work relative to the matrix product of the probe, by what rows do not share with all others: that is computed
# once. Above 1 where most of the model need not be computed.
TRAIN, FORWARD = 0.63, 1.9
PREFILL, DECODE_BYTES_PER_S = 0.53, 1.5e10  # llama.cpp, float32: prompts are bound by arithmetic, answers by memory
# Where the data cannot be read before acquire.
TOKENS_A_ROW = 60
GUESSED = {"train": 2000, "validation": 200, "test": 400, "unlabelled": 0}
AGREEMENT = 0.9  # of student, teacher and reference on a row: how many a verdict needs, and how many are generated
CHARACTERS_A_TOKEN, MARKS = 2.8, 12  # MARKS: characters that a template writes around a message
OVERHEAD_S = {
    "acquire": 15.0,
    "select": 2.0,
    "convert": 10.0,
    "quantize": 3.0,
    "validate": 5.0,
    "measure": 6.0,
    "judge": 1.0,
    "package": 10.0,
}


MODELS_RUN = frozenset(
    {"acquire", "finetune", "teach", "prune", "distill", "convert", "quantize", "validate", "measure"}
)


@dataclass(frozen=True)
class Work:
    """One stage: steps and tokens where it trains or generates, all for its variants or seeds together."""

    stage: str
    steps: int | None
    tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All that `facts` tells. Sizes and memory in bytes."""

    base: Shape
    student: Shape
    sizes: dict[str, int]
    ram: dict[str, int]
    fits: dict[str, list[str]]  # variant -> device profiles
    work: list[Work]
    disk: int
    doubts: list[str]


@dataclass(frozen=True)
class _Rows:
    count: dict[str, int]
    tokens: int  # of a row with its answer, on average
    own: int  # of those, what the row does not begin with alike all others
    exact: bool  # counted, not guessed


def facts(root: Workspace, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The plan as plain data: sizes, memory and disk in bytes, times in seconds.

    Raises:
        PipelineError: the params or the data are wrong, or the model is not there.
    """
    checked = params.load(path, overrides)
    rates = loading.product_rates()
    plan = predict(root, checked, rates[loading.arithmetic(checked.finetune.precision)], rates["float32"])
    whole = VARIANTS["f16"].quantizer.module.predicted_size("f16", None, plan.base)

    def told(model: Shape) -> dict[str, Any]:
        size_class = sizes.size_class(model.parameters)
        return {
            "architecture": model.architecture,
            "parameters": model.parameters,
            "size_class": size_class,
            "layers": model.layers,
        }

    return {
        "teacher": told(plan.base),
        "student": told(plan.student),
        "context_length": checked.package.context_length,
        "files": [
            {
                "variant": variant,
                "bytes": size,
                "of_teacher_f16": size / whole,
                "ram_bytes": plan.ram[variant],
                "fits": plan.fits[variant],
            }
            for variant, size in plan.sizes.items()
        ],
        "work": [asdict(work) for work in plan.work],
        "disk": {"needed_bytes": plan.disk, "free_bytes": shutil.disk_usage(root).free},
        "doubts": plan.doubts,
        "busy": cores.others_work(),
    }


def show(plan: Mapping[str, Any]) -> None:
    """Print what `facts` found."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    for name in ("teacher", "student"):
        model = plan[name]
        console.print(
            f"{name}: {model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters ({model['size_class']}), "
            f"{model['layers']} layers"
        )
    table = Table("variant", title="Student's files", title_justify="left")
    for heading in ("MB", "of teacher's F16", f"RAM at {plan['context_length']} tokens, MB"):
        table.add_column(heading, justify="right")
    table.add_column("fits")
    for file in plan["files"]:
        megabytes = f"{file['bytes'] / 1e6:.1f}", f"{file['of_teacher_f16']:.0%}", f"{file['ram_bytes'] / 1e6:.0f}"
        table.add_row(file["variant"], *megabytes, ", ".join(file["fits"]) or "no device")
    console.print(table)
    console.print("Work (times are estimates, on this machine" + (f": {plan['busy']})" if plan["busy"] else ")"))
    table = Table("stage")
    for heading in ("steps", "tokens", "minutes"):
        table.add_column(heading, justify="right")
    for work in plan["work"]:
        steps, tokens = (f"{work[name]:,}" if work[name] else "" for name in ("steps", "tokens"))
        table.add_row(work["stage"], steps, tokens, f"{work['seconds'] / 60:.1f}")
    table.add_row("total", "", "", f"{sum(work['seconds'] for work in plan['work']) / 60:.1f}")
    console.print(table)
    needed, free = plan["disk"]["needed_bytes"], plan["disk"]["free_bytes"]
    console.print(f"disk: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    if needed > free:
        console.print("warning: the disk is too small for this run: make room first", style="bold")
    for doubt in plan["doubts"]:
        console.print(f"warning: {doubt}", style="bold")


def predict(root: Workspace, checked: params.Params, training: float, plain: float) -> Plan:
    """The plan for a machine that multiplies matrices at `training` operations a second in the arithmetic of training, and
    at `plain` in float32.
    """
    watched.check(checked.acquire, root)
    checks.check(root, checked)
    base = planned_model.shape(checked.acquire, root)
    counted = _rows(root, checked)
    student, predicted = _student(checked, base)
    ram: dict[str, int] = {
        variant: VARIANTS[variant].runtime.module.minimum_memory(size, student.config, checked.package.context_length)
        for variant, size in predicted.items()
    }
    fits = _fits(root, checked, student, predicted)
    work = _work(checked, base, student, predicted, counted, training, plain)
    # bf16 folders of base, teacher and students, the checkpoint (fp32 weights and two moments), two F16 files.
    folders = 2 * 2 * base.parameters + 2 * len(checked.select.seeds) * student.parameters + 12 * base.parameters
    files = 2 * base.parameters + 2 * student.parameters + sum(predicted.values())
    return Plan(base, student, predicted, ram, fits, work, int(1.1 * (folders + files)), _doubts(checked, counted))


def _fits(root: Workspace, checked: params.Params, student: Shape, predicted: dict[str, int]) -> dict[str, list[str]]:
    """The devices that could hold each file: that have its runtime, and room for its bytes and for its memory at their context,
    as both are foreseen.
    """
    devices = {name: profiles.load(root, name) for name in checked.measure.profiles}

    def fits(variant: str, size: int, device: profiles.Profile) -> bool:
        runtime = VARIANTS[variant].runtime
        limits = [gate.at_most for gate in device.gates if gate.name == "size_bytes" and gate.at_most is not None]
        needed = runtime.module.minimum_memory(size, student.config, device.context)
        enough = device.memory_mb is None or needed <= device.memory_mb * 1_000_000
        return device.has(runtime) and enough and all(size <= limit for limit in limits)

    return {
        variant: [name for name, device in devices.items() if fits(variant, size, device)]
        for variant, size in predicted.items()
    }


@dataclass(frozen=True)
class Outlook:
    """What a run is told as it begins: the minutes that each stage is expected to take, and what is doubtful of its data."""

    minutes: dict[str, float]
    doubts: list[str]


def outlook(root: Workspace, checked: params.Params, keys: Iterable[tuple[str, Item]]) -> Outlook:
    """`keys` are what is to be done. Empty where nothing can be told (a model that is still to be fetched, rows that acquire
    will refuse) and where no model runs.
    """
    wanted = Counter(stage for stage, _ in keys)
    if not wanted.keys() & MODELS_RUN:
        return Outlook({}, [])
    try:
        base, counted = planned_model.shape(checked.acquire, root), _rows(root, checked)
        rates = loading.product_rates()
        training = rates[loading.arithmetic(checked.finetune.precision)]
        work = _work(checked, base, *_student(checked, base), counted, training, rates["float32"])
    except (PipelineError, OSError, ValueError, LookupError, ArithmeticError):
        return Outlook({}, [])  # the run itself says what is wrong, if anything is
    share = {stage: count / len(STAGES[stage].items(checked)) for stage, count in wanted.items()}
    minutes = {each.stage: each.seconds * share[each.stage] / 60 for each in work if each.stage in wanted}
    return Outlook(minutes, _doubts(checked, counted))


def _student(checked: params.Params, base: Shape) -> tuple[Shape, dict[str, int]]:
    """What pruning leaves of the model, and the bytes of each of its files."""
    student = pruned(base, checked.prune)
    return student, {variant: _size(variant, checked, student) for variant in checked.quantize.variants}


def _size(variant: str, checked: params.Params, student: Shape) -> int:
    quantizer = VARIANTS[variant].quantizer
    size: int = quantizer.module.predicted_size(variant, checked.quantize.of(quantizer.name), student)
    return size


def _work(
    checked: params.Params,
    base: Shape,
    student: Shape,
    predicted: dict[str, int],
    counted: _Rows,
    training: float,
    plain: float,
) -> list[Work]:
    train = counted.count["train"]
    forward, training = training * FORWARD, training * TRAIN
    taught = train + min(checked.teach.unlabelled_rows, counted.count["unlabelled"])
    test = counted.count["test"] * counted.own

    def trained(rows_used: int, settings: Training, model: Shape) -> tuple[int, int, float]:
        used = rows_used * settings.passes(rows_used)
        tokens = int(used * counted.tokens)
        return max(1, tokens // settings.batch_tokens), tokens, 6 * model.parameters * used * counted.own / training

    steps, tokens, seconds = trained(train, checked.finetune, base) if checked.finetune.enabled else (0, 0, 0.0)
    works = [
        Work("acquire", None, None, OVERHEAD_S["acquire"] + 1.0e-7 * base.parameters),
        Work("finetune", steps, tokens, seconds),
    ]
    students = len(checked.select.seeds)
    read = min(taught, students * taught * checked.distill.passes(taught))  # by students of all seeds
    answered = taught - train  # prompts that the teacher reads and answers
    taking = 2 * base.parameters * 2 * test / forward  # of the test, by one model
    heard = 2 * base.parameters * (read + 2 * answered) * counted.own / forward
    works.append(Work("teach", None, None, 2 * taking + heard))
    pruning = _pruning(checked.prune, base, student, counted.own, forward, plain)
    works.append(Work("prune", None, None, pruning + taking))
    steps, tokens, seconds = trained(taught, checked.distill, student)
    works.append(Work("distill", students * steps, students * tokens, students * (seconds + taking)))
    works.append(Work("select", None, None, OVERHEAD_S["select"]))
    works.append(Work("convert", None, None, OVERHEAD_S["convert"] + 8 * base.parameters / 1e9))
    count = len(predicted)
    works.append(Work("quantize", None, None, count * (OVERHEAD_S["quantize"] + 4 * student.parameters / 1e9)))
    prompts = test + checked.validate_.windows * checked.validate_.context * 3
    each = 2 * student.parameters * prompts / (plain * PREFILL)
    # Answers are checked against drafts, side by side: only those that differ are generated token by token.
    generated = (1 - AGREEMENT) * counted.count["test"] * 16
    answers = sum(generated * size / DECODE_BYTES_PER_S for size in predicted.values())
    works.append(Work("validate", None, prompts * count, count * (OVERHEAD_S["validate"] + each) + answers))
    devices = len(checked.measure.profiles)
    # The file and the teacher's F16, by turns: prompts, prefills of 512 tokens, and 64 tokens one by one.
    read = checked.measure.repeats * counted.tokens + ROUNDS["prefill"] * CONTEXT
    written = ROUNDS["decode"] * DECODED * (sum(predicted.values()) + count * 2 * base.parameters) / DECODE_BYTES_PER_S
    timed = count * (OVERHEAD_S["measure"] + 2 * (base.parameters + student.parameters) * read / (plain * PREFILL))
    works.append(Work("measure", None, None, devices * (timed + written)))
    works.append(Work("judge", None, None, devices * count * OVERHEAD_S["judge"]))
    works.append(Work("package", None, None, OVERHEAD_S["package"]))
    return works


def _pruning(
    settings: Prune,
    base: Shape,
    student: Shape,
    tokens: int,
    forward: float,
    plain: float,
) -> float:
    """Seconds that one pruning takes; `tokens` of a row, `forward` and `plain` operations a second of the model's passes and
    of float32 products.
    """
    gone, inner, width = base.layers - student.layers, base.config["intermediate_size"], base.config["hidden_size"]
    kept = student.config["intermediate_size"]
    # Each removal tries every candidate from its block on: half the model on average, after one whole pass.
    tried = gone * (1 + settings.candidates / 2)
    seconds = 2 * base.parameters * settings.calibration_rows * tokens * tried / forward
    # What a removed block added is fitted on the blocks up to it, again half the model on average: second moments of the
    # inner channels, their products with what was added, and one solution.
    fitted = settings.fitted_rows * tokens
    seconds += gone * base.parameters * fitted / forward
    seconds += gone * ((2 * fitted * inner * (inner + width) + inner**3 / 3) if fitted else 0) / plain
    if kept < inner:
        # One whole pass, and every block again before and after it is narrowed; second moments of each; and for each few
        # channels that go an inverse, with its product.
        read = fitted or settings.calibration_rows * tokens
        seconds += 3 * 2 * student.parameters * read / forward
        rounds = math.ceil((inner - kept) / width_pruning.STEP)
        seconds += student.layers * (2 * read * inner**2 + rounds * (inner**3 + 2 * inner**2 * width)) / plain
    return seconds


def _rows(root: Workspace, checked: params.Params) -> _Rows:
    """Rows of each split and their length, from the local files as acquire reads them; guessed where they are not local.

    Raises:
        ConfigError: a file is missing, or rows are not as they must be.
    """
    data = checked.acquire.data
    if not isinstance(data, LocalData):
        return _Rows(GUESSED, TOKENS_A_ROW, TOKENS_A_ROW, exact=False)
    data_files = data_sources.local(data, root, root)
    metric = checked.task.metric
    loaded = rows.load(data_files.files, data_files.shown, metric if isinstance(metric, str) else "own")
    count = {name: len(loaded.get(name, [])) for name in (*rows.SPLITS, rows.UNLABELLED)}
    train = loaded.get("train", [])
    if data_sources.ALL in loaded:
        train = loaded[data_sources.ALL]
        count |= {"test": round(data.test * len(train)), "validation": round(data.validation * len(train))}
        count["train"] = len(train) - count["test"] - count["validation"]
    count = {name: min(there, checked.acquire.most.of(name) or there) for name, there in count.items()}
    characters = sum(len(message["content"]) + MARKS for row in train for message in row.messages)
    tokens = int(characters / max(1, len(train)) / CHARACTERS_A_TOKEN)
    return _Rows(count, tokens, max(1, tokens - int(_shared(train) / CHARACTERS_A_TOKEN)), exact=True)


def _shared(train: Sequence[rows.Row]) -> int:
    """Characters that all rows begin with alike: mostly a system prompt."""
    turns = zip(*(row.messages for row in train), strict=False)
    alike = takewhile(lambda said: all(turn == said[0] for turn in said), turns)
    return sum(len(said[0]["content"]) + MARKS for said in alike) + MARKS


def _doubts(checked: params.Params, counted: _Rows) -> list[str]:
    """What of the data will not do for what the params ask of it."""
    if not counted.exact:
        return []
    empty = [name for name in rows.SPLITS if not counted.count[name]]
    doubts = [f"{' and '.join(empty)} will be empty: add rows, or change the shares of acquire.data"] if empty else []
    wanted, there = checked.teach.unlabelled_rows, counted.count[rows.UNLABELLED]
    if there < wanted:
        doubts.append(f"teach.unlabelled_rows is {wanted}, and the data has {there} unlabelled prompts")
    settings, test = checked.validate_, counted.count["test"]
    judged = {gate.name for gate in settings.gates} & {"accuracy", "accuracy_retention"}
    for name in sorted(judged) if test else ():
        half = _half_width(name, test, settings)
        if half > settings.max_half_width:
            enough = math.ceil(test * (half / settings.max_half_width) ** 2)
            doubts.append(
                f"{test} test rows tell {name} to about {half:.3f} either way, validate.max_half_width is "
                f"{settings.max_half_width}: near a limit the verdict stays undecided; about {enough:,} test rows would do"
            )
    return doubts


def _half_width(name: str, test: int, settings: Validate) -> float:
    """Half of the gate's own interval, where the teacher is right in nine of ten rows and the student differs in one."""
    count = min(max(test, 200), 5000)  # so few or so many are told from these
    differ = round(count * (1 - AGREEMENT) / 2)
    right = round(count * AGREEMENT)
    teacher = [True] * right + [False] * (count - right)
    student = [not correct if i < differ or i >= count - differ else correct for i, correct in enumerate(teacher)]
    low, high = gates.intervals(student, teacher, settings.bootstrap, settings.seed)[name]
    return (high - low) / 2 * math.sqrt(count / test)

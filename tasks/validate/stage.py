"""The shipped file itself, in its own runtime, against the teacher and the F16 student.

Quality (accuracy, perplexity, KLD) is the same on every run. Speed and memory are for `measure`. Whether that is good
enough, `judge` says.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError
from tasks.frame import jsonl
from tasks.frame.cores import busy
from tasks.frame.events import doing
from tasks.frame.stage import require_file, write_json
from tasks.metrics import METRICS
from tasks.models import chat, loading, scoring
from tasks.params import Params
from tasks.validate.shipped import Shipped
from tasks.variants import VARIANTS


def validate(
    params: Params, *, source: Path, distilled: Path, converted: Path, artifact: Path, variant: str, out: Path
) -> dict[str, float]:
    """Write metrics.json and predictions.jsonl into `out`; return the metrics.

    Raises:
        ArtifactError: an input is missing, or the teacher's predictions are of other test rows.
        ConfigError: the text for perplexity is too short.
        StageError: a runtime fails.
    """
    row = VARIANTS[variant]
    file = row.weights(artifact)
    if not file.exists():
        raise ArtifactError(f"{file} is missing: run quantize {variant} again")
    reference = require_file(converted / "student.gguf", "run the convert stage again")
    yardstick = require_file(converted / "teacher.gguf", "run the convert stage again")
    rows = chat.read_rows(source / "data" / "test.jsonl")
    scorer = scoring.load(params.task.metric, source)
    taught = _teacher(distilled / "predictions.jsonl", rows)
    doing("load libraries and tokenizer")
    tokenizer = loading.load_tokenizer(distilled / "model")
    stops = loading.stop_ids(distilled / "model", tokenizer)
    shipped = Shipped(
        row, file, reference, yardstick, rows, taught, source / "data" / "text.txt", tokenizer, stops, scorer,
        params.task, params.validate_,
    )  # fmt: skip

    doing("wait while another variant is measured")
    with busy(artifact.parent):
        metrics = _evaluated(shipped)
    write_json(out / "metrics.json", metrics)
    jsonl.write(out / "predictions.jsonl", shipped.predictions)
    numbers = {name: metrics.get(name) for name, metric in METRICS.items() if metric.better and not metric.measured}
    return {name: value for name, value in numbers.items() if isinstance(value, float) and math.isfinite(value)}


def _evaluated(shipped: Shipped) -> Mapping[str, Any]:
    """What each module that computes such metrics says, in the order of the table."""
    numbers: dict[str, Any] = {}
    for module in dict.fromkeys(metric.computed_by for metric in METRICS.values() if not metric.measured):
        numbers |= import_module(f"tasks.validate.{module}").evaluate(shipped)
    return numbers


def _teacher(file: Path, rows: Sequence[chat.Messages]) -> list[bool]:
    """Whether the teacher was right, row by row of the test set."""
    require_file(file, "run the distill and select stages again")
    lines = jsonl.read(file)
    if [line["reference"] for line in lines] != [row[-1]["content"] for row in rows]:
        raise ArtifactError(f"{file} was made from other test rows: run the distill and select stages again")
    return [line["teacher_correct"] for line in lines]

"""The start of every student: the teacher without its least important blocks and channels."""

from pathlib import Path
from typing import TypeVar

from tasks.frame import events
from tasks.frame.stage import place, write_json
from tasks.learning.accuracy_test import SAMPLE, AccuracyTest
from tasks.models import loading
from tasks.models.chat import encode_all, encoded_split, read_rows
from tasks.params import Params
from tasks.prune.blockwise import prune as remove_blocks_and_channels

Row = TypeVar("Row")


def prune(params: Params, *, source: Path, teacher: Path, out: Path) -> dict[str, float]:
    """Write `model/` in the arithmetic of training, so that nothing is rounded on the way, `pruning.json`, and
    `models.json` with what the pruned model still knows of the task.

    Raises:
        ConfigError: this architecture cannot be pruned, or not so far.
        DiskFullError: the disk is full.
    """
    settings, task = params.prune, params.task
    events.doing("load libraries and rows")
    tokenizer = loading.load_tokenizer(teacher / "model")
    test = AccuracyTest(tokenizer, loading.stop_ids(teacher / "model", tokenizer), task, source)
    # Which blocks to do without is a choice, so it is made on rows that the teacher did not learn.
    calibration = _spread(encoded_split(tokenizer, source, "validation", task.max_length), settings.calibration_rows)
    # Of many training rows a few are wanted: only those are encoded.
    train = _spread(read_rows(source / "data" / "train.jsonl"), settings.fitted_rows)
    fitted = encode_all(tokenizer, train, task.max_length)
    events.doing("load the teacher")
    model = loading.load_model(teacher / "model", loading.arithmetic(params.distill.precision))
    before = loading.count(model)
    removed = remove_blocks_and_channels(model, calibration, fitted, settings)
    write_json(out / "pruning.json", removed)
    taken = test.take("pruned", model, SAMPLE)
    write_json(out / "models.json", {"pruned": taken.facts})
    events.doing("save the pruned model")
    if settings.max_parameters < 1:
        loading.save(model, tokenizer, out / "model", str(model.dtype).removeprefix("torch."))
    else:
        for file in (teacher / "model").iterdir():
            place(file, out / "model" / file.name)
    return {
        "accuracy": taken.facts["accuracy"],
        "parameters": taken.facts["parameters"],
        "parameters_ratio": taken.facts["parameters"] / before,
    }


def _spread(rows: list[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly spread."""
    return rows[:: max(1, len(rows) // count)][:count] if count else []

"""Judge: what `validate` measured of one variant against the gates of params.yaml.

Nothing is measured here, so a change of a gate runs no model again.
"""

import json
from pathlib import Path

from tasks.errors import ArtifactError
from tasks.frame.events import doing
from tasks.frame.stage import read_json, require_file, write_json
from tasks.judge import gates
from tasks.params import Params


def judge(params: Params, *, validated: Path, variant: str, out: Path) -> dict[str, float]:
    """Write verdict.json and intervals.json into `out`; return the bounds of the intervals.

    Raises:
        ArtifactError: a file of `validate` is missing or damaged.
    """
    metrics, measured = read_json(validated / "metrics.json"), read_json(validated / "measurements.json")
    ours, theirs = _correct(require_file(validated / "predictions.jsonl", f"run validate {variant} again"))
    doing("draw the intervals")
    spread = gates.intervals(ours, theirs, params.validate_.bootstrap, params.validate_.seed)
    write_json(out / "intervals.json", {f"{name}_interval": bounds for name, bounds in spread.items()})
    write_json(out / "verdict.json", gates.judge(params.validate_, {**metrics, **measured}, spread))
    return {
        f"{name}_{end}": value
        for name, bounds in spread.items()
        for end, value in zip(("low", "high"), bounds, strict=True)
        if value == value  # an interval of nothing is NaN
    }


def _correct(predictions: Path) -> tuple[list[bool], list[bool]]:
    """Whether the file was right, row by row of the test set, and whether the teacher was."""
    try:
        lines = [json.loads(line) for line in predictions.open(encoding="utf-8")]
        return [bool(line["correct"]) for line in lines], [bool(line["teacher_correct"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{predictions} is damaged ({error}): run validate again") from None

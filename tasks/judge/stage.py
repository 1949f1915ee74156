"""Judge: what was measured of one variant on one kind of device, against the gates of params.yaml and of its profile.

Nothing is measured here, so a change of a gate runs no model again.
"""

import json
from pathlib import Path

from tasks import profiles
from tasks.errors import ArtifactError
from tasks.frame.events import doing
from tasks.frame.stage import read_json, require_file, write_json
from tasks.judge import gates
from tasks.params import Params
from tasks.profiles import Profile
from tasks.validate.params import Gate


def judge(
    params: Params, *, root: Path, validated: Path, measured: Path, variant: str, profile: str, out: Path
) -> dict[str, float]:
    """Write verdict.json and intervals.json into `out`; return the bounds of the intervals.

    Raises:
        ConfigError: there is no such profile, or it is wrong.
        ArtifactError: a file of `validate` or `measure` is missing or damaged.
    """
    device = profiles.load(root, profile)
    metrics, numbers = read_json(validated / "metrics.json"), read_json(measured / "measurements.json")
    ours, theirs = _correct(require_file(validated / "predictions.jsonl", f"run validate {variant} again"))
    doing("draw the intervals")
    spread = gates.intervals(ours, theirs, params.validate_.bootstrap, params.validate_.seed)
    verdict = gates.judge(params.validate_, (*params.validate_.gates, *_own(device)), {**metrics, **numbers}, spread)
    ended = {"ended": numbers["ended"]} if "ended" in numbers else {}
    write_json(out / "intervals.json", {f"{name}_interval": bounds for name, bounds in spread.items()})
    write_json(
        out / "verdict.json",
        {
            **verdict,
            **ended,
            "verdict": "fail" if ended else verdict["verdict"],
            "device": device.model_dump(mode="json", exclude={"gates"}),
        },
    )
    return {
        f"{name}_{end}": value
        for name, bounds in spread.items()
        for end, value in zip(("low", "high"), bounds, strict=True)
        if value == value  # an interval of nothing is NaN
    }


def _own(device: Profile) -> tuple[Gate, ...]:
    """The gates of a device, with that which follows from its memory."""
    if device.memory_mb is None:
        return device.gates
    return (*device.gates, Gate(name="peak_rss_bytes", at_most=device.memory_mb * 1e6))


def _correct(predictions: Path) -> tuple[list[bool], list[bool]]:
    """Whether the file was right, row by row of the test set, and whether the teacher was."""
    try:
        lines = [json.loads(line) for line in predictions.open(encoding="utf-8")]
        return [bool(line["correct"]) for line in lines], [bool(line["teacher_correct"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{predictions} is damaged ({error}): run validate again") from None

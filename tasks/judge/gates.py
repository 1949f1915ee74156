"""Numbers against the rules of params.yaml: pass, fail or, with too few test rows to tell, undecided."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tasks.validate.params import Gate, Validate

Verdict = Literal["pass", "fail", "undecided"]
Interval = tuple[float, float]


def intervals(candidate: Sequence[bool], teacher: Sequence[bool], resamples: int, seed: int) -> dict[str, Interval]:
    """95 % percentile intervals of accuracy and of its ratio to the teacher's, by paired bootstrap over rows.

    Both models answered the same rows, so a resample draws rows, not answers (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993). A resample in which the teacher has nothing right has no ratio.
    """
    import numpy as np

    ours, theirs = np.array(candidate, float), np.array(teacher, float)
    rows = np.random.default_rng(seed).integers(0, len(ours), (resamples, len(ours)))
    accuracy, reference = ours[rows].mean(axis=1), theirs[rows].mean(axis=1)
    ratio = accuracy[reference > 0] / reference[reference > 0]

    def middle(values: Any) -> Interval:
        if not len(values):
            return math.nan, math.nan
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    return {"accuracy": middle(accuracy), "accuracy_retention": middle(ratio)}


def check(gate: Gate, value: Any, interval: Interval | None, max_half_width: float) -> dict[str, Any]:
    """One line of a verdict. A missing number and NaN do not pass, whatever the direction."""
    direction, limit = ("at_least", gate.at_least) if gate.at_least is not None else ("at_most", gate.at_most)
    assert limit is not None  # Gate holds exactly one
    within: Callable[[float], bool] = (lambda x: x >= limit) if direction == "at_least" else (lambda x: x <= limit)
    known = isinstance(value, int | float) and math.isfinite(value)
    line: dict[str, Any] = {
        "name": gate.name,
        "value": value if known else None,
        "limit": limit,
        "direction": direction,
        "ok": known and within(value),
    }
    if interval is not None and known:
        low, high = interval
        line["interval"] = [low, high] if math.isfinite(low) else None
        line["undecided"] = low <= limit <= high and (high - low) / 2 > max_half_width
    return line


def judge(
    params: Validate, rules: Sequence[Gate], values: Mapping[str, Any], spread: Mapping[str, Interval]
) -> dict[str, Any]:
    """The content of verdict.json: a check that fails beyond doubt outweighs one that cannot be decided."""
    checks = [check(gate, values.get(gate.name), spread.get(gate.name), params.max_half_width) for gate in rules]
    open_checks = [line for line in checks if line.get("undecided")]
    failed = any(not line["ok"] for line in checks if line not in open_checks)
    verdict: Verdict = "fail" if failed else "undecided" if open_checks else "pass"
    return {"verdict": verdict, "checks": checks}

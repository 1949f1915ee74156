"""The result of a run as rows: one a variant, read from what the stages wrote."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.workspace.paths import Workspace
from tasks.frame.stage import folder, read_json
from tasks.metrics import COLUMNS, show
from tasks.package.choose import best, failing
from tasks.params import Params
from tasks.validate.params import Gate

HEADINGS = ("variant", "verdict", *(metric.column for metric in COLUMNS), "shipped")


@dataclass(frozen=True)
class Row:
    """One variant. `chosen`: it is what the bundle ships."""

    variant: str
    verdict: str
    numbers: Mapping[str, Any]  # by the name of the metric
    chosen: bool
    misses: str  # what did not hold

    def cells(self) -> list[str]:
        """The row as text for a table, under HEADINGS."""
        shown = [metric.show(self.numbers.get(metric.name)) for metric in COLUMNS]
        return [self.variant, self.verdict, *shown, "yes" if self.chosen else ""]


def bundle(root: Workspace) -> dict[str, Any]:
    """`bundle.json` of the packaged model.

    Raises:
        ArtifactError: there is none.
    """
    made: dict[str, Any] = read_json(folder(root, "package") / "bundle.json")
    return made


def rows(root: Workspace, params: Params, *, packaged: bool = True) -> list[Row]:
    """The variants of a finished run, in the order of params, with the numbers of the device on which each does best;
    `packaged`: one of them may have been chosen.

    Raises:
        ArtifactError: validate, measure, judge or package did not run.
    """
    chosen = bundle(root)["chosen"] if packaged else None
    table = []
    for variant in params.quantize.variants:
        metrics = read_json(folder(root, "validate", variant) / "metrics.json")
        verdicts = {
            device: read_json(folder(root, "judge", variant, device) / "verdict.json")
            for device in params.measure.profiles
        }
        device = best(verdicts)
        measured = read_json(folder(root, "measure", variant, device) / "measurements.json")
        table.append(
            Row(
                variant=variant,
                verdict=summary(verdicts),
                numbers={**metrics, **measured},
                chosen=variant == chosen,
                misses=misses_by_device(verdicts),
            )
        )
    return table


def summary(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """The verdicts of the devices in a few words."""
    verdict = str(verdicts[best(verdicts)]["verdict"])
    passed = sum(each["verdict"] == "pass" for each in verdicts.values())
    return f"pass on {passed} of {len(verdicts)}" if 0 < passed < len(verdicts) else verdict


def _value(numbers: dict[str, Any], name: str) -> float:
    value = numbers.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def student(root: Workspace, gates: Sequence[Gate]) -> str:
    """What the student that goes on keeps of its teacher, against the gates on accuracy: told before its files are made."""
    models = read_json(folder(root, "select") / "models.json")
    ours, theirs = (_value(models[name], "accuracy") for name in ("distilled", "teacher"))
    kept = ours / theirs if theirs else math.nan
    sentence = f"the student keeps {kept:.1%} of the teacher's accuracy on the test rows ({ours:.3f} of {theirs:.3f})"
    below = [
        f"{gate.name} at least {gate.at_least}"
        for gate in gates
        if gate.at_least is not None
        and not {"accuracy": ours, "accuracy_retention": kept}.get(gate.name, math.inf) >= gate.at_least
    ]
    return f"{sentence}; the gates want {', '.join(below)}, so its files are not likely to pass" if below else sentence


def misses(verdict: Mapping[str, Any]) -> str:
    """What did not hold of a variant's verdict, or was not decided; "" where all did."""
    ended = [verdict["ended"]] if "ended" in verdict else []
    return "; ".join([*ended, *(_against_limit(check) for check in failing(verdict))])


def misses_by_device(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """`misses` of a variant on each device, named where there are several; what is the same on all is told once."""
    lines = {name: why for name, verdict in verdicts.items() if (why := misses(verdict))}
    if len(set(lines.values())) == 1 and len(lines) == len(verdicts):
        return next(iter(lines.values()))
    return "; ".join(f"on {name}: {why}" for name, why in lines.items())


def narrowest(verdict: Mapping[str, Any]) -> str:
    """Of a variant that passed: what the gates with an interval rest on, for those hold by chance most easily."""
    return "; ".join(_against_limit(check) for check in verdict["checks"] if check.get("interval"))


def _against_limit(check: Mapping[str, Any]) -> str:
    name = str(check["name"])
    value = show(name, check["value"]) if isinstance(check.get("value"), (int, float)) else "missing"
    direction = str(check.get("direction", "limit")).replace("_", " ")
    spread = check.get("interval")
    inside = f", 95 % interval {show(name, spread[0])} to {show(name, spread[1])}" if spread else ""
    return f"{name} is {value}{inside}, wanted {direction} {show(name, check.get('limit'))}"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and why those that did not pass did not."""
    lines = ("---", "---", *("---:" for _ in COLUMNS), "---")
    head = f"| {' | '.join(HEADINGS)} |\n|{'|'.join(lines)}|"
    table = "\n".join([head, *("| " + " | ".join(row.cells()) + " |" for row in rows)])
    open_ = "\n".join(f"- **{row.variant}** {row.verdict}: {row.misses}" for row in rows if row.misses)
    return f"{table}\n\n{open_}" if open_ else table

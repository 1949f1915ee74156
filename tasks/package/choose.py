"""Which variant is shipped, and why: the best that passed every gate, by the rule in params.yaml.

A reason is written twice. `reason` names only numbers that equal work reproduces, since it goes into the
bundle's manifest; `measured_reason` adds what was measured on this machine and goes into the report.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError
from tasks.frame.stage import read_json
from tasks.variants import VARIANTS, Runtime

VERDICTS = ("pass", "fail", "undecided")


@dataclass(frozen=True)
class Candidate:
    """One variant: its files, what was measured on them and how the gates judged."""

    name: str
    runtime: Runtime
    weights: Path
    metrics: Mapping[str, Any]  # the same on every machine
    measurements: Mapping[str, Any]  # of this machine
    verdict: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return bool(self.verdict["verdict"] == "pass")


def failing(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The checks that did not hold, or for which the test rows are too few."""
    return [check for check in verdict["checks"] if check["ok"] is not True or check.get("undecided")]


@dataclass(frozen=True)
class Choice:
    """The winner of all, the winner of each runtime, and the sentences that explain it."""

    chosen: Candidate | None
    best: Mapping[str, Candidate]  # by runtime
    reason: str
    measured_reason: str


@dataclass(frozen=True)
class Rule:
    """An order of candidates: the least `key` wins; `show` gives the number it rests on."""

    key: Callable[[Candidate], tuple[float, ...]]
    show: Callable[[Candidate], str]
    measured: bool = False


def candidates(artifacts: Path, validated: Path, verdicts: Path, variants: Sequence[str]) -> list[Candidate]:
    """The variants, by name. What lies beside them is of an earlier run, with other parameters, and not looked at.

    Raises:
        ArtifactError: a variant was not validated or judged, or one of its files is missing or damaged.
    """
    return [_candidate(artifacts / name, validated / name, verdicts / name) for name in sorted(variants)]


def _candidate(artifact: Path, validated: Path, judged: Path) -> Candidate:
    variant = VARIANTS[artifact.name]
    if not (artifact / variant.runtime.mark).is_file():
        raise ArtifactError(f"{artifact / variant.runtime.mark} is missing: run `quantize {variant.name}` again")
    verdict = read_json(judged / "verdict.json")
    checks = verdict.get("checks")
    if verdict.get("verdict") not in VERDICTS or not isinstance(checks, list):
        raise ArtifactError(
            f"{judged / 'verdict.json'}: `verdict` must be one of {', '.join(VERDICTS)}, with `checks`: run `judge` again"
        )
    metrics = read_json(validated / "metrics.json") | read_json(judged / "intervals.json")
    measurements = read_json(validated / "measurements.json")
    return Candidate(variant.name, variant.runtime, variant.weights(artifact), metrics, measurements, verdict)


def _number(candidate: Candidate, source: Mapping[str, Any], name: str) -> float:
    value = source.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(
            f"{candidate.name} passed, but its {name} is {value}: run `validate {candidate.name}` again"
        )
    return float(value)


def _size(candidate: Candidate) -> float:
    return _number(candidate, candidate.metrics, "size_bytes")


def _speed(candidate: Candidate) -> float:
    return _number(candidate, candidate.measurements, "decode_tokens_per_s")


def _accuracy(candidate: Candidate) -> float:
    return _number(candidate, candidate.metrics, "accuracy")


RULES: Mapping[str, Rule] = {
    "smallest": Rule(lambda c: (_size(c),), lambda c: f"{_size(c) / 1e6:.1f} MB"),
    "fastest": Rule(lambda c: (-_speed(c),), lambda c: f"{_speed(c):.1f} tokens/s", measured=True),
    "most_accurate": Rule(
        lambda c: (-_accuracy(c), _size(c)), lambda c: f"accuracy {_accuracy(c):.4f}, {_size(c) / 1e6:.1f} MB"
    ),
}


def choose(all_of_run: Sequence[Candidate], rule_name: str, runtimes: set[str]) -> Choice:
    """Order the passing variants by the rule, ties by name; `runtimes`: those that a wanted target carries."""
    rule = RULES[rule_name]
    ranked = sorted(
        (c for c in all_of_run if c.passed and c.runtime.name in runtimes), key=lambda c: (*rule.key(c), c.name)
    )
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.runtime.name, candidate)
    losers = [c for c in all_of_run if c not in ranked]
    label = rule_name.replace("_", " ")
    return Choice(
        ranked[0] if ranked else None, best,
        _reason(ranked, losers, label, rule, measured=False), _reason(ranked, losers, label, rule, measured=True),
    )  # fmt: skip


def _reason(ranked: list[Candidate], losers: list[Candidate], label: str, rule: Rule, *, measured: bool) -> str:
    def shown(candidate: Candidate) -> str:
        return f"{candidate.name} ({rule.show(candidate)})" if measured or not rule.measured else candidate.name

    if not ranked:
        sentences = ["Nothing is shipped: no variant that a wanted target carries passed every gate."]
    elif len(ranked) == 1:
        sentences = [f"{shown(ranked[0])} is the only variant that passed every gate."]
    else:
        behind = ", ".join(map(shown, ranked[1:]))
        sentences = [
            f"{shown(ranked[0])} is the {label} of the {len(ranked)} variants that passed; behind it {behind}."
        ]
    for loser in losers:
        if loser.passed:
            sentences.append(f"{loser.name} passed, but no wanted target carries files of {loser.runtime.label}.")
            continue
        word = "failed" if loser.verdict["verdict"] == "fail" else "is undecided on"
        checks = ", ".join(_check(check, loser, measured=measured) for check in failing(loser.verdict))
        sentences.append(f"{loser.name} {word} {checks or 'its gates'}.")
    return " ".join(sentences)


def _check(check: Mapping[str, Any], candidate: Candidate, *, measured: bool) -> str:
    # A gate on speed or memory has another value on each run; only its name is reproducible.
    if not measured and check["name"] not in candidate.metrics:
        return str(check["name"])
    value = check.get("value")
    number = f"{value:.4g}" if isinstance(value, (int, float)) else "missing"
    return f"{check['name']} ({number}, limit {check.get('limit')})"

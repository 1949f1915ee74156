"""Which variant is shipped, and why: of those that passed every gate on most of the devices, the best by the rule in
params.yaml; and which is the best for each device.

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

VERDICTS = ("pass", "undecided", "fail")  # best first


@dataclass(frozen=True)
class Candidate:
    """One variant: its files, what was measured on them and how the gates judged."""

    name: str
    runtime: Runtime
    weights: Path
    metrics: Mapping[str, Any]  # the same on every machine
    measured: Mapping[str, Mapping[str, Any]]  # on this machine, by device profile
    verdicts: Mapping[str, Mapping[str, Any]]  # by device profile

    @property
    def device(self) -> str:
        """The device on which it does best, of several the first: what is told where there is room for one."""
        return best(self.verdicts)

    @property
    def verdict(self) -> Mapping[str, Any]:
        """Its verdict there: it passed if there is a device on which it passes."""
        return self.verdicts[self.device]

    @property
    def passes(self) -> tuple[str, ...]:
        """The devices on which it passed."""
        return tuple(name for name, verdict in self.verdicts.items() if verdict["verdict"] == "pass")

    @property
    def passed(self) -> bool:
        return bool(self.passes)


def best(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """The device of the best verdict, of several the first."""
    return min(verdicts, key=lambda device: VERDICTS.index(verdicts[device]["verdict"]))


def failing(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The checks that did not hold, or for which the test rows are too few; not those that have no number because the file
    did not run.
    """
    checks = [check for check in verdict["checks"] if check["ok"] is not True or check.get("undecided")]
    return [check for check in checks if check.get("value") is not None] if "ended" in verdict else checks


@dataclass(frozen=True)
class Choice:
    """The winner of all, of each runtime and of each device, and the sentences that explain it."""

    chosen: Candidate | None
    best: Mapping[str, Candidate]  # by runtime
    devices: Mapping[str, Candidate]  # by device profile; without those on which nothing passed
    why: Mapping[str, str]  # by device profile, a sentence with numbers of this machine
    reason: str
    measured_reason: str


@dataclass(frozen=True)
class Rule:
    """An order of candidates: the least `key` wins; `show` gives the number it rests on."""

    key: Callable[[Candidate, str], tuple[float, ...]]  # of a candidate on a device
    show: Callable[[Candidate, str], str]
    measured: bool = False


def candidates(
    artifacts: Path, validated: Path, measured: Path, verdicts: Path, variants: Sequence[str], devices: Sequence[str]
) -> list[Candidate]:
    """The variants, by name. What lies beside them is of an earlier run, with other parameters, and not looked at.

    Raises:
        ArtifactError: a variant was not validated, measured or judged, or one of its files is missing or damaged.
    """
    return [
        _candidate(artifacts / name, validated / name, measured / name, verdicts / name, devices)
        for name in sorted(variants)
    ]


def _candidate(artifact: Path, validated: Path, measured: Path, judged: Path, devices: Sequence[str]) -> Candidate:
    variant = VARIANTS[artifact.name]
    if not (artifact / variant.runtime.mark).is_file():
        raise ArtifactError(f"{artifact / variant.runtime.mark} is missing: run `quantize {variant.name}` again")
    # The intervals are those of the same answers on every device.
    metrics = read_json(validated / "metrics.json") | read_json(judged / devices[0] / "intervals.json")
    measurements = {device: read_json(measured / device / "measurements.json") for device in devices}
    verdicts = {device: _verdict(judged / device / "verdict.json") for device in devices}
    return Candidate(variant.name, variant.runtime, variant.weights(artifact), metrics, measurements, verdicts)


def _verdict(path: Path) -> Mapping[str, Any]:
    verdict = read_json(path)
    checks = verdict.get("checks")
    if verdict.get("verdict") not in VERDICTS or not isinstance(checks, list):
        raise ArtifactError(f"{path}: `verdict` must be one of {', '.join(VERDICTS)}, with `checks`: run `judge` again")
    return verdict


def _number(candidate: Candidate, source: Mapping[str, Any], name: str) -> float:
    value = source.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(
            f"{candidate.name} passed, but its {name} is {value}: run validate and measure of {candidate.name} again"
        )
    return float(value)


def _size(candidate: Candidate) -> float:
    return _number(candidate, candidate.metrics, "size_bytes")


def _speed(candidate: Candidate, device: str) -> float:
    return _number(candidate, candidate.measured[device], "decode_tokens_per_s")


def _accuracy(candidate: Candidate) -> float:
    return _number(candidate, candidate.metrics, "accuracy")


RULES: Mapping[str, Rule] = {
    "smallest": Rule(lambda c, _: (_size(c),), lambda c, _: f"{_size(c) / 1e6:.1f} MB"),
    "fastest": Rule(lambda c, on: (-_speed(c, on),), lambda c, on: f"{_speed(c, on):.1f} tokens/s", measured=True),
    "most_accurate": Rule(
        lambda c, _: (-_accuracy(c), _size(c)), lambda c, _: f"accuracy {_accuracy(c):.4f}, {_size(c) / 1e6:.1f} MB"
    ),
}


def choose(all_of_run: Sequence[Candidate], rule_name: str, runtimes: set[str]) -> Choice:
    """Order the passing variants by the number of devices on which they pass, then by the rule, then by name; those of one
    device by the rule there. `runtimes`: those that a wanted target carries.
    """
    rule = RULES[rule_name]
    carried = [c for c in all_of_run if c.passed and c.runtime.name in runtimes]
    ranked = sorted(carried, key=lambda c: (-len(c.passes), *rule.key(c, c.device), c.name))
    of_runtime: dict[str, Candidate] = {}
    for candidate in ranked:
        of_runtime.setdefault(candidate.runtime.name, candidate)
    devices: dict[str, Candidate] = {}
    for device in dict.fromkeys(each for c in carried for each in c.verdicts):
        there = [c for c in carried if device in c.passes]
        if there:
            devices[device] = min(there, key=lambda c: (*rule.key(c, device), c.name))
    losers = [c for c in all_of_run if c not in ranked]
    label = rule_name.replace("_", " ")
    names = list(all_of_run[0].verdicts) if all_of_run else []
    why = {device: _device_reason(all_of_run, devices.get(device), device, label, rule) for device in names}
    return Choice(
        ranked[0] if ranked else None, of_runtime, devices, why,
        _reason(ranked, losers, label, rule, measured=False), _reason(ranked, losers, label, rule, measured=True),
    )  # fmt: skip


def front(passed: Sequence[Candidate], device: str) -> list[Candidate]:
    """The Pareto front: those that no other one equals or beats in size, speed on the device and mean KLD together."""

    def costs(candidate: Candidate) -> tuple[float, float, float]:
        divergence = candidate.metrics.get("mean_kld")
        return _size(candidate), -_speed(candidate, device), math.inf if divergence is None else divergence

    def beaten(candidate: Candidate) -> bool:
        own = costs(candidate)
        others = (costs(each) for each in passed if each is not candidate)
        return any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in others)

    return [each for each in passed if not beaten(each)]


def _reason(ranked: list[Candidate], losers: list[Candidate], label: str, rule: Rule, *, measured: bool) -> str:
    def shown(candidate: Candidate) -> str:
        number = rule.show(candidate, candidate.device)
        return f"{candidate.name} ({number})" if measured or not rule.measured else candidate.name

    if not ranked:
        sentences = ["Nothing is shipped: no variant that a wanted target carries passed every gate."]
    else:
        devices, most = len(ranked[0].verdicts), len(ranked[0].passes)
        where = (
            ""
            if devices == 1
            else f" on all {devices} devices"
            if most == devices
            else f" on {most} of {devices} devices"
        )
        first = [c for c in ranked if len(c.passes) == most]
        which = "only variant" if len(first) == 1 else f"{label} of the {len(first)} variants"
        behind = f"; behind it {', '.join(map(shown, ranked[1:]))}" if ranked[1:] else ""
        every = " every gate" if len(ranked) == 1 else ""
        sentences = [f"{shown(ranked[0])} is the {which} that passed{every}{where}{behind}."]
    sentences += [
        f"{c.name} did not pass on {', '.join(d for d in c.verdicts if d not in c.passes)}."
        for c in ranked
        if len(c.passes) < len(c.verdicts)
    ]
    for loser in losers:
        if loser.passed:
            sentences.append(f"{loser.name} passed, but no wanted target carries files of {loser.runtime.label}.")
            continue
        if "ended" in loser.verdict:
            why = f": {loser.verdict['ended']}" if measured else ""
            sentences.append(f"{loser.name} does not run on {loser.device}{why}.")
            continue
        word = "failed" if loser.verdict["verdict"] == "fail" else "is undecided on"
        checks = ", ".join(_check(check, loser, measured=measured) for check in failing(loser.verdict))
        sentences.append(f"{loser.name} {word} {checks or 'its gates'}.")
    return " ".join(sentences)


def _device_reason(all_of_run: Sequence[Candidate], best: Candidate | None, device: str, label: str, rule: Rule) -> str:
    passed = [c for c in all_of_run if device in c.passes]
    if best is None:
        carried = " that a wanted target carries" if passed else ""
        return f"No variant{carried} passed every gate of it."
    if len(passed) == 1:
        return f"{best.name} is the only one that passed every gate of it ({rule.show(best, device)})."
    names = ", ".join(each.name for each in front(passed, device))
    return (
        f"{best.name} is the {label} of the {len(passed)} that passed every gate of it ({rule.show(best, device)}). "
        f"No other is better than these in size, speed and KLD together: {names}."
    )


def _check(check: Mapping[str, Any], candidate: Candidate, *, measured: bool) -> str:
    # A gate on speed or memory has another value on each run; only its name is reproducible.
    if not measured and check["name"] not in candidate.metrics:
        return str(check["name"])
    value = check.get("value")
    number = f"{value:.4g}" if isinstance(value, (int, float)) else "missing"
    return f"{check['name']} ({number}, limit {check.get('limit')})"

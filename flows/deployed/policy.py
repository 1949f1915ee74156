"""Is one run's say about release at least as strict as a commit's? A form may tighten what a commit says, never loosen it.

What decides on a release is the params section `release`, the gates, how sure a gate must be (`validate.max_half_width`),
and the device profiles with their gates: all of it, and nothing else, is compared here.
"""

import math
from collections.abc import Mapping, Sequence

import yaml

from flows.workspace import worktrees
from flows.workspace.paths import MainCheckout
from tasks import params, profiles
from tasks.errors import ConfigError
from tasks.params import Params
from tasks.profiles import Profile
from tasks.validate.params import Gate

RUNS = ("Run ", "Validate ")  # how the subjects begin of the commits that runs make


def check(main: MainCheckout, commit: str, wanted: Params) -> None:
    """Refuse the parameters of a deployed run that loosen what was committed about release.

    Raises:
        ConfigError: names every one of them, with its key.
    """
    binding = references(main, commit)
    if loosenings := [*loosened_from(binding, wanted), *_loosened_devices(main, list(binding), commit, wanted)]:
        raise ConfigError(
            "what a commit says about release no single run may loosen:\n  " + "\n  ".join(loosenings) + "\n"
            "leave that out of the form or settings, or commit other parameters and run that commit"
        )


def references(main: MainCheckout, commit: str) -> dict[str, Params]:
    """The parameters that bind a deployed run of `commit`, by the names of their commits: its own; those of the commit
    that a person made, where it is one that a run has made (of looser parameters, it may be); and those of HEAD, where
    that is newer, so that an old commit does not bring an old policy back.

    Raises:
        ConfigError: there is no such commit, or its parameters are wrong.
    """
    own = worktrees.git(main, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    head = worktrees.git(main, "rev-parse", "HEAD")
    made = own
    while not _holds(main, head, made) and _by_a_run(main, made):
        made = worktrees.git(main, "rev-parse", f"{made}^")
    chosen = {own: commit, made: made[:12]} | ({head: "HEAD"} if _holds(main, head, made) else {})
    return {name: _params(main, sha, name) for sha, name in chosen.items()}


def _holds(main: MainCheckout, head: str, commit: str) -> bool:
    """Is it `head`, or one before it?"""
    return worktrees.git(main, "rev-list", "--count", f"{head}..{commit}") == "0"


def _by_a_run(main: MainCheckout, commit: str) -> bool:
    tips = worktrees.git(main, "for-each-ref", "--format=%(objectname)", "refs/heads/runs/").split()
    return commit in tips and worktrees.git(main, "show", "-s", "--format=%s", commit).startswith(RUNS)


def _params(main: MainCheckout, commit: str, name: str) -> Params:
    raw = yaml.safe_load(worktrees.git(main, "show", f"{commit}:params.yaml"))
    if not isinstance(raw, dict):
        raise ConfigError(f"params.yaml of {name} holds no sections: run another commit")
    return params.check(raw, f"params.yaml of {name}")


def loosened(said: Params, wanted: Params) -> list[str]:
    """What `wanted` has looser than `said`, each as a line with its key; empty: it is at least as strict. NaN is looser."""
    before, after = said.release, wanted.release
    loosenings = [
        f"validate.gates: {_gate(gate)} is missing or weaker"
        for gate in said.validate_.gates
        if not any(_as_strict(gate, other) for other in wanted.validate_.gates)
    ]
    if set(said.measure.profiles) != set(wanted.measure.profiles):  # to pass on one device is enough
        loosenings.append(
            f"measure.profiles: {', '.join(wanted.measure.profiles)} are not {', '.join(said.measure.profiles)}"
        )
    if not wanted.validate_.max_half_width <= said.validate_.max_half_width:
        loosenings.append(
            _more("validate.max_half_width", said.validate_.max_half_width, wanted.validate_.max_half_width)
        )
    if before.approval == "manual" and after.approval != "manual":
        loosenings.append("release.approval: manual, so a person releases")
    if before.separate_duties and not after.separate_duties:
        loosenings.append("release.separate_duties: true, so who starts a run may not approve it")
    if not after.margin >= before.margin:
        loosenings.append(f"release.margin: {after.margin:g} is below {before.margin:g}")
    if not after.expires_hours <= before.expires_hours:
        loosenings.append(_more("release.expires_hours", before.expires_hours, after.expires_hours))
    return loosenings


def loosened_from(references: Mapping[str, Params], wanted: Params) -> list[str]:
    """`loosened` against each of several commits, named; what more than one of them says is told once."""
    lines: dict[str, str] = {}
    for commit, said in references.items():
        for line in loosened(said, wanted):
            lines.setdefault(line, f"{line} ({commit})")
    return list(lines.values())


def _loosened_devices(main: MainCheckout, commits: Sequence[str], commit: str, wanted: Params) -> list[str]:
    """Where the device profiles of `commit`, which a run of it reads, are looser than those of the commits that bind it."""
    lines = []
    for name in wanted.measure.profiles:
        ours = _profile(main, commit, name)
        for other in commits:
            said = _profile(main, other, name)
            if said is None or ours is None:  # the run itself says that it is missing
                continue
            where = f"{profiles.FOLDER}/{name}.yaml"
            lines += [
                f"{where}: {_gate(gate)} is missing or weaker ({other})"
                for gate in said.gates
                if not any(_as_strict(gate, each) for each in ours.gates)
            ]
            if said.memory_mb is not None and not (ours.memory_mb or math.inf) <= said.memory_mb:
                lines.append(f"{where}: memory_mb is above {said.memory_mb} ({other})")
    return lines


def _profile(main: MainCheckout, commit: str, name: str) -> Profile | None:
    """A device profile as a commit has it; None: it has none of that name."""
    place = f"{profiles.FOLDER}/{name}.yaml"
    if not worktrees.git(main, "ls-tree", commit, "--", place):
        return None
    text = worktrees.git(main, "show", f"{commit}:{place}")
    return profiles.parsed(text.encode(), f"{place} of {commit}")


def _as_strict(gate: Gate, other: Gate) -> bool:
    """Whatever passes `other` passes `gate`."""
    if gate.name != other.name:
        return False
    if gate.at_least is not None:
        return other.at_least is not None and other.at_least >= gate.at_least
    assert gate.at_most is not None  # Gate holds exactly one
    return other.at_most is not None and other.at_most <= gate.at_most


def _gate(gate: Gate) -> str:
    return (
        f"{gate.name} at least {gate.at_least:g}"
        if gate.at_least is not None
        else f"{gate.name} at most {gate.at_most:g}"
    )


def _more(key: str, said: float, wanted: float) -> str:
    return f"{key}: {wanted:g} is above {said:g}"

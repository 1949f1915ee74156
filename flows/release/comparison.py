"""Whether a version is better than the champion: by accuracy, and only where both answered the same test rows.

A bundle says which data its model was tested on: by the digest of what `acquire` made (the scoring rule of
`task` is in it too), or by the sha256 of the test file that came with the data. Where one file was split, the
rows of its test part are known by the first alone.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from tasks.metrics import GATED, METRICS, show
from tasks.package.bundle import Bundle

EQUAL = 1e-9  # accuracies are shares of rows: 0.95 - 0.93 must count as 0.02, which it is not in binary


@dataclass(frozen=True)
class Pair:
    """One metric of both; None: there is no champion, or the number is not in its bundle."""

    version: float
    champion: float | None

    @property
    def difference(self) -> float | None:
        """The version's less the champion's."""
        return None if self.champion is None else self.version - self.champion


@dataclass(frozen=True)
class Comparison:
    """A version beside the champion. Hand `digest` and `champion` on to `approve`, to decide on what was seen."""

    version: str
    digest: str  # of the version's bundle
    champion: str  # "": there is none
    comparable: bool  # their accuracies are of the same test rows
    reason: str  # which rows, or why they cannot be compared
    metrics: dict[str, Pair]  # by standard name

    @property
    def gain(self) -> float | None:
        """Accuracy above the champion's; None: not comparable."""
        return self.metrics["accuracy"].difference if self.comparable else None

    @property
    def worse(self) -> bool:
        """It is known to be worse than the champion."""
        return self.gain is not None and self.gain < -EQUAL

    def better_by(self, margin: float) -> bool:
        """It is known to be better, by at least that much, or nothing was released yet."""
        return not self.champion or (self.gain is not None and self.gain > EQUAL and self.gain >= margin - EQUAL)

    def text(self) -> str:
        """One line for a person."""
        if not self.champion:
            return "no champion to compare with"
        if self.champion == self.version:
            return "it is the champion"
        if not self.comparable:
            return f"not comparable with the champion, version {self.champion}: {self.reason}"
        ours = self.metrics["accuracy"]
        return (
            f"accuracy {ours.version:.4f} against {ours.champion:.4f} of the champion, version {self.champion}, "
            f"on {self.reason}"
        )

    def markdown(self, name: str) -> str:
        """The question to be decided, with the numbers of both beside each other."""
        head, *rows = self._rows()
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"Release **{name} version {self.version}** (bundle {self.digest[:12]})?\n\n{self.text()}\n\n{table}"

    def table(self, name: str) -> str:
        """The same for a terminal."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
        lines = [form.format(*row) for row in rows]
        return "\n".join([f"{name} version {self.version} (bundle {self.digest[:12]}): {self.text()}", *lines])

    def _rows(self) -> list[list[str]]:
        """The numbers of both, and how they differ, under a head."""
        rows = [["", f"version {self.version}", f"champion, version {self.champion}", "difference"]]
        for name, pair in self.metrics.items():
            both = ["-", "-"] if pair.champion is None else [show(name, pair.champion), _signed(name, pair.difference)]
            rows.append([METRICS[name].label, show(name, pair.version), *both])
        return rows if self.champion not in ("", self.version) else [row[:2] for row in rows]


def _signed(name: str, value: float | None) -> str:
    return "-" if value is None else f"{'+' if value > 0 else ''}{show(name, value)}"


def compare(version: str, digest: str, ours: Bundle, champion: str, theirs: Bundle | None) -> Comparison:
    """Hold a version's bundle against the champion's; `theirs` is None where there is none to read."""
    mine, other = _numbers(ours), _numbers(theirs) if theirs else {}
    metrics = {name: Pair(mine[name], other.get(name)) for name in GATED if name in mine}
    if theirs is None:
        comparable, reason = False, "its bundle moved or changed" if champion else "nothing was released yet"
    elif "accuracy" not in mine or "accuracy" not in other:
        comparable, reason = False, "one of them has no accuracy"
    else:
        comparable, reason = _same_rows(ours, theirs)
    return Comparison(version, digest, champion, comparable, reason, metrics)


def _numbers(bundle: Bundle) -> dict[str, float]:
    metrics = bundle.evaluation[bundle.chosen].metrics if bundle.chosen else {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _same_rows(ours: Bundle, theirs: Bundle) -> tuple[bool, str]:
    sources = [bundle.created_from.get("source") for bundle in (ours, theirs)]
    if sources[0] and sources[0] == sources[1]:
        return True, "the same data"
    mine, other = _test_file(ours), _test_file(theirs)
    if not mine or not other:
        return False, "their bundles do not tell whether they were tested on the same rows"
    return (True, "the same test.jsonl") if mine == other else (False, "they were tested on different rows")


def _test_file(bundle: Bundle) -> str | None:
    """The sha256 of the test split, where the data came split."""
    data = bundle.lineage.get("data")
    files = data.get("sha256") if isinstance(data, dict) else None
    named = {PurePosixPath(path).name: str(digest) for path, digest in files.items()} if isinstance(files, dict) else {}
    return named.get("test.jsonl") if "train.jsonl" in named else None

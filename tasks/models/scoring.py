"""How an answer is judged. One dict, one function a metric; used while training and on the shipped file.

A metric of one's own is a function in a file that `acquire` copies, so that what a stage makes is tied to its bytes.
"""

import inspect
import json
import re
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import ConfigError
from tasks.models.params import OwnMetric

OWN = "metric.py"  # in what `acquire` makes


@dataclass(frozen=True)
class Metric:
    """`match(answer, reference)`, and whether an unfinished answer may still become a match."""

    match: Callable[[str, str], bool]
    possible: Callable[[str, str], bool]


def json_match(answer: str, reference: str) -> bool:
    """Exact match of the parsed JSON: spacing and key order do not matter, types and values do."""
    try:
        return bool(_strict(json.loads(answer)) == _strict(json.loads(reference)))
    except (ValueError, RecursionError):
        return False


def _strict(value: object) -> object:
    # Python holds 1 == True and 1 == 1.0 for equal; JSON's readers need not.
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return (type(value).__name__, value)


def text_match(answer: str, reference: str) -> bool:
    """Match after case folding and collapsing white space: for class labels and short answers."""
    return " ".join(answer.casefold().split()) == " ".join(reference.casefold().split())


def json_possible(beginning: str, reference: str) -> bool:
    """A JSON answer starts as its reference does, white space aside, and what is there so far can become JSON."""
    start = beginning.strip()[:1]
    if start not in ("", reference.strip()[:1]):
        return False
    try:
        value = json.loads(beginning)
    except json.JSONDecodeError as error:
        rest = beginning[error.pos :]
        # Where JSON's reader stops in a text that merely ends too early: at its end, or at the start of what is unfinished.
        return rest.strip() == "" or error.msg.startswith("Unterminated") or bool(_UNFINISHED.fullmatch(rest))
    except RecursionError:
        return False
    return start not in ("{", "[") or _strict(value) == _strict(json.loads(reference))


# A fraction or exponent, a word, or an escape in a string, each without its end.
_UNFINISHED = re.compile(
    r"\.|[eE][+-]?|-|t(r(u)?)?|f(a(l(s)?)?)?|n(u(l)?)?|N(a)?|-?I(n(f(i(n(i(t)?)?)?)?)?)?|\\?(u[0-9a-fA-F]{0,4})?|[0-9a-fA-F]{0,4}"
)


def text_possible(beginning: str, reference: str) -> bool:
    """A text answer is a beginning of its reference, white space and case aside."""
    return "".join(reference.casefold().split()).startswith("".join(beginning.casefold().split()))


METRICS: Mapping[str, Metric] = {
    "json": Metric(json_match, json_possible),
    "text": Metric(text_match, text_possible),
}


def load(metric: str | OwnMetric, acquired: Path) -> Metric:
    """The metric that `task.metric` names; one's own from the copy in what `acquire` made.

    Raises:
        ConfigError: the file has no such function, or fails.
    """
    if isinstance(metric, str):
        return METRICS[metric]
    return own(acquired / OWN, str(metric.file), metric.function)


def own(file: Path, shown: str, function: str) -> Metric:
    """The metric of a function `match(answer: str, reference: str) -> bool` in a Python file; messages call it `shown`.

    Raises:
        ConfigError: the file has no such function, or fails.
    """
    namespace: dict[str, object] = {"__name__": "metric", "__file__": str(file)}
    try:
        # Compiled from the bytes, so that no cache is written beside the file or read in its place.
        exec(compile(file.read_bytes(), str(file), "exec"), namespace)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a person's own code may raise)
        raise ConfigError(f"task.metric: {_told(file, shown, error)}: correct it") from None
    made = namespace.get(function)
    if not callable(made):
        raise ConfigError(f"task.metric: {shown} has no function {function}: name one that takes (answer, reference)")
    call: Callable[..., object] = made
    try:
        inspect.signature(call).bind("", "")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task.metric: {function} of {shown} cannot take (answer, reference): {error}") from None

    def match(answer: str, reference: str) -> bool:
        try:
            verdict = call(answer, reference)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (as above)
            raise ConfigError(_told(file, shown, error)) from None
        if not isinstance(verdict, bool):
            raise ConfigError(f"{shown}: {function} gave {repr(verdict)[:60]}, not True or False")
        return verdict

    return Metric(match, lambda beginning, reference: True)


def _told(file: Path, shown: str, error: BaseException) -> str:
    """`data/metric.py line 3: KeyError: 'action'`: the innermost line of that file that an error went through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = shown if line is None else f"{shown} line {line}"
    return f"{where}: {type(error).__name__}: {str(error)[:200]}"


def hopeless(metric: Metric, beginning: str, reference: str) -> bool:
    """No end can make the beginning of an answer match. A character of several tokens may be half there, as U+FFFD."""
    return not metric.possible(beginning.rstrip("\ufffd"), reference)


def judged(metric: Metric, answers: Sequence[str], references: Sequence[str], rows: str) -> list[bool]:
    """Whether each answer matches its reference; `rows` names the file of the references.

    Raises:
        ConfigError: a metric of one's own fails, with the row.
    """
    verdicts = []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True), start=1):
        try:
            verdicts.append(metric.match(answer, reference))
        except ConfigError as error:
            raise ConfigError(
                f"task.metric fails on row {row} of {rows} (answer {answer[:80]!r}, reference {reference[:80]!r}): {error}"
            ) from None
    return verdicts


def group(reference: str) -> str:
    """The class a row is counted under: the JSON's first value (its action), else the text itself."""
    try:
        value = json.loads(reference)
    except ValueError:
        return reference.strip()[:40]
    if isinstance(value, dict) and value:
        first = next(iter(value.values()))
        return first if isinstance(first, str) else json.dumps(first)[:40]
    return json.dumps(value)[:40]


def accuracy(correct: Sequence[bool]) -> float:
    """Share of correct answers; NaN for none, so that no gate passes on nothing."""
    return sum(correct) / len(correct) if correct else float("nan")


def per_group(references: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Accuracy of each class, sorted by name."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for reference, ok in zip(references, correct, strict=True):
        groups[group(reference)].append(ok)
    return {name: accuracy(oks) for name, oks in sorted(groups.items())}

"""How an answer is judged. One dict, one function a metric; used while training and on the shipped file."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


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
    """A JSON answer starts as its reference does, white space aside."""
    return beginning.strip()[:1] in ("", reference.strip()[:1])


def text_possible(beginning: str, reference: str) -> bool:
    """A text answer is a beginning of its reference, white space and case aside."""
    return "".join(reference.casefold().split()).startswith("".join(beginning.casefold().split()))


METRICS: Mapping[str, Metric] = {
    "json": Metric(json_match, json_possible),
    "text": Metric(text_match, text_possible),
}


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
    found: dict[str, list[bool]] = defaultdict(list)
    for reference, ok in zip(references, correct, strict=True):
        found[group(reference)].append(ok)
    return {name: accuracy(oks) for name, oks in sorted(found.items())}

"""What is wrong with params.yaml, in words: key, what was given, what is right."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

MOVED = {
    "distill.seed": "select.seeds (a list)",
    "quantize.onnx": "quantize.options.model_builder",
    "validate.repeats": "measure.repeats",
    **{f"distill.{key}": f"teach.{key}" for key in ("unlabelled_rows", "top_k", "temperature")},
    **{
        f"distill.{key}": f"prune.{key}"
        for key in ("max_parameters", "block_share", "candidates", "calibration_rows", "fitted_rows")
    },
}  # keys of earlier versions


def explained(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line a problem of a raw mapping that was held against `model`."""
    known, tags = keys(model), _tags(model)
    errors = error.errors()
    # What is said of a list's length counts the items that are right: it only hides what is said of the others.
    problems = [p for p in errors if p["type"] != "too_short" or not any(_within(each, p) for each in errors)]
    return [_explain(problem, known, tags) for problem in problems]


def _within(problem: Any, outer: Any) -> bool:
    """Whether a problem lies in what another one is about."""
    place, around = problem["loc"], outer["loc"]
    return len(place) > len(around) and place[: len(around)] == around


def _none_of(key: str, given: Any, right: Sequence[str]) -> str:
    """What to say of a value that must be one of a few."""
    near = difflib.get_close_matches(str(given).lower(), right, n=1)
    return f"{key}: {given!r} is none of {', '.join(right)}" + (f": did you mean {near[0]!r}?" if near else "")


def _explain(problem: Any, known: Collection[str], tags: Mapping[str, Sequence[str]]) -> str:
    location = [str(part) for part in problem["loc"]]
    given, message = problem.get("input"), problem["msg"].removeprefix("Value error, ")
    if not location:  # a rule between sections, which names its key itself
        return str(message)
    # Pydantic puts the tag of a union into the location; the person never wrote it.
    written = [part for i, part in enumerate(location) if not (i >= 2 and part in tags.get(location[i - 1], ()))]
    key = ".".join(written)
    if problem["type"] == "extra_forbidden":
        if key in MOVED:
            return f"{key}: unknown key: {MOVED[key]} has taken its place"
        if location[-1] in known:
            return f"{key}: unknown key: it belongs elsewhere (docs/parameters.md), so remove it here"
        near = difflib.get_close_matches(location[-1], sorted(known), n=1)
        return f"{key}: unknown key" + (f": did you mean {near[0]!r}?" if near else ": remove it")
    newest = "`git ls-remote https://huggingface.co/OWNER/NAME HEAD` tells the newest"
    if (location[-1] == "revision" and not given) or problem["type"] == "missing":
        hint = f": the 40-digit hash of a commit, {newest}"
        return f"{key}: missing" + (hint if location[-1] == "revision" else "")
    if isinstance(given, str) and problem["type"].startswith(("float", "int")):
        hint = f": write {float(given):.1e} with a dot" if _is_number(given) and "e" in given.lower() else ""
        return f"{key}: {given!r} is text, not a number{hint} (YAML reads 1e-4 as text, 1.0e-4 as a number)"
    if location[-1] == "revision":
        return f"{key}: {given!r} is not a 40-digit commit hash: a branch or tag can move, so pin the commit it points to now ({newest})"
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        context = problem["ctx"]
        tagged = problem["type"] == "union_tag_invalid"
        key = f"{key}.{context['discriminator'].strip(chr(39))}" if tagged else key
        listed = context["expected_tags"] if tagged else context["expected"].replace(" or ", ", ")
        return _none_of(key, context["tag"] if tagged else given, [each.strip("'") for each in listed.split(", ")])
    if problem["type"] == "union_tag_not_found":
        return f"{key}: missing {problem['ctx']['discriminator']}: one of {', '.join(tags[location[-1]])}"
    if problem["type"] == "tuple_type" and isinstance(given, str | int | float):
        return f"{key}: {given!r} is no list: write [{given}]"
    if problem["type"] == "json_invalid":
        return f"not representable: {message}"
    return f"{key}: {message}" + ("" if isinstance(given, (dict, list)) else f" (given {given!r})")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def keys(model: type[BaseModel]) -> set[str]:
    """Every key that a person may write, of all sections and of what lies in them."""
    return {info.alias or name for name, info in _fields(model)}


def _tags(model: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """By the name of each field that is one of several kinds: what tells them apart, as pydantic puts it into a location."""
    tags = {}
    for name, info in _fields(model):
        kinds = get_args(info.annotation)
        if isinstance(info.discriminator, str):
            annotations = [each.model_fields[info.discriminator].annotation for each in kinds]
            tags[name] = tuple(str(get_args(each)[0]) for each in annotations)
        elif marks := [mark.tag for each in kinds for mark in get_args(each) if isinstance(mark, Tag)]:
            tags[name] = tuple(marks)
    return tags


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a model and of all models in it, by its name."""
    waiting: list[Any] = [model]
    seen: list[Any] = []
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.append(kind)
        waiting += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from kind.model_fields.items()
            waiting += [info.annotation for info in kind.model_fields.values()]

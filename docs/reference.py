"""The pages that are made from the code: parameters, their JSON schemas, and the command line.

    python -m docs.reference

`parameters.md` and the schemas come from the models of `tasks/params.py`, `command-line.md` from the parser of `slmops`.
`tests/test_docs.py` fails where a page is not what this makes.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.cli import _parser
from tasks.params import Params
from tasks.profiles import Profile

FOLDER = Path(__file__).resolve().parent
Schema = dict[str, Any]

BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
NOUNS = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false"}
# Defaults that depend on the machine that makes the page, by the name of the argument.
OF_THE_MACHINE = {"runs": "the number of cores and 2 more"}

PARAMETERS = """# Parameters

Every key of `params.yaml`, by section. This page is made by `python -m docs.reference` from the models in `tasks/params.py`.

Every command takes `--set section.key=value`. What is wrong is told all at once, each problem with its key. A key that is *needed*
has no default, and *none* stands for nothing at all. The defaults are those of the code: what ships in `params.yaml` differs from
some. Sections that `dvc.yaml` names must stand in the file even where they have defaults, and a run tells which are missing. Write
`1.0e-4`: YAML reads `1e-4` as text.

An editor that knows YAML schemas completes and checks `params.yaml` by `docs/params.schema.json`, and the files in `recipes/`,
which name only what differs, by `docs/recipe.schema.json`. The keys of a file in `profiles/` are in [the last section](#device-profiles).
"""

PROFILES = (
    "A file of `profiles/` says what a kind of device has and demands ([devices](devices.md)). Every key must be there."
)

COMMANDS = """# Command line

Every command of `slmops`. This page is made by `python -m docs.reference` from the parser in `flows/cli.py`. What stands in
brackets can be left out.
"""


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def link(text: str, heading: str) -> str:
    """A link to a heading of the same page."""
    return f"[{text}](#{slug(heading)})"


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def one_of(values: Iterable[Any]) -> str:
    """A choice in words."""
    return "one of " + ", ".join(f"`{each}`" for each in values)


# --- the parameters -------------------------------------------------------------------------------


def schema() -> Schema:
    """The JSON schema of params.yaml."""
    made = Params.model_json_schema(by_alias=True)
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:slmops:params"}
    return made | named | {"title": "params.yaml of slmops"}


def recipe_schema() -> Schema:
    """That of a recipe, which names only what differs. A person adds the commit of its model: it may lack a revision."""
    made = copy.deepcopy(schema()) | {"$id": "urn:slmops:recipe", "title": "a recipe of slmops"}
    made["description"] = "What differs from params.yaml, for `--set @FILE`."
    sections = {name_of(node) for node in made["properties"].values()}
    for name, model in [("", made), *made["$defs"].items()]:
        needed = [] if name in {"", *sections} else [key for key in model.get("required", []) if key != "revision"]
        model.pop("required", None)
        if needed:
            model["required"] = needed
    return made


def profile_schema() -> Schema:
    """That of a device profile."""
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:slmops:profile"}
    return Profile.model_json_schema() | named | {"title": "a device profile of slmops"}


def name_of(node: Schema) -> str:
    """The name in `$defs` of the model that a node refers to."""
    return str(node["$ref"]).rpartition("/")[2]


def choices(node: Schema) -> list[Schema]:
    """What a value may be, null aside."""
    return [each for each in node.get("anyOf") or node.get("oneOf") or [node] if each.get("type") != "null"]


def groups(where: str, node: Schema) -> list[tuple[str, str]]:
    """The models that a value of a key may be: the heading of its table, and its name."""
    if "discriminator" in node:
        key = node["discriminator"]["propertyName"]
        values = {ref: value for value, ref in node["discriminator"]["mapping"].items()}
        return [(f"{where} with {key}: {values[each['$ref']]}", name_of(each)) for each in node["oneOf"]]
    inner = [each.get("items", each) for each in choices(node)]
    return [(where, name_of(each)) for each in inner if "$ref" in each]


def kind(where: str, node: Schema) -> str:
    """What a value may be, in plain words."""
    if "discriminator" in node:
        linked = [link(f"`{heading.rpartition(' ')[2]}`", heading) for heading, _ in groups(where, node)]
        return f"keys of its own, by `{node['discriminator']['propertyName']}`: {', '.join(linked)}"
    options = choices(node)
    if len(options) > 1:
        return ", or ".join(kind(where, each) for each in options)
    (node,) = options
    if "$ref" in node:
        return link("keys of its own", where)
    if node.get("type") == "array":
        least = ", not empty" if node.get("minItems") else ""
        return f"a list{least}; each {'has' if '$ref' in node['items'] else 'is'} {kind(where, node['items'])}"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return one_of(node["enum"])
    if node.get("format") == "path":
        return "a path"
    noun = NOUNS[node["type"]] + (f" of the form `{node['pattern']}`" if "pattern" in node else "")
    bounds = ", ".join(f"{word} {node[key]}" for key, word in BOUNDS.items() if key in node)
    return f"{noun} {'of ' if bounds.startswith('at') else ''}{bounds}".strip()


def default(where: str, node: Schema, needed: bool) -> str:
    """What the code takes where a key is not given."""
    if needed:
        return "needed"
    if groups(where, node) and isinstance(node["default"], dict):
        return "those of its keys"
    value = node["default"]
    return "none" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def tables(heading: str, where: str, model: Schema, models: Mapping[str, Schema], level: int = 2) -> Iterator[str]:
    """A section, and after it what its keys hold. Needed keys come first."""
    yield f"{'#' * level} {heading}"
    yield model["description"].replace("\n", " ")
    needed = model.get("required", [])
    keys = sorted(model["properties"].items(), key=lambda each: each[0] not in needed)
    rows, more = [], []
    for key, node in keys:
        path = f"{where}.{key}"
        inner = groups(path, node)
        texts = [node, *(models[name] for _, name in inner)]  # without words of its own, those of what it holds
        text = next((each["description"] for each in texts if "description" in each), "")
        rows.append((f"`{key}`", kind(path, node), default(path, node, key in needed), text))
        more += [(title, path, models[name]) for title, name in inner]
    yield table(("key", "type", "default", "what it is for"), rows)
    for each in more:
        yield from tables(*each, models, level=3)


def parameters() -> str:
    """All sections, each with a table of its keys."""
    made = schema()
    sections = {key: made["$defs"][name_of(node)] for key, node in made["properties"].items()}
    rows = [
        (link(f"`{key}`", key), "needed" if key in made["required"] else "has defaults", model["description"])
        for key, model in sections.items()
    ]
    parts = [PARAMETERS.strip(), table(("section", "", "what it is for"), rows)]
    for key, model in sections.items():
        parts += tables(key, key, model, made["$defs"])
    device = profile_schema()
    parts += tables("Device profiles", "profile", device | {"description": PROFILES}, device["$defs"])
    return "\n\n".join(parts) + "\n"


# --- the command line -----------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command with its parser."""
    (found,) = [each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found.choices)


def placeholder(action: argparse.Action) -> str:
    """What stands for a value: nothing for a flag."""
    if action.nargs == 0:
        return ""
    if action.choices:
        known = [str(each) for each in action.choices]
        return known[0] if len(known) == 1 else f"{{{','.join(known)}}}"
    return str(action.metavar or action.dest.upper())


def written(action: argparse.Action) -> str:
    """An argument as it is typed."""
    return " ".join(filter(None, [*action.option_strings[-1:], placeholder(action)]))


def explained(action: argparse.Action) -> str:
    """What an argument is for, with its default where the text does not tell it."""
    value = OF_THE_MACHINE.get(action.dest, action.default)
    text = (action.help or "") % (vars(action) | {"default": value})  # as argparse fills in what a text names
    text = text or (one_of(action.choices) if action.choices else "a whole number" if action.type is int else "")
    if "(default: " in text or value in (None, False, [], argparse.SUPPRESS):
        return text
    return f"{text} (default: {value})".strip()


def usage(name: str, parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> str:
    """A command with its own arguments: first what it must be given."""
    words = []
    apart = [group._group_actions for group in parser._mutually_exclusive_groups]
    for action in actions:
        told = written(action) + (" ..." if action.nargs == "*" else "")
        among = next((each for each in apart if action in each), [action])
        if action is among[0]:
            told = " | ".join([told, *map(written, among[1:])])
            words.append(told if is_needed(action) else f"[{told}]")
    return " ".join(["slmops", name, *words])


def is_needed(action: argparse.Action) -> bool:
    """Whether a command does not run without it."""
    return action.required if action.option_strings else action.nargs not in ("?", "*")


def command_line() -> str:
    """All commands, each with its usage and a table of its own arguments."""
    found = commands()
    shared = set.intersection(*({each.dest for each in parser._actions} for parser in found.values()))
    first = next(iter(found.values()))
    common = [each for each in first._actions if each.dest in shared]
    parts = [COMMANDS.strip(), table(("command", "what it does"), [
        (link(f"`{name}`", f"slmops {name}"), str(parser.description)) for name, parser in found.items()
    ])]  # fmt: skip
    parts += ["## Options of every command", arguments(common)]
    parts += ["## Options of slmops itself", arguments([each for each in _parser()._actions if each.option_strings])]
    for name, parser in found.items():
        own = [each for each in parser._actions if each.dest not in shared]
        own.sort(key=lambda each: (bool(each.option_strings), not is_needed(each)))
        told = str(parser.description)
        parts += [f"## slmops {name}", f"{told[0].upper()}{told[1:]}."]
        parts += [f"```\n{usage(name, parser, own)}\n```"] + ([arguments(own)] if own else [])
    return "\n\n".join(parts) + "\n"


def arguments(actions: list[argparse.Action]) -> str:
    """The table of some arguments."""
    rows = [(", ".join(f"`{each}`" for each in spellings(action)), explained(action)) for action in actions]
    return table(("argument", "what it is for"), rows)


def spellings(action: argparse.Action) -> list[str]:
    """Every way to type an argument, the last one with its value."""
    return [*action.option_strings[:-1], written(action)]


# --- the files ------------------------------------------------------------------------------------


def as_json(value: Schema) -> str:
    """The text of a schema, equal whatever the order of its keys."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


PAGES: Mapping[str, Callable[[], str]] = {
    "parameters.md": parameters,
    "params.schema.json": lambda: as_json(schema()),
    "recipe.schema.json": lambda: as_json(recipe_schema()),
    "profile.schema.json": lambda: as_json(profile_schema()),
    "command-line.md": command_line,
}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8", newline="\n")
        print(FOLDER / name)


if __name__ == "__main__":
    main()

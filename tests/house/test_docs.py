"""What the documentation says is so: made pages are as the code makes them, links lead somewhere, commands exist."""

import contextlib
import io
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT
from jsonschema import Draft202012Validator

sys.path.insert(0, str(ROOT))

from docs import reference
from flows.cli import _parser

NAMED = ("README.md", "CONTRIBUTING.md", "data/README.md", "benchmarks/README.md")
PAGES = [path for path in (*(ROOT / name for name in NAMED), *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SHELL = {"", "sh", "bash", "console"}
BREAKS = "&|;()<>\n"  # what ends a command


# --- the pages that are made ------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_makes(name: str) -> None:
    on_disk = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert on_disk == reference.PAGES[name](), f"docs/{name} is stale: run `python -m docs.reference`"


def test_every_parameter_says_what_it_is_for() -> None:
    models = reference.schema()["$defs"]
    silent = [
        f"{name}.{key}"
        for name, model in models.items()
        for key, node in model["properties"].items()
        if "description" not in node and "$ref" not in node
    ]
    assert not silent
    assert not [name for name, model in models.items() if "description" not in model]


def refused(schema: dict[str, Any], values: Any) -> list[str]:
    Draft202012Validator.check_schema(schema)
    return [error.json_path for error in Draft202012Validator(schema).iter_errors(values)]


def schema_of(file: Path) -> dict[str, Any]:
    """The schema that a file's first line names to editors."""
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", file.read_text(encoding="utf-8").splitlines()[0])
    assert named, f"the first line of {file} names no schema"
    found: dict[str, Any] = json.loads((file.parent / named[1]).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *RECIPES], ids=lambda file: file.stem)
def test_a_file_of_parameters_is_valid_by_the_schema_that_it_names(file: Path) -> None:
    assert refused(schema_of(file), yaml.safe_load(file.read_text(encoding="utf-8"))) == []


def test_the_schemas_refuse_what_the_code_refuses() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["finetune"]["epochs"] = 0
    values["package"]["choose"] = "best"
    del values["distill"]
    assert sorted(refused(reference.schema(), values)) == ["$", "$.finetune.epochs", "$.package.choose"]
    recipe = {"acquire": {"model": {"source": "hub", "rev": "a"}}, "finetune": {"learning_rte": 0.1}}
    assert sorted(refused(reference.recipe_schema(), recipe)) == ["$.acquire.model", "$.finetune"]


# --- links ------------------------------------------------------------------------------------------


def slugs(text: str) -> set[str]:
    """The anchors of a page, by GitHub's rules: of equal headings the later ones are numbered."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", INLINE.sub("``", FENCE.sub("", page.read_text("utf-8")))):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        there = target.exists() and (not anchor or (target.is_file() and anchor in slugs(target.read_text("utf-8"))))
        found += [] if there else [link]
    return found


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b.c` & [d](x)\n## Twice\n## Twice\n```\n# none\n[no](no)\n```\n`[no](no)` [w](https://example.org/none)\n"
        "[a](#a-bc--d) [b](#twice-1) [c](page.md#twice) [d](#twice-2) [e](#none) ![f](none.png) [g](page.md#no 'title')\n"
    )
    assert broken(page) == ["x", "#twice-2", "#none", "none.png", "page.md#no"]


# --- commands ---------------------------------------------------------------------------------------


def expanded(text: str) -> Iterator[str]:
    """A usage line with what stands in brackets left out, then with each alternative of it: `[--a N | --b]`, `{a,b}`."""
    text = re.sub(r"\{([^{},\s]+)(?:,[^{},\s]+)+\}", r"\1", text)
    option = re.compile(r"(?<=\s)\[([^\[\]\n]*)\]")
    for chosen in (None, 0, 1):
        yield option.sub(
            lambda found, chosen=chosen: "" if chosen is None else (found[1].split("|") * 2)[chosen].strip(), text
        )


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `slmops` and `make` command in a piece of shell."""
    text = re.sub(r"\$\([^()]*\)", "1", text.replace("\\\n", " "))
    lexer = shlex.shlex(
        re.sub(r"(?:^|(?<=\s))#.*$", "", text, flags=re.MULTILINE), posix=True, punctuation_chars=BREAKS
    )
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in [*lexer, "\n"]:
        if token.strip(BREAKS):
            words += [token] if words or not re.match(r"[A-Z_]+=", token) else []
            continue
        if words and words[0] in ("slmops", "make"):
            yield words
        words = []


def of_page(text: str) -> Iterator[tuple[list[str], bool]]:
    """Every command of a page, and whether it stands in prose, where its end may be left out."""
    pieces = [(code, False) for language, code in FENCE.findall(text) if language in SHELL]
    pieces += [(code, True) for code in INLINE.findall(FENCE.sub("", text)) if re.search(r"(^| )(slmops|make) ", code)]
    for code, prose in pieces:
        for form in expanded(code):
            for words in commands(form):
                yield words, prose


def problem(words: list[str], prose: bool) -> str | None:
    """What is wrong with a command."""
    tool, *rest = words
    if tool == "make":
        known = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"the Makefile has no target {word}" for word in rest if word not in known), None)
    if missing := [word for word in rest if re.match(r"@[a-z]", word) and not (ROOT / word[1:]).is_file()]:
        return f"there is no file {missing[0][1:]}"
    given = ["1" if re.fullmatch(r"[A-Z]+|\.\.\.", word) else word for word in rest]  # a placeholder
    told = [parse_error(given + tail) for tail in (endings(given[0]) if prose and given else [[]])]
    return None if None in told else told[0]


def endings(command: str) -> list[list[str]]:
    """What a command may lack in prose: the value of its last option, then some of what it must be given."""
    if command not in reference.commands():
        return [[]]
    actions = [action for action in reference.commands()[command]._actions if reference.is_needed(action)]
    named = [word for each in actions if each.option_strings for word in (each.option_strings[0], "1")]
    values = [next(iter(each.choices or ["1"])) for each in actions if not each.option_strings]
    tails = [[*values[start:], *named] for start in range(len(values) + 1)]
    return [[], *([*value, *tail] for value in ([], ["1"]) for tail in tails)]


def parse_error(words: list[str]) -> str | None:
    """What the parser of `slmops` says of a command line that it does not take; whole names of options only."""
    parser, said = _parser(), io.StringIO()
    for each in (
        parser,
        *next(action.choices.values() for action in parser._actions if isinstance(action.choices, dict)),
    ):
        each.allow_abbrev = False
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser.parse_args(words)
    except SystemExit as end:
        return said.getvalue() if end.code else None
    return None


@each_page
def test_every_command_exists_with_its_options(page: Path) -> None:
    found = [(" ".join(words), problem(words, prose)) for words, prose in of_page(page.read_text(encoding="utf-8"))]
    assert [each for each in found if each[1]] == []


def test_commands_are_looked_at() -> None:
    seen = {words[1] for page in PAGES for words, _ in of_page(page.read_text(encoding="utf-8")) if len(words) > 1}
    assert set(reference.commands()) | {"quick", "run", "test", "docs"} <= seen


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("`slmops approve`", True), ("`slmops up --runs`", True), ("`slmops audit`", True), ("`slmops stage NAME [ITEM]`", True),
        ('`slmops ask "..."`', True), ("`A=... slmops up --database URL`", True), ("```\nslmops plan   # what\nmake up\n```", True),
        ("```\nslmops prune [NAME ...] && slmops completion {bash,zsh}\n```", True), ("`slmops.drift` and `slmops`", True),
        ("```\nslmops run \\\n  --set a=$(git log | cut -f1)\n```", True), ("```json\nslmops nothing\n```", True),
        ("`slmops nothing`", False), ("`slmops up --run`", False), ("`slmops audit check`", False), ("`make nothing`", False),
        ("`slmops ask [--champion | --champ]`", False), ("`slmops run --set @recipes/none.yaml`", False),
        ("```\nslmops approve 1\n```", False), ("```\nslmops compare one\n```", False), ("```\ntrue && make up nothing\n```", False),
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_seen(text: str, right: bool) -> None:
    assert all(problem(*command) is None for command in of_page(text)) == right

"""Read a person's rows: every one checked, split where they are one file, no leak between splits.

`containers` knows the files that hold rows, `forms` what a row may look like. Labelled rows end with the assistant,
unlabelled ones with the user. What is written is canonical: `messages` only, one JSON object a line.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tasks.acquire import containers, forms, near_duplicates
from tasks.errors import ConfigError
from tasks.frame import events, jsonl, manifest
from tasks.models import scoring
from tasks.models.chat import Messages

SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"
SHOWN = 10  # problems in one message
MANY = 1000  # pairs of rows that leak, after which no more are looked for
MAX_MESSAGES = 512  # of a row: training reads what came before each answer again
# Training on a prompt that is also trained on without its answer is no leak; these pairs are.
_DISJOINT = (
    ("test", "train"), ("validation", "train"), ("test", "validation"), (UNLABELLED, "test"), (UNLABELLED, "validation"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One conversation and where it was read: `data/train.jsonl:40`."""

    where: str
    messages: Messages

    @property
    def prompt(self) -> Messages:
        """What comes before the answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def text(self) -> str:
        """What is compared between rows: the turns before the answer, normalised, without the system prompt."""
        return near_duplicates.normalise("\n".join(m["content"] for m in self.prompt if m["role"] != "system"))


def report(problems: Sequence[str], what: str, advice: str) -> None:
    """Raise one ConfigError that lists the first ten problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n  ".join([*problems[:SHOWN], *more])
        raise ConfigError(f"{what} has {count}: {advice}:\n  {listed}")


def load(files: Mapping[str, Path], shown: Mapping[str, str], metric: str) -> dict[str, list[Row]]:
    """Read and check files by role: a split's name, `unlabelled`, or `all` for one file to be split.

    `shown[role]` names the file in messages. With metric `json` every answer must be JSON. Keys that were left out are
    told once, with the number of their values.

    Raises:
        ConfigError: lists the first problems of all files, each with its file and line.
    """
    problems: list[str] = []
    unused: Counter[str] = Counter()
    splits = {}
    for role, path in files.items():
        splits[role] = _read(path, shown[role], role != UNLABELLED, metric, problems, unused)
    report(problems, "the data", "correct these rows")
    if unused:
        listed = ", ".join(f"{key} ({count:,})" for key, count in unused.most_common(SHOWN))
        more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        events.note(f"the data has keys that are not used: {listed}{more}")
    return splits


def _read(
    path: Path, shown: str, labelled: bool, metric: str, problems: list[str], unused: Counter[str]
) -> list[Row]:  # fmt: skip
    rows, before = [], len(problems)
    for where, value in containers.read(path, shown):
        content = value if isinstance(value, str) else forms.messages(value, labelled, unused)
        problem = content if isinstance(content, str) else _problem(content, labelled, metric)
        if problem:
            problems.append(f"{where}: {problem}")
        elif not isinstance(content, str):
            rows.append(Row(where, content))
    if not rows and len(problems) == before:
        problems.append(f"{shown}: the file holds no rows")
    return rows


def _problem(messages: Messages, labelled: bool, metric: str) -> str | None:
    if len(messages) > MAX_MESSAGES:
        return f"{len(messages):,} messages, at most {MAX_MESSAGES} are taken: cut the conversation"
    if (size := sum(len(message["content"]) for message in messages)) > containers.MAX_ROW:
        return f"{size / 1e6:.1f} million characters, at most {containers.MAX_ROW / 1e6:.1f} are taken"
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        return "two system messages, at most one is allowed"
    if "system" in roles[1:]:
        return "the system message does not come first"
    for message in messages:
        if not message["content"].strip():
            return f"a {message['role']} message is blank"
        # JSON can spell half of a surrogate pair; no tokenizer or file can hold it.
        if any("\ud800" <= char <= "\udfff" for char in message["content"]):
            return f"a {message['role']} message holds a lone surrogate"
    turns = roles[1:] if roles[0] == "system" else roles
    end = "assistant" if labelled else "user"
    if labelled and messages[-1].get("weight") == 0:
        return "its last answer has the weight 0, so nothing is to be learned or tested: cut the conversation before it"
    if not turns or turns[-1] != end:
        return f"the conversation does not end with the {end}"
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        return "roles do not alternate user, assistant, user, ..."
    if labelled and metric == "json":
        try:
            json.loads(messages[-1]["content"])
        except (ValueError, RecursionError):
            return "the answer is not JSON, but task.metric is json: correct it, or set task.metric to text"
    return None


def split(
    rows: Sequence[Row], unlabelled: Sequence[Row], *, validation: float, test: float, near: float, seed: int
) -> dict[str, list[Row]]:
    """Divide one file's rows, stratified by the class of the answer, near-duplicate prompts kept together.

    `validation` and `test` are shares of the rows. Prompts that `unlabelled` repeats go to train.

    Raises:
        ConfigError: a split would be empty.
    """
    if validation + test >= 1:
        raise ConfigError(
            f"acquire.data: validation ({validation}) and test ({test}) leave nothing to train on: their sum must be below 1"
        )
    everything = [*rows, *unlabelled]
    groups = _groups([row.text for row in everything], near)
    strata: defaultdict[str, list[list[int]]] = defaultdict(list)
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for group in groups:
        own = [i for i in group if i < len(rows)]
        if own and len(own) < len(group):
            parts["train"] += own
        elif own:
            strata[scoring.group(rows[own[0]].messages[-1]["content"])].append(own)
    order = random.Random(seed)
    names = sorted(strata)
    order.shuffle(names)
    wanted = {"test": 0.0, "validation": 0.0}
    for name in names:
        order.shuffle(strata[name])
        size = sum(map(len, strata[name]))
        # Shares accumulate over the classes, so that many small classes still add up to the share.
        wanted["test"] += test * size
        wanted["validation"] += validation * size
        for group in strata[name]:
            for part, rows_wanted in wanted.items():
                if len(parts[part]) + len(group) <= round(rows_wanted):
                    parts[part] += group
                    break
            else:
                parts["train"] += group
    for part, members in parts.items():
        if not members:
            raise ConfigError(
                f"{rows[0].where.rpartition(':')[0]}: {len(rows)} rows in {len(groups)} groups of unlike prompts leave {part} "
                "empty: add rows, change the shares of acquire.data, give train, validation and test files, or, if prompts that "
                f"differ in little are to be told apart, raise acquire.near_duplicate ({near})"
            )
    return {part: [rows[i] for i in sorted(parts[part])] for part in SPLITS}


def _groups(texts: Sequence[str], near: float) -> list[list[int]]:
    """Positions of equal or near-duplicate texts, linked transitively, in order of first appearance."""
    unique = {text: i for i, text in reversed(list(enumerate(texts)))}
    first = sorted(unique.values())
    leader = {i: i for i in first}

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    compared = near_duplicates.without_template([texts[i] for i in first])
    # Many that are alike would be compared each with each, where one link is enough.
    for a, b, _ in near_duplicates.pairs(compared, near, lambda a, b: find(first[a]) == find(first[b])):
        low, high = sorted((find(first[a]), find(first[b])))
        leader[high] = low
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        members[find(unique[text])].append(i)
    return list(members.values())


def refuse_leaks(splits: Mapping[str, Sequence[Row]], near: float) -> None:
    """Hold the splits against each other.

    Raises:
        ConfigError: a prompt of one split is a repetition or near-duplicate of one in another; names both.
    """
    places: defaultdict[str, dict[str, str]] = defaultdict(dict)  # text -> split -> where it comes first
    for name, rows in splits.items():
        for row in rows:
            places[row.text].setdefault(name, row.where)
    texts = list(places)
    leaks = [leak for text in texts for leak in _leaks(places[text], places[text], "repeats")]
    apart = [frozenset(places[text]) for text in texts]
    compared = near_duplicates.without_template(texts)
    for a, b, similarity in near_duplicates.pairs(compared, near, lambda a, b: _harmless(apart[a], apart[b])):
        if len(leaks) > MANY:
            break
        wording = f"nearly repeats (5-gram similarity {similarity:.2f})"
        leaks += _leaks(places[texts[a]], places[texts[b]], wording)
        leaks += _leaks(places[texts[b]], places[texts[a]], wording)
    advice = (
        f"the splits must share no prompt (acquire.near_duplicate is {near}), so remove one of each pair, or, if such "
        "prompts are to be told apart, set acquire.near_duplicate to 1.0"
    )
    report(leaks, "the data", advice)


def _leaks(one: Mapping[str, str], other: Mapping[str, str], wording: str) -> Iterable[str]:
    return [f"{one[a]} {wording} {other[b]}" for a, b in _DISJOINT if a in one and b in other]


@cache
def _harmless(one: frozenset[str], other: frozenset[str]) -> bool:
    """May texts of these splits be alike?"""
    return not any((a in one and b in other) or (a in other and b in one) for a, b in _DISJOINT)


def write(splits: Mapping[str, Sequence[Row]], out: Path) -> dict[str, str]:
    """Write `NAME.jsonl` for each split that has rows; returns the sha256 of each file."""
    out.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, rows in splits.items():
        if rows:
            path = out / f"{name}.jsonl"
            jsonl.write(path, ({"messages": row.messages} for row in rows))
            digests[path.name] = manifest.sha256(path)
    return digests

"""Read chat JSONL from a person's files: every row checked, split where it is one file, no leak between splits.

Two forms of a row are taken: `{"messages": [{"role", "content"}, ...]}` (OpenAI and TRL) and TRL's
`{"prompt": text, "completion": text}`. Labelled rows end with the assistant, unlabelled ones with the user.
What is written is canonical: `messages` only, one JSON object a line.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks import manifest, scoring
from tasks.acquire import near_duplicates
from tasks.chat import Messages
from tasks.errors import ConfigError

SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"
SHOWN = 10  # problems in one message
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

    `shown[role]` names the file in messages. With metric `json` every answer must be JSON.

    Raises:
        ConfigError: lists the first problems of all files, each with its file and line.
    """
    problems: list[str] = []
    found = {}
    for role, path in files.items():
        found[role] = _read(path, shown[role], role != UNLABELLED, metric, problems)
    report(problems, "the data", "correct these rows")
    return found


def _read(path: Path, shown: str, labelled: bool, metric: str, problems: list[str]) -> list[Row]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        problems.append(f"{shown}: {error.strerror}: name a readable JSONL file")
        return []
    rows, before = [], len(problems)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{shown}:{number}"
        found = _messages(line, labelled)
        problem = found if isinstance(found, str) else _problem(found, labelled, metric)
        if problem:
            problems.append(f"{where}: {problem}")
        elif not isinstance(found, str):
            rows.append(Row(where, found))
    if not rows and len(problems) == before:
        problems.append(f"{shown}: the file holds no rows")
    return rows


def _messages(line: bytes, labelled: bool) -> Messages | str:
    """The messages of a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError):
        return "not JSON that can be read: a number too long or brackets too deep"
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object with messages"
    if "messages" not in row:
        pair = (row.get("prompt"), row.get("completion"))
        if labelled and isinstance(pair[0], str) and isinstance(pair[1], str):
            return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        if not labelled and isinstance(pair[0], str):
            return [{"role": "user", "content": pair[0]}]
        return 'no messages: write {"messages": [...]} or {"prompt": "...", "completion": "..."}'
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "messages is not a list with entries"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return f"message {i + 1} is not an object of exactly role and content"
        if message["role"] not in ("system", "user", "assistant"):
            return f"message {i + 1} has the role {message['role']!r}, not system, user or assistant"
        if not isinstance(message["content"], str):
            return f"message {i + 1} has content that is not text"
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _problem(messages: Messages, labelled: bool, metric: str) -> str | None:
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
    found: dict[str, list[int]] = {name: [] for name in SPLITS}
    for group in groups:
        own = [i for i in group if i < len(rows)]
        if own and len(own) < len(group):
            found["train"] += own
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
                if len(found[part]) + len(group) <= round(rows_wanted):
                    found[part] += group
                    break
            else:
                found["train"] += group
    for part, members in found.items():
        if not members:
            raise ConfigError(
                f"{rows[0].where.rpartition(':')[0]}: {len(rows)} rows in {len(groups)} groups of unlike prompts leave {part} "
                "empty: add rows, change the shares of acquire.data, or give train, validation and test files"
            )
    return {part: [rows[i] for i in sorted(found[part])] for part in SPLITS}


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

    for a, b, _ in near_duplicates.pairs([texts[i] for i in first], near):
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
    for a, b, similarity in near_duplicates.pairs(texts, near):
        wording = f"nearly repeats (5-gram similarity {similarity:.2f})"
        leaks += _leaks(places[texts[a]], places[texts[b]], wording)
        leaks += _leaks(places[texts[b]], places[texts[a]], wording)
    advice = f"the splits must share no prompt (acquire.near_duplicate is {near}), so remove one of each pair"
    report(leaks, "the data", advice)


def _leaks(one: Mapping[str, str], other: Mapping[str, str], wording: str) -> Iterable[str]:
    return [f"{one[a]} {wording} {other[b]}" for a, b in _DISJOINT if a in one and b in other]


def write(splits: Mapping[str, Sequence[Row]], out: Path) -> dict[str, str]:
    """Write `NAME.jsonl` for each split that has rows; returns the sha256 of each file."""
    out.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, rows in splits.items():
        if rows:
            path = out / f"{name}.jsonl"
            lines = (json.dumps({"messages": row.messages}, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8", newline="\n")
            digests[path.name] = manifest.sha256(path)
    return digests

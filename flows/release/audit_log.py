"""The record of who decided what: `registry/history.jsonl`, append-only, every line chained to the one before it.

A line is JSON with its number (`seq`), the sha256 of the line before it (`previous`) and the sha256 of its own
other fields (`hash`). A chain alone does not show that its end was cut off or that all of it was written anew,
so number and hash of the last line (`Head`) are kept in MLflow too, as a tag of the registered model, and
`problems` holds the two together. The tags of a version mirror the lines about it.

A decision is written here before it takes effect: killed in between, it can be made again, and nothing was ever
released without a line. So a torn last line, from a write that was killed, tells of nothing that happened. Where
MLflow refuses what was decided, a line `void` says so: the line that it names counts for nothing.

The record is the truth, and the aliases in MLflow follow it: `standing` is what they must say.

Lines from before there was a chain may stand at the beginning. Nobody can say whether they were changed before
the first chained line was written; its `previous` is the sha256 of them all, so later changes are found.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.workspace import paths
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError, StageError

HEAD_TAG = "slmops.audit_head"  # of the registered model
FIRST = "0" * 64
FIELDS = {"at", "action", "model", "version", "bundle_digest", "by", "reason"}
CHAIN: Mapping[str, type] = {"seq": int, "previous": str, "hash": str}
VOID = "void"  # the action of a line that takes back another one, by its number (`voids`)
LONGEST = 2000  # characters of a reason; MLflow takes a line of 100,000 bytes as a tag

Entry = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """How far the record went: the number and the hash of a line."""

    count: int
    hash: str

    def text(self) -> str:
        """The value of the tag."""
        return f"{self.count} {self.hash}"


def parse_head(text: str) -> Head:
    """The head that a tag holds.

    Raises:
        ArtifactError: it is none.
    """
    match = re.fullmatch(r"(\d+) ([0-9a-f]{64})", text)
    if not match:
        raise ArtifactError(
            f"MLflow's tag {HEAD_TAG} is {text!r}, not a number and a sha256: someone changed it; find out who, and "
            f"take its value from the newest tag slmops.audit.NUMBER of the model's versions (its `seq` and `hash`)"
        )
    return Head(int(match[1]), match[2])


def place(main: MainCheckout) -> Path:
    """Where the record of a checkout lies."""
    return paths.history(main)


@contextmanager
def decision(
    client: Any,
    main: MainCheckout,
    action: str,
    name: str,
    version: str,
    *,
    digest: str,
    by: str,
    reason: str,
    **more: str,
) -> Iterator[None]:
    """Write a decision on a version down and mirror it in MLflow; then the body lets it take effect. Should that fail, a
    line `void` takes it back. `more`: other fields of the line.

    Raises:
        ArtifactError: the record was changed, cut off or torn.
        StageError: it cannot be written; it is as it was.
    """
    entry = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "model": name,
        "version": version,
        "bundle_digest": digest,
        "by": by,
        "reason": reason if len(reason) <= LONGEST else f"{reason[: LONGEST - 4]} ...",
        "facts": "",
        **more,
    }
    known = heads(client, main, name)
    line = append(place(main), entry, known)
    try:
        _mirror(client, line)
        yield
    except BaseException as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        with suppress(StageError):  # then the aliases tell, which are not what the line says
            append(
                place(main),
                {**entry, "action": VOID, "voids": line["seq"], "by": "slmops", "reason": f"it failed: {said}"},
                known,
            )
        raise


def record(client: Any, main: MainCheckout, action: str, name: str, version: str, **fields: str) -> None:
    """A `decision` that has no effect besides."""
    with decision(client, main, action, name, version, **fields):
        pass


def _mirror(client: Any, line: Entry) -> None:
    head, name, version = Head(line["seq"], line["hash"]), line["model"], line["version"]
    tags = {"decision": line["action"], "decided_by": line["by"], "decided_at": line["at"]}
    tags |= {"decision_reason": line["reason"], f"slmops.audit.{head.count:06}": _canonical(line).decode()}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_tag(name, HEAD_TAG, head.text())  # last: then all of it is known there


@dataclass(frozen=True)
class Standing:
    """What the record says of one model: versions, "" for none."""

    champion: str = ""
    previous: str = ""
    decided: Entry | None = None  # the line that made the champion, or withdrew it
    digests: Mapping[str, str] = field(default_factory=dict)  # version -> digest of its bundle


def standing(lines: Iterable[Entry | None], name: str) -> Standing:
    """Where a model stands after the lines of the record, oldest first."""
    now = Standing()
    for line in effective(lines):
        if line["model"] != name:
            continue
        version, digest = line["version"], line["bundle_digest"]
        if line["action"] == "register" and now.digests.get(version, digest) != digest:
            now = Standing()  # the model was made anew in MLflow, where versions count anew
        digests = {**now.digests, version: digest}
        if line["action"] in ("approve", "rollback"):
            before = now.champion if now.champion not in ("", version) else now.previous
            now = Standing(version, before, line, digests)
        elif line["action"] == "withdraw":
            now = Standing(decided=line, digests=digests)
        elif line["action"] == "reject" and version == now.previous:
            now = Standing(now.champion, "", now.decided, digests)
        else:
            now = Standing(now.champion, now.previous, now.decided, digests)
    return now


def effective(lines: Iterable[Entry | None]) -> list[Entry]:
    """The lines that can be read and were not taken back."""
    read = [line for line in lines if line]
    gone = {line.get("voids") for line in read if line["action"] == VOID}
    return [line for line in read if line["action"] != VOID and ("seq" not in line or line["seq"] not in gone)]


def heads(client: Any, main: MainCheckout, name: str) -> list[Head]:
    """How far the record went, as MLflow was told at this model, at each that the record names, and at each whose bundles
    lie beside it: where all lines about a model were cut off, the record does not name it.

    Raises:
        ArtifactError: a tag was changed by hand.
    """
    named = {name, *models(main)}
    marked = client.search_registered_models(f"tags.`{HEAD_TAG}` LIKE '%'", max_results=1000)  # MLflow's most
    return [
        parse_head(each.tags[HEAD_TAG]) for each in marked if each.name in named or _beside(client, main, each.name)
    ]


def models(main: MainCheckout) -> list[str]:
    """The models that the record names."""
    return sorted({str(entry["model"]) for entry in entries(read(place(main))) if entry})


def _beside(client: Any, main: MainCheckout, name: str) -> bool:
    folder = str(paths.registry(main)) + os.sep
    versions = client.search_model_versions(f"name = '{name}'")
    return any(str(version.tags.get("bundle", "")).startswith(folder) for version in versions)


def decisions(main: MainCheckout, name: str, version: str, digest: str) -> list[Entry]:
    """The lines about one version that count, oldest first. A model made anew in MLflow counts its versions anew: hence
    `digest`.
    """
    lines = effective(entries(read(place(main))))
    wanted = (name, version, digest)
    return [entry for entry in lines if (entry["model"], entry["version"], entry["bundle_digest"]) == wanted]


def read(path: Path) -> bytes:
    """The record as it is; none yet is an empty one."""
    return path.read_bytes() if path.exists() else b""


def append(path: Path, entry: Mapping[str, Any], heads: Collection[Head] = ()) -> Entry:
    """Add a line, on the disk when this returns; nothing is added to a record that `problems` finds fault with.

    Raises:
        ArtifactError: the record was changed, cut off or torn.
        StageError: it cannot be written; it is as it was.
    """
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise _unwritten(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.readall()
        check(path, problems(content, heads))
        lines = _lines(content)
        chained: Entry = {**entry, "seq": len(lines) + 1, "previous": _link(lines)}
        chained["hash"] = _hash(chained)
        # Someone's editor may have left off the last line break.
        rest = (b"" if content.endswith(b"\n") or not content else b"\n") + _canonical(chained) + b"\n"
        try:
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), len(content))
            raise _unwritten(path, error) from error
    return chained


def _unwritten(path: Path, error: OSError) -> StageError:
    return StageError(f"{path} cannot be written ({error.strerror}): nothing was decided: set that right, decide again")


def check(path: Path, problems: list[str]) -> None:
    """Refuse a record with problems.

    Raises:
        ArtifactError: lists them all.
    """
    if problems:
        problem = "\n  ".join(problems)
        raise ArtifactError(
            f"{path} is not the record that was written:\n  {problem}\n"
            "no decision is added to it: bring it back from a backup (the tags slmops.audit.NUMBER of the model's "
            "versions in MLflow hold every line), or do what the line above says"
        )


def entries(content: bytes) -> list[Entry | None]:
    """Every line, oldest first; None for one that cannot be read."""
    parsed = map(_parse, _lines(content))
    return [entry if entry is not None and entry.keys() >= FIELDS else None for entry in parsed]


def unchained(content: bytes) -> int:
    """How many lines at the beginning are from before there was a chain."""
    count = 0
    for entry in map(_parse, _lines(content)):
        if entry is None or CHAIN.keys() & entry.keys():
            break
        count += 1
    return count


def problems(content: bytes, heads: Collection[Head] = ()) -> list[str]:
    """What is wrong with a record, line by line; empty for a sound one."""
    lines_of_problem: list[str] = []
    hashes: dict[int, str] = {}
    lines, old = _lines(content), unchained(content)
    expected = old + 1
    previous: str | None = _link(lines[:old])  # None: the line before was reported, and its bytes tell nothing
    for number, line in enumerate(lines[old:], old + 1):
        entry = _parse(line)
        if entry is None or not _sound(entry, line):
            cut = number == len(lines) and not content.endswith(b"\n")
            torn = cut and all(head.count < expected for head in heads)  # else it was whole once, and took effect
            lines_of_problem.append(
                f"line {number} {_torn() if torn else 'was edited: its hash is not that of its content'}"
            )
            expected, previous = expected + (not torn), None
            continue
        if entry["seq"] != expected:
            lines_of_problem.append(
                f"line {number} is entry {entry['seq']} where entry {expected} belongs: lines before it were removed, "
                "added or put in another order"
            )
        elif previous is not None and entry["previous"] != previous:
            lines_of_problem.append(
                f"line {number} does not follow what stands before it: that was edited after line {number} was written"
            )
        expected, previous = entry["seq"] + 1, _sha256(line)
        hashes[entry["seq"]] = entry["hash"]
    return lines_of_problem + _against(heads, hashes, expected - 1, sound=not lines_of_problem)


def unconfirmed(content: bytes, heads: Collection[Head]) -> list[str]:
    """Lines of a sound record that MLflow does not know of."""
    last, known = len(_lines(content)), max((head.count for head in heads), default=0)
    first = max(known, unchained(content)) + 1
    if last < first:
        return []
    which = f"line {last} is" if first == last else f"lines {first} to {last} are"
    return [
        f"{which} not known to MLflow: the decision was stopped in the middle, or someone wrote there: look at it; "
        "if it is right, decide again"
    ]


def _against(heads: Collection[Head], hashes: Mapping[int, str], last: int, *, sound: bool) -> list[str]:
    known = max(heads, key=lambda head: head.count, default=Head(0, FIRST))
    if known.count > last:
        which = f"line {known.count}" if known.count == last + 1 else f"lines {last + 1} to {known.count}"
        return [f"{which} of {known.count} that MLflow knows of cannot be found: the end was cut off"]
    if not sound:
        return []  # told already, and by its line
    return [
        f"line {head.count} is not the one that MLflow knows: it, or all up to it, was written anew"
        for head in sorted(heads, key=lambda head: head.count)
        if hashes.get(head.count) != head.hash
    ][:1]


def _torn() -> str:
    return (
        "is torn: its write was killed in the middle, and what it began to tell did not happen: "
        "remove that line (sed -i '$d' FILE) and decide again"
    )


def _lines(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _link(before: list[bytes]) -> str:
    """What a line's `previous` must be: the line before it, or all the lines from before there was a chain."""
    content = b"".join(line + b"\n" for line in before)
    if not before:
        return FIRST
    return _sha256(content if unchained(content) == len(before) else before[-1])


def _parse(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _sound(entry: Entry, line: bytes) -> bool:
    typed = all(type(entry.get(name)) is kind for name, kind in CHAIN.items())
    return typed and _canonical(entry) == line and entry["hash"] == _hash(entry)


def _hash(entry: Entry) -> str:
    return _sha256(_canonical({name: value for name, value in entry.items() if name != "hash"}))


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

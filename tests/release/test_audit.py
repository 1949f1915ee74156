"""The chained record on real files, with real faults: edits, cuts, kills in the middle of a write, writers at once."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.release import audit_log
from tasks.errors import ArtifactError, StageError


def entry(reason: str = "good", **other: str) -> dict[str, str]:
    return {
        "at": "2026-01-02T03:04:05+00:00", "action": "approve", "model": "m", "version": "1", "bundle_digest": "d",
        "by": "Ada", "reason": reason, **other,
    }  # fmt: skip


def write(path: Path, count: int = 4) -> audit_log.Head:
    """A record of so many lines; where it ends."""
    lines = [audit_log.append(path, entry(f"reason {number}: größer")) for number in range(1, count + 1)]
    return audit_log.Head(lines[-1]["seq"], lines[-1]["hash"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def test_a_line_names_the_one_before(path: Path) -> None:
    head = write(path)
    lines = path.read_bytes().splitlines()
    read = [json.loads(line) for line in lines]
    assert [each["seq"] for each in read] == [1, 2, 3, 4]
    assert read[0]["previous"] == "0" * 64
    assert read[1]["previous"] == audit_log._sha256(lines[0])
    assert audit_log.problems(path.read_bytes(), [head]) == audit_log.unconfirmed(path.read_bytes(), [head]) == []
    assert audit_log.parse_head(head.text()) == head


def rehashed(line: bytes, **changes: object) -> bytes:
    """A line that was changed by someone who knows how its hash is made."""
    changed = {**json.loads(line), **changes}
    return audit_log._canonical({**changed, "hash": audit_log._hash(changed)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, b, c, d: [a, b.replace(b"Ada", b"Eve"), c, d], ["line 2 was edited"]),
        (lambda a, b, c, d: [a, rehashed(b, by="Eve"), c, d], ["line 3 does not follow what stands before it"]),
        (lambda a, b, c, d: [a, b, c, rehashed(d, by="Eve")], ["line 4 is not the one that MLflow knows"]),
        (lambda a, b, c, d: [a, b, c, d + b" "], ["line 4 was edited"]),
        (lambda a, b, c, d: [a, b"nothing", c, d], ["line 2 was edited"]),
        (lambda a, b, c, d: [a, b"{}", c, d], ["line 2 was edited"]),
        (lambda a, b, c, d: [a, c, d], ["line 2 is entry 3 where entry 2 belongs"]),
        (lambda a, b, c, d: [b, c, d], ["line 1 is entry 2 where entry 1 belongs"]),
        (lambda a, b, c, d: [a, c, b, d], ["line 2 is entry 3", "line 3 is entry 2", "line 4 is entry 4"]),
        (lambda a, b, c, d: [a, b, b, c, d], ["line 3 is entry 2 where entry 3 belongs"]),
        (lambda a, b, c, d: [a, b, c], ["line 4 of 4 that MLflow knows of cannot be found: the end was cut off"]),
        (lambda a, b, c, d: [a], ["lines 2 to 4 of 4 that MLflow knows of cannot be found: the end was cut off"]),
        (lambda a, b, c, d: [], ["lines 1 to 4 of 4 that MLflow knows of cannot be found: the end was cut off"]),
        (lambda a, b, c, d: [a.replace(b"Ada", b"Eve"), b, d], ["line 1 was edited", "line 3 is entry 4"]),
    ],
    ids=range(14),
)  # fmt: skip
def test_what_was_changed_is_found_by_its_line(path: Path, change: Callable[..., list[bytes]], said: list[str]) -> None:
    head = write(path)
    changed = b"".join(line + b"\n" for line in change(*path.read_bytes().splitlines()))
    found = audit_log.problems(changed, [head])
    assert len(found) == len(said), found
    assert all(each.startswith(start) for each, start in zip(found, said, strict=True)), found

    path.write_bytes(changed)
    with pytest.raises(ArtifactError, match=said[0]):
        audit_log.append(path, entry(), [head])
    assert path.read_bytes() == changed


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, audit_log.Head]:
    path = tmp_path_factory.mktemp("three") / "history.jsonl"
    head = write(path, 3)
    return path.read_bytes(), head


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(data=st.data())
def test_no_byte_can_change_unseen(data: st.DataObject, three: tuple[bytes, audit_log.Head]) -> None:
    content, head = three
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, len(content)))
    changed = content[:start] + data.draw(st.binary(max_size=20)) + content[end:]
    same = changed in (content, content[:-1])  # the last line break says nothing
    assert (audit_log.problems(changed, [head]) == []) == same


def test_all_written_anew_is_found_by_what_mlflow_knows(path: Path, tmp_path: Path) -> None:
    head = write(path)
    forged = tmp_path / "forged.jsonl"
    for number in range(5):
        audit_log.append(forged, entry(f"forged {number}"))
    assert audit_log.problems(forged.read_bytes()) == []
    assert audit_log.problems(forged.read_bytes(), [head])[0].startswith("line 4 is not the one that MLflow knows")


def test_a_line_that_mlflow_never_heard_of_is_told(path: Path) -> None:
    head = write(path, 2)
    audit_log.append(path, entry("not mirrored"), [head])
    assert audit_log.unconfirmed(path.read_bytes(), [head])[0].startswith("line 3 is not known to MLflow")
    assert audit_log.unconfirmed(path.read_bytes(), [])[0].startswith("lines 1 to 3 are not known to MLflow")
    audit_log.append(path, entry("it goes on"), [head])


def test_a_lost_last_line_break_is_no_damage(path: Path) -> None:
    head = write(path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    audit_log.append(path, entry(), [head])
    assert audit_log.problems(path.read_bytes(), [head]) == []
    assert len(path.read_bytes().splitlines()) == 3


def test_a_tag_that_is_no_head_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"slmops\.audit_head .*'nothing'"):
        audit_log.parse_head("nothing")


# --- what the record says is released ------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["approve", "reject", "rollback", "withdraw"]), st.sampled_from("123")), max_size=12
    )
)
def test_where_a_model_stands_is_what_its_decisions_did(wanted: list[tuple[str, str]]) -> None:
    champion = previous = ""
    lines: list[audit_log.Entry | None] = [
        entry(action="register", version=version, bundle_digest=version) for version in "123"
    ]
    for action, version in wanted:
        if action == "approve" and version != champion:
            champion, previous = version, champion or previous
        elif action == "reject" and version != champion:
            previous = "" if version == previous else previous
        elif action == "rollback" and previous:
            champion, previous = previous, champion
            version = champion
        elif action == "withdraw" and champion:
            champion, previous, version = "", "", champion
        else:
            continue  # refused, so not on record
        lines += [None, entry(action=action, version=version, bundle_digest=version), entry(model="other", version="9")]
    found = audit_log.standing(lines, "m")
    assert (found.champion, found.previous) == (champion, previous)
    assert found.digests == {version: version for version in "123"}


def test_a_line_that_was_taken_back_counts_for_nothing() -> None:
    made = {**entry(action="approve"), "seq": 2}
    lines: list[audit_log.Entry | None] = [{**entry(action="register"), "seq": 1}, made]
    assert audit_log.standing(lines, "m").champion == "1"
    lines.append({**entry(action="void"), "seq": 3, "voids": 2})
    assert audit_log.standing(lines, "m").champion == ""
    assert [line["seq"] for line in audit_log.effective(lines)] == [1]


def test_a_model_made_anew_stands_nowhere() -> None:
    lines: list[audit_log.Entry | None] = [entry(action="register"), entry(action="approve")]
    lines.append(entry(action="register", bundle_digest="another"))
    assert audit_log.standing(lines, "m") == audit_log.Standing(digests={"1": "another"})


# --- lines from before there was a chain ---------------------------------------------------------------


def old_record(path: Path) -> bytes:
    content = "".join(json.dumps(entry(f"old {number}")) + "\n" for number in range(2)).encode()
    path.write_bytes(content)
    return content


def test_old_lines_are_counted_and_sealed(path: Path) -> None:
    old = old_record(path)
    assert (audit_log.problems(old), audit_log.unchained(old)) == ([], 2)
    head = write(path, 2)
    content = path.read_bytes()
    assert (audit_log.problems(content, [head]), audit_log.unchained(content)) == ([], 2)
    assert audit_log.unconfirmed(content, [head]) == []
    assert json.loads(content.splitlines()[2])["seq"] == 3

    for changed in (
        content.replace(b"old 0", b"OLD 0"),
        b"\n".join([*old.splitlines()[::-1], *content.splitlines()[2:]]),
    ):
        assert audit_log.problems(changed, [head])[0].startswith("line 3 does not follow what stands before it")
    assert audit_log.problems(content[content.index(b"\n") + 1 :], [head])[0].startswith("line 2 is entry 3")
    assert audit_log.problems(content + old, [head])[0].startswith("line 5 was edited")


def test_a_chain_cannot_be_taken_off(path: Path) -> None:
    head = write(path, 2)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    bare = "".join(json.dumps({k: v for k, v in line.items() if k not in audit_log.CHAIN}) + "\n" for line in lines)
    assert audit_log.unchained(bare.encode()) == 2
    assert audit_log.problems(bare.encode(), [head])[0].startswith("line 2 is not the one that MLflow knows")


# --- faults of the writing process ---------------------------------------------------------------------

LIMITED = """
import resource, signal, sys
from pathlib import Path
from flows.release import audit_log
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, -1))
if sys.argv[2] == "kill":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
audit_log.append(path, {"at": "", "action": "approve", "model": "m", "version": "1", "bundle_digest": "d", "by": "A", "reason": "R"})
"""


def limited(path: Path, how: str) -> subprocess.CompletedProcess[str]:
    """Append from a process whose file may grow by 100 bytes more."""
    return subprocess.run([sys.executable, "-c", LIMITED, path, how], cwd=ROOT, capture_output=True, text=True)


def test_a_kill_in_the_middle_of_a_write_is_told_with_what_to_do(path: Path) -> None:
    head = write(path, 2)
    before = path.read_bytes()
    assert limited(path, "kill").returncode == -signal.SIGXFSZ
    assert len(path.read_bytes()) == len(before) + 100

    with pytest.raises(ArtifactError, match=r"line 3 .*sed -i '\$d'"):
        audit_log.append(path, entry(), [head])
    subprocess.run(["sed", "-i", "$d", path], check=True)  # as the message says
    assert path.read_bytes() == before
    audit_log.append(path, entry(), [head])


def test_a_line_that_was_whole_once_is_not_called_torn(path: Path) -> None:
    head = write(path, 2)
    (found,) = audit_log.problems(path.read_bytes()[:-30], [head])
    assert found.startswith("line 2 was edited")


def test_a_full_disk_leaves_the_record_as_it_was(path: Path) -> None:
    write(path, 2)
    before = path.read_bytes()
    done = limited(path, "refuse")
    assert "StageError" in done.stderr
    assert "(File too large)" in done.stderr
    assert path.read_bytes() == before


def test_a_record_that_cannot_be_opened_is_a_stage_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"history\.jsonl .*\(No such file"):
        audit_log.append(tmp_path / "missing" / "history.jsonl", entry())


WRITER = """
import sys
from pathlib import Path
from flows.release import audit_log
for number in range(40):
    audit_log.append(Path(sys.argv[1]), {"at": "", "action": "approve", "model": "m", "version": str(number),
                                     "bundle_digest": "d", "by": sys.argv[2], "reason": "R"})
"""


def test_two_processes_append_at_once(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("Ada", "Bob")]
    assert [writer.wait() for writer in writers] == [0, 0]
    read = audit_log.entries(path.read_bytes())
    assert audit_log.problems(path.read_bytes()) == []
    assert [sum(each is not None and each["by"] == name for each in read) for name in ("Ada", "Bob")] == [40, 40]

"""Who decided what on which version, when and why; and whether that record is as it was written."""

from typing import Any

from flows.release import audit_log, released, versions
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError, StageError


def decided(main: MainCheckout, name: str) -> list[dict[str, Any]]:
    """Who decided what on which version, when and why, oldest first; of a line of the record that cannot be read only
    `unreadable`, its number.
    """
    lines = enumerate(audit_log.entries(audit_log.read(audit_log.place(main))), 1)
    return [
        dict(entry) if entry else {"unreadable": number}
        for number, entry in lines
        if not entry or entry["model"] == name
    ]


def listed(decisions: list[dict[str, Any]], name: str) -> str:
    """What `decided` found, a line each for a person."""
    lines = []
    for entry in decisions:
        if "unreadable" in entry:
            lines.append(f"line {entry['unreadable']} cannot be read: `slmops audit verify`")
            continue
        facts = f" ({entry['facts']})" if entry.get("facts") else ""
        lines.append(
            f"{entry['at']}  {entry['action']:<9} version {entry['version']:<4} by {entry['by']}: {entry['reason']}{facts}"
        )
    return "\n".join(lines) or f"nothing was registered under {name} yet"


def history(main: MainCheckout, name: str) -> str:
    """Both."""
    return listed(decided(main, name), name)


def started_by(main: MainCheckout, name: str, version: str) -> str | None:
    """Who registered a version, as the record tells it."""
    wanted = ("register", name, version)
    newest_first = reversed(_decisions(main))
    return next((str(e["by"]) for e in newest_first if (e["action"], e["model"], e["version"]) == wanted), None)


def _decisions(main: MainCheckout) -> list[audit_log.Entry]:
    """All lines of the record that can be read and count, oldest first."""
    return audit_log.effective(audit_log.entries(audit_log.read(audit_log.place(main))))


def verify_audit(main: MainCheckout, name: str) -> str:
    """Hold the record against its own chain and against what MLflow knows of it; one line for a person.

    Raises:
        ArtifactError: a line was edited, removed, added, cut off or torn (names each by its number), or what MLflow says is
            released, or the code that it would run, is not what the record says.
    """
    path, content = audit_log.place(main), audit_log.read(audit_log.place(main))
    try:
        with versions.opened(main) as client:
            content = audit_log.read(path)
            heads = audit_log.heads(client, main, name)
            audit_log.check(path, audit_log.problems(content, heads) or audit_log.unconfirmed(content, heads))
            for each in {name, *audit_log.models(main)}:
                _verify_released(client, main, each)
    except StageError as error:
        if problems := audit_log.problems(content):
            audit_log.check(
                path, [*problems, f"besides, MLflow could not be asked ({error}): remove nothing before it was"]
            )
        beside = f"; MLflow could not be asked, so a cut-off end would not be seen ({error})"
    else:
        beside = ", as MLflow knows it"
    if not content:
        return f"{path}: nothing was decided yet{beside}"
    old = audit_log.unchained(content)
    before = f"; lines 1 to {old} are from before there was a chain and could have been changed then" if old else ""
    return f"{path}: {len(audit_log.entries(content))} lines, nothing changed{beside}{before}"


def _verify_released(client: Any, main: MainCheckout, name: str) -> None:
    if wrong := released.differences(client, main, name):
        raise ArtifactError(f"{'; '.join(wrong)}: {released.way_out(main, name)}")
    now = released.expected(client, main, name)
    for version in filter(None, (now.champion, now.previous)):
        model_version = versions.find_version(client, name, version)
        for line in audit_log.decisions(main, name, version, now.digests[version]):
            if "code_digest" in line:
                versions.check_code(main, model_version, line["code_digest"])

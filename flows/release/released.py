"""What is released: the champion and the one before it, as the record tells them, MLflow's aliases beside it, and their bundles.

What is champion the record (`audit_log`) says. Where MLflow's aliases say otherwise, someone moved one by hand or a
decision was stopped in the middle: `differences` tells, `way_out` what to do, `settle` puts the aliases right.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.release import audit_log, versions
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError, ConfigError
from tasks.package.bundle import Bundle

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"  # aliases


def champion(main: MainCheckout, name: str) -> tuple[str, Path]:
    """The version that is released, and its bundle, all of it held against the record.

    Raises:
        ConfigError: nothing was released yet.
        ArtifactError: its bundle or code moved or changed, the record is damaged, or MLflow's aliases are not what it says.
        StageError: the MLflow server does not answer.
    """
    with versions.opened(main) as client:
        path = audit_log.place(main)
        audit_log.check(path, audit_log.problems(audit_log.read(path), audit_log.heads(client, main, name)))
        if wrong := differences(client, main, name):
            raise ArtifactError(f"{'; '.join(wrong)}: {way_out(main, name)}")
        version = standing(main, name).champion
        if not version:
            raise ConfigError(f"{name} has no champion: `slmops approve` releases a version")
        verified_digest(client, main, name, version)
        return version, Path(versions.tag(versions.find_version(client, name, version), "bundle"))


def registered_bundle(main: MainCheckout, name: str, version: str) -> Path:
    """The bundle of a version, released or not, held against what was registered.

    Raises:
        ConfigError: there is no such version.
        ArtifactError: its bundle or code moved or changed.
        StageError: the MLflow server does not answer.
    """
    with versions.opened(main) as client:
        model_version = versions.find_version(client, name, version)
        intact(main, name, model_version)
        return Path(versions.tag(model_version, "bundle"))


def intact(main: MainCheckout, name: str, model_version: Any) -> tuple[str, Bundle]:
    """`versions.intact`, and the code that MLflow keeps held against the record too."""
    digest, bundle = versions.intact(model_version)
    for line in audit_log.decisions(main, name, str(model_version.version), digest):
        if "code_digest" in line:
            versions.check_code(main, model_version, line["code_digest"])
    return digest, bundle


def verified_digest(client: Any, main: MainCheckout, name: str, version: str) -> str:
    """The digest of the bundle of a version that was released, held against the record."""
    digest, _ = intact(main, name, versions.find_version(client, name, version))
    known = standing(main, name).digests.get(version)
    if digest != known:
        raise ArtifactError(
            f"{name} version {version} was released as bundle {str(known)[:12]}, and MLflow has it as {digest[:12]}: set "
            "its tags bundle and bundle_digest back"
        )
    return digest


def standing(main: MainCheckout, name: str) -> audit_log.Standing:
    return audit_log.standing(audit_log.entries(audit_log.read(audit_log.place(main))), name)


def expected(client: Any, main: MainCheckout, name: str) -> audit_log.Standing:
    """`_standing`, with no previous champion where that version was deleted in MLflow: there is no way back to it."""
    now = standing(main, name)
    try:
        versions.find_version(client, name, now.previous)
    except ConfigError:
        return replace(now, previous="")
    return now


def differences(client: Any, main: MainCheckout, name: str) -> list[str]:
    """Where MLflow's aliases say something else than the record; empty: nowhere."""
    now, lines = expected(client, main, name), []
    for alias, wanted in ((CHAMPION, now.champion), (PREVIOUS, now.previous)):
        there = versions.aliased(client, name, alias) or ""
        if there != wanted:
            lines.append(f"MLflow's {alias} of {name} is {which(there)}, and the record's {which(wanted)}")
        elif there:
            digest = versions.tag(versions.find_version(client, name, there), "bundle_digest")
            if digest != now.digests.get(there):
                lines.append(
                    f"MLflow has {name} version {there} as bundle {digest[:12]}, and the record as "
                    f"{now.digests.get(there, 'none')[:12]}"
                )
    return lines


def way_out(main: MainCheckout, name: str) -> str:
    """What to do about `_differences`."""
    now = standing(main, name)
    moved = "someone moved it by hand, or a decision was stopped in the middle"
    if now.decided and now.decided["action"] == "withdraw":
        return f"{moved}: the same `slmops withdraw` again makes MLflow agree with the record"
    if not now.champion:
        return f"{moved}: delete that alias in MLflow, or `slmops approve` a version"
    if now.decided and now.decided["action"] == "rollback":
        return f"{moved}: the same `slmops rollback` again makes MLflow agree with the record"
    return (
        f"{moved}: `slmops approve {now.champion}` again makes MLflow agree with the record, or approve another version"
    )


def settle(client: Any, main: MainCheckout, name: str) -> None:
    """Have MLflow's aliases say what the record says."""
    now = expected(client, main, name)
    for alias, wanted in ((CHAMPION, now.champion), (PREVIOUS, now.previous)):
        there = versions.aliased(client, name, alias) or ""
        if wanted and there != wanted:
            client.set_registered_model_alias(name, alias, wanted)
        elif there and not wanted:
            client.delete_registered_model_alias(name, alias)


def which(champion: str) -> str:
    return f"version {champion}" if champion else "none"

"""What may be released: registration, approval, rollback, and the record of them.

The registry is MLflow's. A version points at a bundle under `registry/` of the main checkout (hard-linked, so
that weights are on the disk once) and carries its digest; tags say what it is, aliases what is deployed:
`candidate` (newest registered), `champion`, `previous`. Every decision is a line of `registry/history.jsonl`.
"""

import getpass
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flows import registry, workspace
from tasks.errors import ConfigError
from tasks.package.bundle import bundle_digest, verify
from tasks.stage import folder

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"


@dataclass(frozen=True)
class Registered:
    """A version of the registered model; `fresh`: this call made it."""

    name: str
    version: str
    digest: str
    fresh: bool

    def text(self) -> str:
        """One line for a person."""
        how = "registered" if self.fresh else "was registered before"
        return f"{self.name} version {self.version} {how} (bundle {self.digest[:12]}): `slmops approve {self.version} --by NAME --reason TEXT` releases it"


def register(root: Path, main: Path) -> Registered:
    """Register the bundle in the workspace `root` as `candidate`; the same bundle is the same version.

    Raises:
        ArtifactError: there is no bundle, or it does not match its manifest.
        ConfigError: no variant passed its gates.
        StageError: the MLflow server does not answer.
    """
    source = folder(root, "package")
    bundle = verify(source)
    if bundle.chosen is None:
        raise ConfigError(f"{source} is not registered: no variant passed its gates ({bundle.reason})")
    verdict = bundle.evaluation[bundle.chosen].verdict
    if verdict != "pass":
        raise ConfigError(f"{source} is not registered: the verdict on {bundle.chosen} is {verdict}")
    digest = bundle_digest(source)
    with registry.opened(main) as client:
        known = registry.by_digest(client, bundle.name, digest)
        if known:
            client.set_registered_model_alias(bundle.name, CANDIDATE, known)
            return Registered(bundle.name, known, digest, False)
        place = registry.place(source, main / "registry" / bundle.name / digest[:12])
        tags = {
            "bundle_digest": digest,
            "bundle": str(place),
            "verdict": verdict,
            "variant": bundle.chosen,
            "git_commit": workspace.git(root, "rev-parse", "HEAD"),
        }
        version = registry.log_version(main, bundle.name, place, digest, tags)
        client.set_registered_model_alias(bundle.name, CANDIDATE, version)
        _record(main, "register", bundle.name, version, digest, getpass.getuser(), bundle.reason)
        return Registered(bundle.name, version, digest, True)


def register_if_passed(root: Path, main: Path) -> str:
    """`register` for a run, where a model that did not pass is a result and no error; one line for a person."""
    bundle = verify(folder(root, "package"))
    if bundle.chosen is None:
        return f"not registered: {bundle.reason}"
    return register(root, main).text()


def approve(main: Path, name: str, version: str, by: str, reason: str) -> str:
    """Make a version the champion, the champion before it `previous`; one line for a person.

    Raises:
        ConfigError: there is no such version, it did not pass, or name or reason is empty.
        ArtifactError: its bundle moved or changed since it was registered.
    """
    _signed(by, reason)
    with registry.opened(main) as client:
        found = registry.find_version(client, name, version)
        if found.tags.get("verdict") != "pass":
            raise ConfigError(
                f"{name} version {version} may not be released: its verdict is {found.tags.get('verdict')}"
            )
        digest, _ = registry.intact(found)
        champion = registry.aliased(client, name, CHAMPION)
        if champion == version:
            return f"{name} version {version} is the champion already"
        if champion:
            client.set_registered_model_alias(name, PREVIOUS, champion)
        client.set_registered_model_alias(name, CHAMPION, version)
        if registry.aliased(client, name, CANDIDATE) == version:
            client.delete_registered_model_alias(name, CANDIDATE)
        client.set_model_version_tag(name, version, "approved_by", by)
        client.set_model_version_tag(name, version, "approval_reason", reason)
        _record(main, "approve", name, version, digest, by, reason)
    return f"{name} version {version} is the champion" + (f", version {champion} the previous one" if champion else "")


def rollback(main: Path, name: str, by: str, reason: str) -> str:
    """Swap champion and previous; one line for a person.

    Raises:
        ConfigError: there is no previous champion.
        ArtifactError: its bundle moved or changed.
    """
    _signed(by, reason)
    with registry.opened(main) as client:
        champion, previous = registry.aliased(client, name, CHAMPION), registry.aliased(client, name, PREVIOUS)
        if not champion or not previous:
            raise ConfigError(
                f"{name} has no previous champion to go back to: `slmops history` shows what was released"
            )
        digest, _ = registry.intact(registry.find_version(client, name, previous))
        client.set_registered_model_alias(name, CHAMPION, previous)
        client.set_registered_model_alias(name, PREVIOUS, champion)
        _record(main, "rollback", name, previous, digest, by, reason)
    return f"{name} version {previous} is the champion again, version {champion} the previous one"


def history(main: Path, name: str) -> str:
    """Who registered, approved and rolled back which version, when and why; a line each, oldest first."""
    path = main / "registry" / "history.jsonl"
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [
        f"{entry['at']}  {entry['action']:<9} version {entry['version']:<4} by {entry['by']}: {entry['reason']}"
        for entry in entries
        if entry["model"] == name
    ]
    return "\n".join(lines) or f"nothing was registered under {name} yet"


def _signed(by: str, reason: str) -> None:
    if not by.strip() or not reason.strip():
        raise ConfigError("--by and --reason must not be empty: they are the record of who released what and why")


def _record(main: Path, action: str, name: str, version: str, digest: str, by: str, reason: str) -> None:
    entry = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "model": name,
        "version": version,
        "bundle_digest": digest,
        "by": by,
        "reason": reason,
    }
    with (main / "registry" / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())

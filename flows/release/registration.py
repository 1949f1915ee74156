"""A finished bundle becomes a version of the registered model.

The registry is MLflow's. A version points at a bundle under `registry/` of the main checkout (hard-linked, so
that weights are on the disk once) and carries its digest; tags say what it is. The same bundle is the same version. A
registered model belongs to one checkout: there lie its bundles and the record of every decision (`audit_log`), which
the tags of model and versions mirror. What did not pass is not registered.
"""

import getpass
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.release import audit_log, decisions, released, versions
from flows.workspace import paths, worktrees
from flows.workspace.paths import MainCheckout, Workspace
from tasks.errors import ConfigError
from tasks.frame.stage import folder
from tasks.package.bundle import Bundle, bundle_digest, load, verify


@dataclass(frozen=True)
class Registered:
    """A version of the registered model; `fresh`: this call made it."""

    name: str
    version: str
    digest: str
    fresh: bool
    rejected: bool = False
    champion: bool = False
    decided: bool = False  # by whomever, and whatever it was

    def text(self) -> str:
        """One line for a person."""
        if self.rejected:
            return (
                f"{self.name} version {self.version} was registered before and rejected (bundle {self.digest[:12]}): "
                "`slmops history` shows why"
            )
        if self.champion:
            return f"{self.name} version {self.version} was registered before (bundle {self.digest[:12]}) and is the champion"
        how = "registered" if self.fresh else "was registered before"
        return f"{self.name} version {self.version} {how} (bundle {self.digest[:12]}): `slmops approve {self.version} --model {self.name} --by NAME --reason TEXT` releases it"


def register(
    root: Workspace, main: MainCheckout, by: str | None = None, *, separate_duties: bool = False
) -> Registered:
    """Register the bundle in the workspace `root` as `candidate`; the same bundle is the same version. What was decided on,
    or is older than the candidate, does not become it. `by`: who started the run, by default this login;
    `separate_duties`: that one may never approve it.

    Raises:
        ArtifactError: there is no bundle, or it does not match its manifest.
        ConfigError: no variant passed its gates.
        StageError: the MLflow server does not answer.
    """
    bundle = verify(folder(root, "package"))
    return _register(root, main, bundle, by, separate_duties=separate_duties)


def _register(
    root: Workspace, main: MainCheckout, bundle: Bundle, by: str | None, *, separate_duties: bool
) -> Registered:
    """`register` of a bundle that was verified."""
    source = folder(root, "package")
    if bundle.chosen is None:
        raise ConfigError(f"{source} is not registered: no variant passed its gates ({bundle.reason})")
    verdict = bundle.evaluation[bundle.chosen].verdict
    if verdict != "pass":
        raise ConfigError(f"{source} is not registered: the verdict on {bundle.chosen} is {verdict}")
    digest = bundle_digest(source)
    with versions.opened(main) as client:
        version = versions.by_digest(client, bundle.name, digest)
        fresh = version is None
        place = versions.place(source, paths.registry(main) / bundle.name / digest[:12])
        if version is None:
            tags = {
                "bundle_digest": digest,
                "bundle": str(place),
                "verdict": verdict,
                "variant": bundle.chosen,
                "git_commit": worktrees.git(root, "rev-parse", "HEAD"),  # that the run started from
                "git_branch": worktrees.git(root, "branch", "--show-current"),  # runs/<name> ends with what it made
            }
            version = versions.log_version(main, bundle.name, place, digest, tags)
        if separate_duties:
            client.set_model_version_tag(bundle.name, version, "separate_duties", "true")
        decided = audit_log.decisions(main, bundle.name, version, digest)
        if not decided:  # new, or stopped before it was on record
            who = decisions.signed(by, "starts a run")[0] if by else getpass.getuser()
            code = versions.find_version(client, bundle.name, version).tags.get("code_digest")
            known = {"code_digest": str(code)} if code else {}  # none: a version from before there was one
            audit_log.record(
                client, main, "register", bundle.name, version, digest=digest, by=who, reason=bundle.reason, **known
            )
        newest = versions.aliased(client, bundle.name, released.CANDIDATE) or version
        made = _registered(client, main, bundle.name, version, digest, decided, fresh=fresh)
        if not made.decided and int(newest) <= int(version):
            client.set_registered_model_alias(bundle.name, released.CANDIDATE, version)
        return made


def _registered(
    client: Any,
    main: MainCheckout,
    name: str,
    version: str,
    digest: str,
    decided: Sequence[Mapping[str, Any]],
    *,
    fresh: bool,
) -> Registered:
    """A version with what was decided on it: lines of the record."""
    last = decided[-1]["action"] if decided else "register"
    champion = versions.aliased(client, name, released.CHAMPION) == version == released.standing(main, name).champion
    return Registered(name, version, digest, fresh, last == "reject", champion, last != "register")


def registered(root: Workspace, main: MainCheckout) -> tuple[Registered | None, str]:
    """What a finished run registered, with one line for a person; None where nothing passed.

    Raises:
        ArtifactError: there is no bundle, or it does not match its manifest.
        StageError: the MLflow server does not answer.
    """
    source = folder(root, "package")
    bundle = load(source)
    digest = bundle_digest(source)
    with versions.opened(main) as client:
        version = versions.by_digest(client, bundle.name, digest)
        if version is None:
            return None, f"not registered: {bundle.reason}"
        decided = audit_log.decisions(main, bundle.name, version, digest)
        made = _registered(client, main, bundle.name, version, digest, decided, fresh=False)
    return made, made.text()


def register_if_passed(
    root: Workspace, main: MainCheckout, by: str | None = None, *, separate_duties: bool = False
) -> tuple[Registered | None, str]:
    """`register` for a run, where a model that did not pass is a result and no error; with one line for a person."""
    bundle = verify(folder(root, "package"))
    if bundle.chosen is None:
        return None, f"not registered: {bundle.reason}"
    made = _register(root, main, bundle, by, separate_duties=separate_duties)
    return made, made.text()

"""What may be released: registration, approval, rejection, rollback, and the record of them.

The registry is MLflow's. A version points at a bundle under `registry/` of the main checkout (hard-linked, so
that weights are on the disk once) and carries its digest; tags say what it is, aliases what is deployed:
`candidate` (newest registered), `champion`, `previous`. A registered model belongs to one checkout: there lie its
bundles and the record of every decision (`audit_log`), which the tags of model and versions mirror.

Rules: what did not pass is not registered; a version known to be worse than the champion, or rejected before, is
approved only by someone who says so; the policy approves only what nobody has decided on. A decision is on record
before an alias moves, so that one that was stopped in between can be made again. What is champion the record says: where
MLflow's aliases say otherwise, neither the policy nor a rollback goes on, and a person's approval puts them right.
"""

import getpass
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.release import audit_log, comparison, versions
from flows.release.comparison import Comparison
from flows.workspace import paths, worktrees
from flows.workspace.paths import MainCheckout, Workspace
from tasks.errors import ArtifactError, ConfigError, StageError
from tasks.frame.stage import folder
from tasks.package.bundle import Bundle, bundle_digest, load, verify

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
INSTEAD = "instead of version "  # in the record of a rollback
LONGEST_NAME = 200  # characters; of a reason: audit_log.LONGEST
POLICY = "policy"  # who approves where no person does


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
            who = _signed(by, "starts a run")[0] if by else getpass.getuser()
            code = versions.find_version(client, bundle.name, version).tags.get("code_digest")
            known = {"code_digest": str(code)} if code else {}  # none: a version from before there was one
            audit_log.record(
                client, main, "register", bundle.name, version, digest=digest, by=who, reason=bundle.reason, **known
            )
        newest = versions.aliased(client, bundle.name, CANDIDATE) or version
        made = _registered(client, main, bundle.name, version, digest, decided, fresh=fresh)
        if not made.decided and int(newest) <= int(version):
            client.set_registered_model_alias(bundle.name, CANDIDATE, version)
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
    champion = versions.aliased(client, name, CHAMPION) == version == _standing(main, name).champion
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


def compare(main: MainCheckout, name: str, version: str) -> Comparison:
    """A version's metrics beside the champion's, as their bundles tell them.

    Raises:
        ConfigError: there is no such version.
        ArtifactError: its bundle moved or changed.
        StageError: the MLflow server does not answer.
    """
    with versions.opened(main) as client:
        return _compare(client, main, name, versions.find_version(client, name, version))


def approve(
    main: MainCheckout,
    name: str,
    version: str,
    by: str,
    reason: str,
    *,
    digest: str | None = None,
    expected_champion: str | None = None,
    separate_duties: bool = False,
    even_if_worse: bool = False,
    even_if_rejected: bool = False,
) -> str:
    """Make a version the champion, the champion before it `previous`; one line for a person.

    `digest` (its first twelve digits or more) and `expected_champion` ("": none) are what the decider was shown.
    `separate_duties`: who started the run may not approve it; so it is, too, where it was so for that run.

    Raises:
        ConfigError: there is no such version, it did not pass, it is worse than the champion or was rejected and
            that is not accepted, another champion was released meanwhile, `by` may not decide, or name or reason
            is empty.
        ArtifactError: its bundle moved or changed since it was registered or shown, or the record is damaged.
        StageError: the MLflow server does not answer.
    """
    by, reason = _signed(by, reason)
    with versions.opened(main) as client:
        model_version = versions.find_version(client, name, version)
        apart = separate_duties or model_version.tags.get("separate_duties") == "true"
        if apart and by.casefold() == (started_by(main, name, version) or "").strip().casefold():
            raise ConfigError(
                f"{by} started the run of {name} version {version} and may not approve it: someone else must "
                "(release.separate_duties)"
            )
        known = versions.tag(model_version, "bundle_digest")
        if digest is not None and (len(digest) < 12 or not known.startswith(digest)):
            raise ArtifactError(
                f"{name} version {version} is bundle {known[:12]}, and the decision was on {digest[:12]}: look at it again"
            )
        if model_version.tags.get("verdict") != "pass":
            raise ConfigError(
                f"{name} version {version} may not be released: its verdict is {model_version.tags.get('verdict')}"
            )
        last = _last(main, name, model_version)
        if last["action"] == "reject" and not even_if_rejected:
            raise ConfigError(
                f"{name} version {version} was rejected by {last['by']} ({last['reason']}): "
                "--even-if-rejected approves it all the same"
            )
        seen = _compare(client, main, name, model_version)
        if expected_champion is not None and seen.champion not in (expected_champion, version):
            raise ConfigError(
                f"the champion of {name} is {_which(seen.champion)} now, and the decision was made beside "
                f"{_which(expected_champion)}: compare again"
            )
        if seen.worse and not even_if_worse:
            raise ConfigError(
                f"{name} version {version} is worse than what is released now: {seen.text()}; --even-if-worse releases "
                "it all the same"
            )
        over = f"; over the rejection by {last['by']}" if last["action"] == "reject" else ""
        return _release(client, main, name, seen, by, reason, seen.text() + over)


def auto_approve(main: MainCheckout, name: str, version: str, margin: float) -> str:
    """Approve as the policy, if the version passed and its accuracy is at least `margin` above the champion's.

    Returns one line that says what was decided and why. What a person has decided on is left to persons: a
    version that was rejected, or approved and rolled back, does not come back by itself.

    Raises:
        ConfigError: there is no such version.
        ArtifactError: its bundle moved or changed, or the record is damaged.
        StageError: the MLflow server does not answer.
    """
    with versions.opened(main) as client:
        model_version = versions.find_version(client, name, version)
        refused = f"{name} version {version} is not approved by the policy: "
        if wrong := _differences(client, main, name):
            return f"{refused}{'; '.join(wrong)}: {_way_out(main, name)}"
        seen = _compare(client, main, name, model_version)
        if seen.champion == version:
            return f"{name} version {version} is the champion already"
        if model_version.tags.get("verdict") != "pass":
            return f"{refused}its verdict is {model_version.tags.get('verdict')}"
        last = _last(main, name, model_version)
        if last["action"] != "register":
            return f"{refused}{last['by']} decided on it before ({last['action']}: {last['reason']})"
        if not seen.better_by(margin):
            return f"{refused}{seen.text()}" + (f"; the margin is {margin:g}" if seen.comparable else "")
        reason = f"it passed all gates and holds the margin of {margin:g}"
        return _release(client, main, name, seen, POLICY, reason, seen.text())


def reject(main: MainCheckout, name: str, version: str, by: str, reason: str) -> str:
    """Record that a version is not to be released, and take `candidate` and `previous` from it; one line.

    Raises:
        ConfigError: there is no such version, it is the champion, or name or reason is empty.
        ArtifactError: the record is damaged.
        StageError: the MLflow server does not answer.
    """
    by, reason = _signed(by, reason)
    with versions.opened(main) as client:
        model_version = versions.find_version(client, name, version)
        if version in (versions.aliased(client, name, CHAMPION), _standing(main, name).champion):
            raise ConfigError(
                f"{name} version {version} is the champion: `slmops rollback` goes back to the one before, `slmops withdraw` "
                "to none"
            )
        last = _last(main, name, model_version)
        if (last["action"], last["by"], last["reason"]) == ("reject", by, reason):  # told twice: here and in the form
            return f"{name} version {version} is rejected already"
        record_rejection(client, main, name, version, versions.tag(model_version, "bundle_digest"), by, reason)
    return f"{name} version {version} is rejected"


def record_rejection(
    client: Any, main: MainCheckout, name: str, version: str, digest: str, by: str, reason: str
) -> None:
    """Put a rejection on record, then take `candidate` and `previous` from the version. `client`: of `registry.opened`.

    Raises:
        ArtifactError: the record is damaged.
    """
    with audit_log.decision(client, main, "reject", name, version, digest=digest, by=by, reason=reason):
        for alias in (CANDIDATE, PREVIOUS):
            if versions.aliased(client, name, alias) == version:
                client.delete_registered_model_alias(name, alias)


def rollback(main: MainCheckout, name: str, by: str, reason: str) -> str:
    """Swap champion and previous, whichever is better; one line for a person. One that was stopped is finished.

    Raises:
        ConfigError: there is no previous champion, or name or reason is empty.
        ArtifactError: its bundle moved or changed, the record is damaged, or MLflow's aliases are not what it says.
        StageError: the MLflow server does not answer.
    """
    by, reason = _signed(by, reason)
    with versions.opened(main) as client:
        now = _expected(client, main, name)
        champion, previous = now.champion, now.previous
        if wrong := _differences(client, main, name):
            if now.decided is None or now.decided["action"] != "rollback":
                raise ArtifactError(f"{name} is not rolled back: {'; '.join(wrong)}: {_way_out(main, name)}")
            _released_bundle(client, main, name, champion)
            _settle(client, main, name)
            return f"{name} version {champion} is the champion again, version {previous} the previous one"
        if not previous:
            raise ConfigError(
                f"{name} has no previous champion to go back to: `slmops history` shows what was released, and "
                "`slmops withdraw` takes the champion back without another one"
            )
        digest = _released_bundle(client, main, name, previous)
        facts = f"{INSTEAD}{champion}"
        with audit_log.decision(
            client, main, "rollback", name, previous, digest=digest, by=by, reason=reason, facts=facts
        ):
            client.set_registered_model_alias(name, CHAMPION, previous)
        _settle(client, main, name)
    return f"{name} version {previous} is the champion again, version {champion} the previous one"


def withdraw(main: MainCheckout, name: str, by: str, reason: str) -> str:
    """Take the champion back without another one, so that nothing is released; one line for a person. A withdrawal that was
    stopped is finished.

    Raises:
        ConfigError: nothing is released, or name or reason is empty.
        ArtifactError: the record is damaged, or MLflow's aliases are not what it says.
        StageError: the MLflow server does not answer.
    """
    by, reason = _signed(by, reason)
    with versions.opened(main) as client:
        now, wrong = _standing(main, name), _differences(client, main, name)
        stopped = wrong and now.decided is not None and now.decided["action"] == "withdraw"
        if wrong and not stopped:
            raise ArtifactError(f"{name} is not withdrawn: {'; '.join(wrong)}: {_way_out(main, name)}")
        if not now.champion and not stopped:
            raise ConfigError(f"{name} has no champion: nothing is released")
        version = now.decided["version"] if now.decided else now.champion
        if not stopped:
            digest = now.digests[version]
            with audit_log.decision(client, main, "withdraw", name, version, digest=digest, by=by, reason=reason):
                client.delete_registered_model_alias(name, CHAMPION)
        _settle(client, main, name)
    return f"{name} version {version} is withdrawn, and nothing is released: `slmops approve` releases a version"


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
        if wrong := _differences(client, main, name):
            raise ArtifactError(f"{'; '.join(wrong)}: {_way_out(main, name)}")
        version = _standing(main, name).champion
        if not version:
            raise ConfigError(f"{name} has no champion: `slmops approve` releases a version")
        _released_bundle(client, main, name, version)
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
        _intact(main, name, model_version)
        return Path(versions.tag(model_version, "bundle"))


def _standing(main: MainCheckout, name: str) -> audit_log.Standing:
    return audit_log.standing(audit_log.entries(audit_log.read(audit_log.place(main))), name)


def _expected(client: Any, main: MainCheckout, name: str) -> audit_log.Standing:
    """`_standing`, with no previous champion where that version was deleted in MLflow: there is no way back to it."""
    now = _standing(main, name)
    try:
        versions.find_version(client, name, now.previous)
    except ConfigError:
        return replace(now, previous="")
    return now


def _differences(client: Any, main: MainCheckout, name: str) -> list[str]:
    """Where MLflow's aliases say something else than the record; empty: nowhere."""
    now, lines = _expected(client, main, name), []
    for alias, wanted in ((CHAMPION, now.champion), (PREVIOUS, now.previous)):
        there = versions.aliased(client, name, alias) or ""
        if there != wanted:
            lines.append(f"MLflow's {alias} of {name} is {_which(there)}, and the record's {_which(wanted)}")
        elif there:
            digest = versions.tag(versions.find_version(client, name, there), "bundle_digest")
            if digest != now.digests.get(there):
                lines.append(
                    f"MLflow has {name} version {there} as bundle {digest[:12]}, and the record as "
                    f"{now.digests.get(there, 'none')[:12]}"
                )
    return lines


def _way_out(main: MainCheckout, name: str) -> str:
    """What to do about `_differences`."""
    now = _standing(main, name)
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


def _settle(client: Any, main: MainCheckout, name: str) -> None:
    """Have MLflow's aliases say what the record says."""
    now = _expected(client, main, name)
    for alias, wanted in ((CHAMPION, now.champion), (PREVIOUS, now.previous)):
        there = versions.aliased(client, name, alias) or ""
        if wanted and there != wanted:
            client.set_registered_model_alias(name, alias, wanted)
        elif there and not wanted:
            client.delete_registered_model_alias(name, alias)


def _released_bundle(client: Any, main: MainCheckout, name: str, version: str) -> str:
    """The digest of the bundle of a version that was released, held against the record."""
    digest, _ = _intact(main, name, versions.find_version(client, name, version))
    known = _standing(main, name).digests.get(version)
    if digest != known:
        raise ArtifactError(
            f"{name} version {version} was released as bundle {str(known)[:12]}, and MLflow has it as {digest[:12]}: set "
            "its tags bundle and bundle_digest back"
        )
    return digest


def _intact(main: MainCheckout, name: str, model_version: Any) -> tuple[str, Bundle]:
    """`registry.intact`, and the code that MLflow keeps held against the record too."""
    digest, bundle = versions.intact(model_version)
    for line in audit_log.decisions(main, name, str(model_version.version), digest):
        if "code_digest" in line:
            versions.check_code(main, model_version, line["code_digest"])
    return digest, bundle


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
    if wrong := _differences(client, main, name):
        raise ArtifactError(f"{'; '.join(wrong)}: {_way_out(main, name)}")
    now = _expected(client, main, name)
    for version in filter(None, (now.champion, now.previous)):
        model_version = versions.find_version(client, name, version)
        for line in audit_log.decisions(main, name, version, now.digests[version]):
            if "code_digest" in line:
                versions.check_code(main, model_version, line["code_digest"])


def _signed(by: str, reason: str) -> tuple[str, str]:
    """Both as one line of text each."""
    by, reason = " ".join(by.split()), " ".join(reason.split())
    if not by or not reason:
        raise ConfigError("--by and --reason must not be empty: they are the record of who released what and why")
    for option, text, most in (("--by", by, LONGEST_NAME), ("--reason", reason, audit_log.LONGEST)):
        if len(text) > most:
            raise ConfigError(f"{option} has {len(text)} characters: write at most {most}")
    if by.casefold() == POLICY:
        raise ConfigError(f"--by {by} is how the record names what no person decided: give your name")
    if not (by + reason).isprintable():
        raise ConfigError("--by and --reason hold characters that no one can see: write plain text")
    return by, reason


def _which(champion: str) -> str:
    return f"version {champion}" if champion else "none"


def _compare(client: Any, main: MainCheckout, name: str, model_version: Any) -> Comparison:
    """Beside the champion; a version that is it on record, and not yet in MLflow, beside the one before it."""
    digest, ours = _intact(main, name, model_version)
    now, version = _standing(main, name), str(model_version.version)
    unfinished = now.champion == version and versions.aliased(client, name, CHAMPION) != version
    champion = now.previous if unfinished else now.champion
    theirs = _manifest(client, name, champion) if champion else None
    return comparison.compare(version, digest, ours, champion, theirs)


def _manifest(client: Any, name: str, champion: str) -> Bundle | None:
    """What the champion's bundle tells; None if it is not there as registered, which must not keep it champion."""
    try:
        version = versions.find_version(client, name, champion)
        place = Path(versions.tag(version, "bundle"))
        return load(place) if bundle_digest(place) == versions.tag(version, "bundle_digest") else None
    except (ArtifactError, ConfigError):
        return None


def _release(client: Any, main: MainCheckout, name: str, seen: Comparison, by: str, reason: str, facts: str) -> str:
    """Make a version, about which all was asked, the champion; whatever was wrong with MLflow's aliases is right then."""
    version = seen.version
    if seen.champion == version:
        _settle(client, main, name)
        return f"{name} version {version} is the champion already"
    fields = {"digest": seen.digest, "by": by, "reason": reason, "facts": facts}
    with audit_log.decision(client, main, "approve", name, version, **fields):
        client.set_registered_model_alias(name, CHAMPION, version)
    _settle(client, main, name)
    if versions.aliased(client, name, CANDIDATE) == version:
        client.delete_registered_model_alias(name, CANDIDATE)
    previous = _expected(client, main, name).previous
    before = f", version {previous} the previous one" if previous else ""
    return f"{name} version {version} is the champion{before}; {facts}"


def _last(main: MainCheckout, name: str, model_version: Any) -> audit_log.Entry:
    """The newest decision on a version."""
    version = str(model_version.version)
    decided = audit_log.decisions(main, name, version, versions.tag(model_version, "bundle_digest"))
    if not decided:
        raise ArtifactError(
            f"{audit_log.place(main)} does not tell of {name} version {version}: `slmops audit verify`, or `slmops register` "
            "the finished run again"
        )
    return decided[-1]

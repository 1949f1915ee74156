"""What is decided on a version: approval by a person or the policy, rejection, rollback, withdrawal.

Aliases of MLflow's registry say what is deployed: `candidate` (newest registered), `champion`, `previous`.

Rules: a version known to be worse than the champion, or rejected before, is approved only by someone who says so; the
policy approves only what nobody has decided on. A decision is on record before an alias moves, so that one that was
stopped in between can be made again. Where MLflow's aliases are not what the record says (`released`), neither the policy
nor a rollback goes on, and a person's approval puts them right.
"""

from pathlib import Path
from typing import Any

from flows.release import audit_log, comparison, history, released, versions
from flows.release.comparison import Comparison
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError, ConfigError
from tasks.package.bundle import Bundle, bundle_digest, load

INSTEAD = "instead of version "  # in the record of a rollback
LONGEST_NAME = 200  # characters; of a reason: audit_log.LONGEST
POLICY = "policy"  # who approves where no person does


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
    by, reason = signed(by, reason)
    with versions.opened(main) as client:
        model_version = versions.find_version(client, name, version)
        apart = separate_duties or model_version.tags.get("separate_duties") == "true"
        if apart and by.casefold() == (history.started_by(main, name, version) or "").strip().casefold():
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
                f"the champion of {name} is {released.which(seen.champion)} now, and the decision was made beside "
                f"{released.which(expected_champion)}: compare again"
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
        if wrong := released.differences(client, main, name):
            return f"{refused}{'; '.join(wrong)}: {released.way_out(main, name)}"
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
    by, reason = signed(by, reason)
    with versions.opened(main) as client:
        model_version = versions.find_version(client, name, version)
        if version in (versions.aliased(client, name, released.CHAMPION), released.standing(main, name).champion):
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
    """Put a rejection on record, then take `candidate` and `previous` from the version. `client`: of `versions.opened`.

    Raises:
        ArtifactError: the record is damaged.
    """
    with audit_log.decision(client, main, "reject", name, version, digest=digest, by=by, reason=reason):
        for alias in (released.CANDIDATE, released.PREVIOUS):
            if versions.aliased(client, name, alias) == version:
                client.delete_registered_model_alias(name, alias)


def rollback(main: MainCheckout, name: str, by: str, reason: str) -> str:
    """Swap champion and previous, whichever is better; one line for a person. One that was stopped is finished.

    Raises:
        ConfigError: there is no previous champion, or name or reason is empty.
        ArtifactError: its bundle moved or changed, the record is damaged, or MLflow's aliases are not what it says.
        StageError: the MLflow server does not answer.
    """
    by, reason = signed(by, reason)
    with versions.opened(main) as client:
        now = released.expected(client, main, name)
        champion, previous = now.champion, now.previous
        if wrong := released.differences(client, main, name):
            if now.decided is None or now.decided["action"] != "rollback":
                raise ArtifactError(f"{name} is not rolled back: {'; '.join(wrong)}: {released.way_out(main, name)}")
            released.verified_digest(client, main, name, champion)
            released.settle(client, main, name)
            return f"{name} version {champion} is the champion again, version {previous} the previous one"
        if not previous:
            raise ConfigError(
                f"{name} has no previous champion to go back to: `slmops history` shows what was released, and "
                "`slmops withdraw` takes the champion back without another one"
            )
        digest = released.verified_digest(client, main, name, previous)
        facts = f"{INSTEAD}{champion}"
        with audit_log.decision(
            client, main, "rollback", name, previous, digest=digest, by=by, reason=reason, facts=facts
        ):
            client.set_registered_model_alias(name, released.CHAMPION, previous)
        released.settle(client, main, name)
    return f"{name} version {previous} is the champion again, version {champion} the previous one"


def withdraw(main: MainCheckout, name: str, by: str, reason: str) -> str:
    """Take the champion back without another one, so that nothing is released; one line for a person. A withdrawal that was
    stopped is finished.

    Raises:
        ConfigError: nothing is released, or name or reason is empty.
        ArtifactError: the record is damaged, or MLflow's aliases are not what it says.
        StageError: the MLflow server does not answer.
    """
    by, reason = signed(by, reason)
    with versions.opened(main) as client:
        now, wrong = released.standing(main, name), released.differences(client, main, name)
        stopped = wrong and now.decided is not None and now.decided["action"] == "withdraw"
        if wrong and not stopped:
            raise ArtifactError(f"{name} is not withdrawn: {'; '.join(wrong)}: {released.way_out(main, name)}")
        if not now.champion and not stopped:
            raise ConfigError(f"{name} has no champion: nothing is released")
        version = now.decided["version"] if now.decided else now.champion
        if not stopped:
            digest = now.digests[version]
            with audit_log.decision(client, main, "withdraw", name, version, digest=digest, by=by, reason=reason):
                client.delete_registered_model_alias(name, released.CHAMPION)
        released.settle(client, main, name)
    return f"{name} version {version} is withdrawn, and nothing is released: `slmops approve` releases a version"


def _compare(client: Any, main: MainCheckout, name: str, model_version: Any) -> Comparison:
    """Beside the champion; a version that is it on record, and not yet in MLflow, beside the one before it."""
    digest, ours = released.intact(main, name, model_version)
    now, version = released.standing(main, name), str(model_version.version)
    unfinished = now.champion == version and versions.aliased(client, name, released.CHAMPION) != version
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
        released.settle(client, main, name)
        return f"{name} version {version} is the champion already"
    fields = {"digest": seen.digest, "by": by, "reason": reason, "facts": facts}
    with audit_log.decision(client, main, "approve", name, version, **fields):
        client.set_registered_model_alias(name, released.CHAMPION, version)
    released.settle(client, main, name)
    if versions.aliased(client, name, released.CANDIDATE) == version:
        client.delete_registered_model_alias(name, released.CANDIDATE)
    previous = released.expected(client, main, name).previous
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


def signed(by: str, reason: str) -> tuple[str, str]:
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

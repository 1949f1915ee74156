"""What a certificate says: the verdict for each kind of device first, then the evidence, then what was not measured.

All of it comes from a bundle's folder (bundle.json, and report.json with what was measured) and the record of decisions;
nothing is computed again.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError, ConfigError
from tasks.frame.stage import read_json
from tasks.package.bundle import Bundle, bundle_digest, verify
from tasks.package.choose import best
from tasks.variants import RUNTIMES

FORM = "slmops certificate 1"
DECISIONS = ("approve", "reject", "rollback", "withdraw")


def content(folder: Path, decisions: Sequence[Mapping[str, Any]], devices: Sequence[str] = ()) -> dict[str, Any]:
    """The certificate of the bundle in `folder` as JSON values. `decisions`: lines of the record, oldest first; those on
    other bundles are passed over. `devices`: profiles to certify for, by default all that it was judged for.

    Raises:
        ArtifactError: there is no bundle, it does not match its manifest, or it is of a version that knew no devices.
        ConfigError: it was not judged for one of `devices`.
    """
    bundle, report = verify(folder), read_json(folder / "report.json")
    digest, judged = bundle_digest(folder), report.get("devices")
    if not isinstance(judged, dict) or not judged:
        raise ArtifactError(f"{folder} was judged for no device: it is of an earlier version, `slmops run` again")
    if unknown := [name for name in devices if name not in judged]:
        raise ConfigError(f"--profile {', '.join(unknown)}: the bundle was judged for {', '.join(judged)}")
    wanted = list(devices or judged)
    variants = {name: _variant(name, each, bundle, wanted) for name, each in report["variants"].items()}
    about = [line for line in decisions if line.get("bundle_digest") == digest]
    return {
        "form": FORM,
        "model": bundle.name,
        "bundle": digest,
        "version": str(about[-1]["version"]) if about else None,
        "issued_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "devices": [_device(name, judged[name], variants, bundle) for name in wanted],
        "decision": _decision(about),
        "variants": variants,
        "not_measured": _not_measured(wanted, variants, bundle),
        "licence": bundle.licence.model_dump(),
        "lineage": bundle.lineage,
        "inputs": bundle.created_from,
        "software": {**bundle.runtimes, "slmops": version("slmops")},
        "files": {name: file.model_dump() for name, file in bundle.files.items()},
    }


def _variant(name: str, told: Mapping[str, Any], bundle: Bundle, devices: Sequence[str]) -> dict[str, Any]:
    return {
        "runtime": RUNTIMES[told["runtime"]].label if told["runtime"] in RUNTIMES else told["runtime"],
        "targets": bundle.variants.get(name, []),
        "metrics": told["metrics"],
        "devices": {device: told["devices"][device] for device in devices},
    }


def _device(name: str, judged: Mapping[str, Any], variants: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """The verdict for one kind of device: that of its best variant, where nothing passed the best of all."""
    verdicts = {each: made["devices"][name]["verdict"] for each, made in variants.items()}
    variant = judged["variant"]
    told = next(iter(verdicts.values()))["device"]
    targets = bundle.variants.get(variant, []) if variant else []
    return {
        "name": name,
        "label": told["label"],
        "limits": {key: value for key, value in told.items() if key != "label"},
        "verdict": "pass" if variant else verdicts[best(verdicts)]["verdict"],
        "variant": variant,
        "targets": targets,
        "reason": judged["reason"],
    }


def _decision(about: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The last decision on this bundle; None: nobody has decided."""
    last = next((line for line in reversed(about) if line["action"] in DECISIONS), None)
    return {key: last[key] for key in ("action", "version", "by", "at", "reason")} if last else None


def _not_measured(devices: Sequence[str], variants: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """What a reader must not take for shown."""
    every = [variant["devices"][device] for variant in variants.values() for device in devices]
    machines = {_machine(each["measurements"].get("machine") or {}): None for each in every}
    lines = [
        f"The devices themselves: speed and memory are those of {' and '.join(machines)}, held to the cores and memory of each "
        "profile. Another processor is slower or faster."
    ]
    fewer = {
        (
            each["verdict"]["device"]["label"],
            each["measurements"]["threads"],
            each["verdict"]["device"]["threads"],
        ): None
        for each in every
        if "threads" in each["measurements"]
        and each["measurements"]["threads"] < (each["verdict"]["device"]["threads"] or 0)
    }
    lines += [f"{label}: {threads} of its {wanted} threads, for want of cores." for label, threads, wanted in fewer]
    alone = sorted(name for name, variant in variants.items() if not variant["targets"])
    if alone:
        lines.append(
            f"Prompts in the runtime that serves them, for variants that no bundle carries: {', '.join(alone)}."
        )
    lines += [
        f"Answers to other requests than the {_test_rows(bundle)} test rows, and other languages than theirs.",
        "Refusals, very long and invalid input, template tokens in a request, and memory over many requests.",
        "Power, heat and battery.",
    ]
    return lines


def _test_rows(bundle: Bundle) -> str:
    data = bundle.lineage.get("data")
    rows = data.get("rows") if isinstance(data, dict) else None
    return f"{rows['test']:,}" if isinstance(rows, dict) and isinstance(rows.get("test"), int) else "recorded"


def _machine(facts: Mapping[str, Any]) -> str:
    if not facts:
        return "a machine that is not on record"
    told = f" ({', '.join(facts['instructions'])})" if facts.get("instructions") else ""
    return f"{facts['processor']}{told}, {facts['cores']} cores, {facts['memory_bytes'] / 1e9:.0f} GB"

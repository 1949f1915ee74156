"""Choose the best variant that passed its gates and write it as bundles that runtimes take as they are.

A failed gate is data: with no passing variant the bundle holds no weights, and says why.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError
from tasks.frame import manifest
from tasks.frame.events import progress
from tasks.frame.stage import read_json
from tasks.models import chat, dated, loading
from tasks.package import bundle, card, parity
from tasks.package.choose import Candidate, Choice, candidates, choose
from tasks.package.params import TARGETS, Package
from tasks.package.prompt_format import probe
from tasks.package.release import Release, write
from tasks.params import Params
from tasks.runtimes import environments
from tasks.runtimes.protocol import PromptReader

COMPOSE = (
    "This model learned letters joined with their accents (Unicode NFC), and this runtime does not join them: "
    "normalise texts that may hold them apart, such as file names from macOS."
)


def package(
    params: Params,
    *,
    source: Path,
    student: Path,
    artifacts: Path,
    validated: Path,
    measured: Path,
    verdicts: Path,
    out: Path,
) -> dict[str, float]:
    """Fill `out` with one folder a target, bundle.json, report.json, MODEL_CARD.md and LICENSE.

    Raises:
        ArtifactError: an input is missing or damaged.
        StageError: a packaged runtime would not see the prompts that the model was trained on.
    """
    settings, model = params.package, student / "model"
    wanted = [TARGETS[name] for name in settings.targets]
    devices = params.measure.profiles
    variants = candidates(artifacts, validated, measured, verdicts, params.quantize.variants, devices)
    choice = choose(variants, settings.choose, {target.runtime.name for target in wanted})
    lineage = read_json(source / "lineage.json")
    names = bundle.Licence(model=_named(lineage, "model"), data=_named(lineage, "data"))
    licence = _licence(source, names.model)

    targets: dict[str, bundle.Target] = {}
    with progress("write the bundles", len(settings.targets), "targets") as advance:
        releases = {name: _release(settings, best, model, source, licence) for name, best in choice.best.items()}
        for target in wanted:
            if release := releases.get(target.runtime.name):
                notes = target.write(release, out / target.name) + ([COMPOSE] if release.needs_composed else [])
                notes += [dated.NOTE] if release.dated else []
                targets[target.name] = bundle.Target(
                    variant=release.variant,
                    runtime=target.served_by or target.runtime.distribution,
                    minimum_ram_bytes=release.minimum_ram_bytes,
                    context_length=release.context_length,
                    conversations_checked=release.conversations_checked,
                    notes=notes,
                )
            advance(note=target.name)

    chosen = choice.chosen
    left = [name for name in settings.targets if name not in targets]
    left_out = (
        f" Left out, for want of a passing variant of their runtime: {', '.join(left)}." if chosen and left else ""
    )
    write(out / "LICENSE", licence)
    made = bundle.Bundle(
        name=settings.name,
        chosen=chosen.name if chosen else None,
        reason=choice.reason + left_out,
        variants={c.name: [name for name, t in targets.items() if t.variant == c.name] for c in variants},
        devices={device: best.name if (best := choice.devices.get(device)) else None for device in devices},
        targets=targets,
        files={},
        minimum_ram_bytes=releases[chosen.runtime.name].minimum_ram_bytes if chosen else None,
        system=releases[chosen.runtime.name].system if chosen else None,
        runtimes=dict(
            sorted((best.runtime.distribution, environments.version(best.runtime)) for best in choice.best.values())
        ),
        licence=names,
        lineage={key: bundle.finite(value) for key, value in lineage.items()},
        evaluation={c.name: _evaluation(c) for c in variants},
        created_from=_digests(variants, source, student, artifacts, verdicts),
    )
    write(out / "MODEL_CARD.md", card.card(made, releases[chosen.runtime.name] if chosen else None))
    bundle.write(out, made.model_copy(update={"files": bundle.listing(out)}))
    _report(out, settings.choose, choice, choice.measured_reason + left_out, made, variants)
    return {
        "passing": float(sum(c.passed for c in variants)),
        "targets": float(len(targets)),
        "chosen_size_bytes": float(chosen.metrics["size_bytes"]) if chosen else 0.0,
        "minimum_ram_bytes": float(made.minimum_ram_bytes or 0),
    }


def _release(settings: Package, best: Candidate, model: Path, source: Path, licence: str) -> Release:
    """The best of one runtime, once its runtime was held against the tokenizer."""
    rows = chat.read_rows(source / "data" / "train.jsonl")
    # Some prompts of the data itself, besides the conversations that look for trouble.
    prompts = [row[:-1] for row in chat.read_rows(source / "data" / "test.jsonl")[:20]]
    systems = {row[0]["content"] if row[0]["role"] == "system" else None for row in rows}
    tokenizer, config = loading.load_tokenizer(model), loading.load_config(model)
    reader: PromptReader = best.runtime.module.prompt_reader(best.weights)
    context = _context(settings.context_length, config)
    return Release(
        name=settings.name,
        variant=best.name,
        weights=best.weights,
        runtime_version=environments.version(best.runtime),
        conversations_checked=parity.check(model, tokenizer, reader, best.weights, prompts),
        adds_bos=reader.adds_bos,
        needs_composed=parity.needs_composed(tokenizer, reader),
        prompt_format=probe(tokenizer, parity.CONVERSATIONS.values()),
        dated=dated.writes_day(tokenizer.chat_template),
        bos=tokenizer.bos_token or "",
        stops=tuple(tokenizer.convert_ids_to_tokens(loading.stop_ids(model, tokenizer))),
        system=systems.pop() if len(systems) == 1 else None,
        example=chat.plain(rows[0][:-1]),
        answer=rows[0][-1]["content"],
        context_length=context,
        minimum_ram_bytes=best.runtime.module.minimum_memory(_bytes(best.weights), config, context),
        licence=licence,
    )


def _context(wanted: int, config: Mapping[str, Any]) -> int:
    """The most tokens of a conversation: not above those from which Phi's rotary embedding is another than in training."""
    longest = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    return min(wanted, longest or wanted)


def _licence(source: Path, name: str) -> str:
    path = source / "LICENSE"
    return path.read_text(encoding="utf-8") if path.is_file() else f"SPDX-License-Identifier: {name}\n"


def _named(lineage: Mapping[str, Any], part: str) -> str:
    value = lineage.get(part)
    if not isinstance(value, dict):
        raise ArtifactError(f"lineage.json of `acquire` says nothing of the {part}: run `acquire` again")
    return str(value.get("licence") or "unknown")


def _evaluation(candidate: Candidate) -> bundle.Evaluation:
    metrics = {name: bundle.finite(value) for name, value in sorted(candidate.metrics.items())}
    devices = {device: verdict["verdict"] for device, verdict in candidate.verdicts.items()}
    return bundle.Evaluation(verdict=candidate.verdict["verdict"], devices=devices, metrics=metrics)


def _digests(variants: list[Candidate], source: Path, student: Path, artifacts: Path, verdicts: Path) -> dict[str, str]:
    folders = {"source": source, "student": student}
    folders |= {f"artifacts/{c.name}": artifacts / c.name for c in variants}
    folders |= {f"verdicts/{c.name}/{device}": verdicts / c.name / device for c in variants for device in c.verdicts}
    return {role: manifest.digest(folder) for role, folder in folders.items()}


def _bytes(weights: Path) -> int:
    files = [weights] if weights.is_file() else [p for p in weights.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _report(out: Path, rule: str, choice: Choice, reason: str, made: bundle.Bundle, found: list[Candidate]) -> None:
    """What the HTML report and the approval form read, measured numbers included."""
    variants = {
        c.name: {
            "runtime": c.runtime.name, "targets": made.variants[c.name], "metrics": c.metrics,
            "device": c.device,
            "devices": {
                name: {"verdict": verdict, "measurements": c.measured[name]} for name, verdict in c.verdicts.items()
            },
        }
        for c in found
    }  # fmt: skip
    devices = {name: {"variant": made.devices[name], "reason": why} for name, why in choice.why.items()}
    report = {
        "name": made.name, "rule": rule, "chosen": made.chosen, "reason": reason, "devices": devices,
        "variants": variants,
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(bundle.finite(report), indent=2, ensure_ascii=False) + "\n")

"""MODEL_CARD.md: the Hugging Face form (YAML front matter, model-index), from what equal work reproduces."""

from typing import Any

import yaml

from tasks.metrics import METRICS
from tasks.package.bundle import Bundle
from tasks.package.escaping import block, inline
from tasks.package.release import Release

SHOWN = tuple(metric for metric in METRICS.values() if metric.better and not metric.measured)

LIMITS = """\
- It does the task of its data and nothing else; on other requests its answers mean nothing.
- The numbers are from one test set that was held out from training; they do not speak of other wordings,
  languages or users than that set holds.
- It gives text. Whatever acts on an answer must check it first: a wrong action can look well-formed.
- A user text that contains the model's special tokens is read as those tokens: refuse or strip them when
  strangers may write."""


def identity(part: dict[str, Any]) -> str:
    """The name under which a source of a model or data set is known."""
    names = (part.get(key) for key in ("repo", "name", "distribution", "path"))
    return next((str(name) for name in names if name), "unknown")


def card(bundle: Bundle, release: Release | None) -> str:
    """The whole card as Markdown."""
    model, data = _part(bundle, "model"), _part(bundle, "data")
    sections = [
        _front(bundle, identity(model), identity(data)),
        f"# {bundle.name}\n\n" + _summary(bundle, model),
        "## Intended use\n\n" + _use(release),
        "## Data\n\n" + _data(bundle, data),
        "## Evaluation\n\nOn the packaged files, each in its own runtime, on the held-out test rows.\n\n"
        + _table(bundle),
        "## Limits\n\n" + LIMITS,
        "## How to run\n\n" + _run(bundle),
        "## Licence\n\n"
        f"Model: {inline(bundle.licence.model)}; data: {inline(bundle.licence.data)}. The text is in `LICENSE`. "
        "These weights were changed from the base model: trained, pruned, distilled and quantized.",
    ]
    return "\n\n".join(sections) + "\n"


def _part(bundle: Bundle, name: str) -> dict[str, Any]:
    part = bundle.lineage.get(name)
    return part if isinstance(part, dict) else {}


def _front(bundle: Bundle, base: str, data: str) -> str:
    front: dict[str, Any] = {
        "license": bundle.licence.model.lower(),
        "base_model": base,
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": sorted({"slm", "distillation", "pruning", "quantized", *bundle.runtimes}),
    }
    if bundle.chosen:
        metrics = bundle.evaluation[bundle.chosen].metrics
        front["model-index"] = [
            {
                "name": bundle.name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": data, "type": data, "split": "test"},
                        "metrics": [
                            {"type": each.name, "name": each.label, "value": metrics[each.name]}
                            for each in SHOWN
                            if isinstance(metrics.get(each.name), (int, float))
                        ],
                    }
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def _summary(bundle: Bundle, model: dict[str, Any]) -> str:
    size = f" ({model['parameters'] / 1e6:.0f} M parameters)" if isinstance(model.get("parameters"), int) else ""
    return (
        f"A small language model for one task on edge devices, made from {inline(identity(model))}{size} by fine-tuning, "
        f"depth pruning, distillation and quantization.\n\n**Choice.** {inline(bundle.reason)}"
    )


def _use(release: Release | None) -> str:
    use = "Answering single requests of the kind in its data, locally, greedily (temperature 0)."
    if release is None:
        return use
    use += (
        f" It needs {release.minimum_ram_bytes / 1e6:.0f} MB of memory with {release.context_length} tokens of context."
    )
    if release.system is None:
        return f"{use}\n\nIts data has no system prompt common to all rows."
    return f"{use}\n\nIts system prompt, without which it was never trained:\n\n{block(release.system)}"


def _data(bundle: Bundle, data: dict[str, Any]) -> str:
    rows = data.get("rows")
    counts = ", ".join(inline(f"{split} {n}") for split, n in rows.items()) if isinstance(rows, dict) else "unknown"
    licence = inline(bundle.licence.data)
    return f"{inline(identity(data))}; rows: {counts}; licence: {licence}. Digests are in `bundle.json` (lineage)."


def _table(bundle: Bundle) -> str:
    lines = [
        "| variant | verdict | " + " | ".join(each.label for each in SHOWN) + " |",
        "|---|---" + "|---:" * len(SHOWN) + "|",
    ]
    for variant, evaluation in bundle.evaluation.items():
        cells = [each.show(evaluation.metrics.get(each.name)) for each in SHOWN]
        name = f"**{inline(variant)}**" if variant == bundle.chosen else inline(variant)
        lines.append(f"| {name} | {inline(evaluation.verdict)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _run(bundle: Bundle) -> str:
    if not bundle.targets:
        return "No variant passed its gates, so there are no weights here."
    lines = []
    for folder, target in bundle.targets.items():
        notes = "".join(f" Note: {note}" for note in target.notes)
        runtime = f"{target.runtime} {bundle.runtimes.get(target.runtime, '')}".strip()
        lines.append(f"- `{folder}/` ({target.variant}, {runtime}): see its README.md.{notes}")
    return "\n".join(lines)

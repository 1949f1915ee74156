"""certificate.html: the certificate for a person, self-contained. certificate.html.jinja holds the words and their order."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.report import page as report
from flows.report import results
from flows.report.page import Cell, Column, Table, facts_of
from tasks.metrics import METRICS, show
from tasks.variants import RUNTIMES

HERE = Path(__file__).resolve().parent
EXACT = ("accuracy", "accuracy_retention", "mean_kld", "perplexity_ratio", "same_top_token", "size_bytes")
MEASURED = ("ttft_p50_s", "ttft_p95_s", "decode_tokens_per_s", "prefill_tokens_per_s", "peak_rss_bytes", "load_s")


def render(values: Mapping[str, Any]) -> str:
    """The page of a certificate."""
    return report.render(
        HERE / "certificate.html.jinja",
        certificate=values,
        limits=[_limits(device["limits"]) for device in values["devices"]],
        numbers=[_chosen(device, values["variants"]) for device in values["devices"]],
        quality=_quality(values),
        measured=[_measured(device, values["variants"]) for device in values["devices"]],
        misses=[_misses(device["name"], values["variants"]) for device in values["devices"]],
        facts=facts_of(values["licence"], values["software"], values["lineage"], values["inputs"]),
        files=[(name, f"{file['size']:,} bytes, sha256 {file['sha256']}") for name, file in values["files"].items()],
    )


def _limits(limits: Mapping[str, Any]) -> str:
    memory = f"{limits['memory_mb']:,} MB of memory" if limits["memory_mb"] else "no limit of memory"
    threads = f"{limits['threads']} thread{'s' * (limits['threads'] > 1)}" if limits["threads"] else "all cores"
    named = [RUNTIMES[name].label if name in RUNTIMES else name for name in limits["runtimes"] or ()]
    runtimes = f", {' and '.join(named)} alone" if named else ""
    return f"{memory}, {threads}, {limits['context']:,} tokens{runtimes}"


def _chosen(device: Mapping[str, Any], variants: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a device's variant that a reader looks for first."""
    if device["variant"] is None:
        return []
    variant = variants[device["variant"]]
    numbers = {**variant["metrics"], **variant["devices"][device["name"]]["measurements"]}
    names = ("accuracy_retention", "size_bytes", "decode_tokens_per_s", "ttft_p95_s", "peak_rss_bytes")
    return [(METRICS[name].label, show(name, numbers[name])) for name in names if name in numbers]


def _quality(values: Mapping[str, Any]) -> Table:
    variants = values["variants"]
    columns = [Column(name) for name in variants]
    rows = []
    for name in EXACT:
        if any(name in variant["metrics"] for variant in variants.values()):
            rows.append((METRICS[name].label, [Cell(show(name, v["metrics"].get(name))) for v in variants.values()]))
        if any(f"{name}_interval" in variant["metrics"] for variant in variants.values()):
            rows.append(("95 % interval of it", [Cell(_interval(name, v["metrics"])) for v in variants.values()]))
    return Table("On the file that ships, in its own runtime; the same on every machine", columns, rows)


def _interval(name: str, metrics: Mapping[str, Any]) -> str:
    spread = metrics.get(f"{name}_interval")
    return f"{show(name, spread[0])} to {show(name, spread[1])}" if spread else "-"


def _measured(device: Mapping[str, Any], variants: Mapping[str, Any]) -> Table:
    there = {name: variant["devices"][device["name"]] for name, variant in variants.items()}
    columns = [Column(name, each["verdict"]["verdict"], name == device["variant"]) for name, each in there.items()]
    rows = [
        (METRICS[name].label, [Cell(show(name, each["measurements"].get(name))) for each in there.values()])
        for name in MEASURED
        if any(name in each["measurements"] for each in there.values())
    ]
    return Table(f"{device['label']}: within {_limits(device['limits'])}", columns, rows)


def _misses(device: str, variants: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """What did not hold of each variant on a device."""
    found = [(name, results.misses(variant["devices"][device]["verdict"])) for name, variant in variants.items()]
    return [(name, why) for name, why in found if why]

"""report.html: one run on one page, self-contained. Reads what the stages wrote and computes nothing new."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from flows.report import charts, results
from flows.report.charts import Mark
from flows.report.style import CSS
from tasks.errors import ArtifactError
from tasks.metrics import METRICS, megabytes, percent, show
from tasks.package.bundle import Bundle, bundle_digest, load
from tasks.params import Params

TILES = ("accuracy", "accuracy_retention", "size_bytes", "size_ratio", "ttft_p50_s", "decode_tokens_per_s")
MODELS = ("base", "teacher", "pruned", "control", "distilled")
BASE = "teacher F16"
KEY = "<p class=key>Filled: passed. Hollow: failed. Dashed: undecided. Ringed: chosen.</p>"


def write_report(
    package_folder: Path,
    student_folder: Path,
    out_html: Path,
    *,
    finetune_folder: Path | None = None,
    params: Params | None = None,
) -> None:
    """Write the page. Without `finetune_folder` the folder beside `student_folder` is looked at.

    Raises:
        ArtifactError: a file that the page rests on is missing or damaged.
    """
    bundle, report = load(package_folder), _json(package_folder / "report.json")
    models = _json(student_folder / "models.json")
    variants: Mapping[str, Any] = report["variants"]
    quality = _figures(_quality_plots(bundle, variants))
    body = [
        _headline(bundle, report),
        _section("Verdicts", _verdicts(variants)),
        _section("What next", _next(bundle, bundle_digest(package_folder))),
        _section("Size against quality", quality + KEY if quality else ""),
        _section("Latency", _figures(_latency_plots(bundle, variants))),
        _section("Variants", _variant_table(bundle, variants)),
        _section("Models", _model_table(models)),
        _section("Students", _students(student_folder / "students.json")),
        _section("Accuracy of each class", _class_table(models, variants)),
        _section("Training", _figures(_curves(_histories(student_folder, finetune_folder)))),
        _section("What it is made from", _lineage(bundle, bundle_digest(package_folder))),
        _section("Parameters", _parameters(params)) if params else "",
    ]
    page = PAGE.format(title=escape(bundle.name), style=CSS, body="\n".join(filter(None, body)))
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(page, encoding="utf-8")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): run that stage again, or `dvc pull`") from None


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by dotted path. Left out: the yardstick's own numbers and those of single classes."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in ("reference", "per_group"):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found[prefix + key] = value
    return found


def _chip(verdict: str) -> str:
    return f'<span class="chip {escape(verdict)}">{escape(verdict)}</span>'


def _headline(bundle: Bundle, report: Mapping[str, Any]) -> str:
    reason = f"<p class=reason>{escape(report['reason'])}</p>"
    if bundle.chosen is None:
        return f"<header><p class=kicker>{escape(bundle.name)}</p><h1>Nothing passed its gates</h1>{reason}</header>"
    chosen = report["variants"][bundle.chosen]
    numbers = _flat(chosen["metrics"]) | _flat(chosen["measurements"])
    tiles = [(METRICS[name].label, METRICS[name].show(numbers[name])) for name in TILES if name in numbers]
    if bundle.minimum_ram_bytes:
        tiles.append(("Memory needed", megabytes(bundle.minimum_ram_bytes)))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return (
        f"<header><p class=kicker>{escape(bundle.name)}</p>"
        f"<h1>{escape(bundle.chosen)} {_chip(bundle.evaluation[bundle.chosen].verdict)}</h1>{reason}"
        f"<dl class=tiles>{cells}</dl></header>"
    )


def _table(caption: str, head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """`head` and cells are HTML, row names are text."""
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    lines = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f"<div class=scroll tabindex=0><table><caption>{escape(caption)}</caption>"
        f"<thead><tr><td></td>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _variant_table(bundle: Bundle, variants: Mapping[str, Any]) -> str:
    head = [
        f'<span class="{"chosen" if name == bundle.chosen else ""}">{escape(name)}</span><br>{_chip(v["verdict"]["verdict"])}'
        for name, v in variants.items()
    ]
    tables = []
    for caption, key, measured in (
        ("On the packaged file, the same on every machine", "metrics", False),
        ("Measured on the machine of this run", "measurements", True),
    ):
        numbers = {name: _flat(v[key]) for name, v in variants.items()}
        known = {name: metric.label for name, metric in METRICS.items() if metric.measured == measured}
        others = sorted({other for each in numbers.values() for other in each} - set(known))
        rows = [
            (label, [escape(show(name, each.get(name))) for each in numbers.values()])
            for name, label in {**known, **dict(zip(others, others, strict=True))}.items()
            if any(name in each for each in numbers.values())
        ]
        tables.append(_table(caption, head, rows))
    return "".join(tables)


def _verdicts(variants: Mapping[str, Any]) -> str:
    lines = []
    for name, variant in variants.items():
        told = results.told(variant["verdict"]) or "every gate held"
        lines.append(f"<li><b>{escape(name)}</b> {_chip(variant['verdict']['verdict'])} {escape(told)}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _next(bundle: Bundle, digest: str) -> str:
    if bundle.chosen is None:
        return (
            "<p>There is nothing to approve. Look above at what did not hold, change the recipe or the gates in "
            "<code>params.yaml</code>, and run again: what is unchanged is not done twice.</p>"
        )
    name = escape(bundle.name)
    return (
        f"<p>The bundle <code>{digest[:12]}</code> is a version of <b>{name}</b> when it is registered (<code>slmops run</code> "
        "does that, or <code>slmops register</code>), and the champion when it is approved:</p><ul>"
        "<li>in Prefect, where the run was started there: open the run, <b>Resume</b>, and decide</li>"
        f"<li>on the command line: <code>slmops history</code> tells the version, then <code>slmops approve VERSION "
        '--by "Your Name" --reason "..."</code>, or <code>slmops reject</code> likewise</li>'
        "<li>to take it back: <code>slmops rollback</code></li></ul>"
    )


def _mark(bundle: Bundle, name: str, variant: Mapping[str, Any]) -> Mark:
    return Mark(name, variant["verdict"]["verdict"], name == bundle.chosen)


Plots = dict[str, tuple[str, str]]  # key -> title and chart


def plots(package_folder: Path, student_folder: Path) -> Plots:
    """The plots of the page, each a file of its own, for pages that are not ours.

    Raises:
        ArtifactError: a file that they rest on is missing or damaged.
    """
    bundle, variants = load(package_folder), _json(package_folder / "report.json")["variants"]
    found = _quality_plots(bundle, variants) | _latency_plots(bundle, variants) | _curves(_histories(student_folder))
    return {key: (title, charts.standalone(svg, CSS)) for key, (title, svg) in found.items()}


def _quality_plots(bundle: Bundle, variants: Mapping[str, Any]) -> Plots:
    charted = {}
    for key, name, heading, zero in (
        ("size-accuracy", "accuracy_retention", "accuracy, share of the teacher's", False),
        ("size-kld", "mean_kld", "mean KLD from F16, nats", True),
    ):
        numbers = {each: _flat(v["metrics"]) for each, v in variants.items()}
        points = [
            (_mark(bundle, each, variants[each]), found["size_ratio"], found[name])
            for each, found in numbers.items()
            if name in found and "size_ratio" in found
        ]
        gates = {c["limit"] for v in variants.values() for c in v["verdict"]["checks"] if c["name"] == name}
        limit = gates.pop() if len(gates) == 1 else None
        if points:
            names = ("size, share of the teacher's F16", heading)
            title = f"{heading[0].upper()}{heading[1:]}, against size"
            charted[key] = title, charts.scatter(title, points, names, limit=limit, zero=zero)
    return charted


def _latency_plots(bundle: Bundle, variants: Mapping[str, Any]) -> Plots:
    measured = [(_mark(bundle, name, v), _flat(v["measurements"])) for name, v in variants.items()]
    yardsticks = [v["measurements"].get("reference") for v in variants.values()]
    base = next((_flat(each) for each in yardsticks if each), None)
    if base:
        measured.append((Mark(BASE, "base"), base))
    percentiles = ("ttft_p50_s", "ttft_p95_s", "ttft_p99_s")
    first = [
        (mark, [found[p] * 1e3 for p in percentiles]) for mark, found in measured if set(percentiles) <= set(found)
    ]
    decode = [(mark, found["decode_tokens_per_s"]) for mark, found in measured if "decode_tokens_per_s" in found]
    charted = {}
    if first:
        title = "Time to first token: p50 / p95 / p99"
        charted["first-token"] = title, charts.spans(title, first, "ms")
    if decode:
        charted["decode-speed"] = "Decoding speed", charts.bars("Decoding speed", decode, "tokens/s")
    return charted


def _figures(charted: Plots) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in charted.values()
    )
    return f"<div class=charts>{figures}</div>" if charted else ""


def _model_table(models: Mapping[str, Any]) -> str:
    known = {name: models[name] for name in MODELS if models.get(name)}
    rows = [
        (
            name,
            [
                percent(model["accuracy"]) if model.get("accuracy") is not None else "-",
                f"{model['parameters'] / 1e6:,.1f} M" if model.get("parameters") else "-",
                str(model.get("layers", "-")),
                f"{model['rows']:,}" if model.get("rows") else "-",
            ],
        )
        for name, model in known.items()
    ]
    caption = "Before quantization, greedy answers to the test rows"
    return _table(caption, ["accuracy", "parameters", "layers", "test rows"], rows) if rows else ""


def _students(path: Path) -> str:
    """The students of several seeds, and how far they are apart; nothing where there is one."""
    found = _json(path) if path.is_file() else []
    if len(found) < 2:
        return ""
    rows = [
        (
            f"seed {each['seed']}",
            [f"{each['validation_loss']:.4f}", percent(each["accuracy"]), "yes" if each["chosen"] else ""],
        )
        for each in found
    ]
    accuracies = [each["accuracy"] for each in found]
    mean, spread = statistics.fmean(accuracies), statistics.stdev(accuracies)
    text = (
        f"<p>They differ in which training rows they saw, and in what order: {percent(mean)} on average, with a standard deviation of "
        f"{100 * spread:.1f} points. The least validation loss decides which one goes on; the test rows have no part in it.</p>"
    )
    return text + _table("One student a seed", ["validation loss", "accuracy on the test rows", "goes on"], rows)


def _class_table(models: Mapping[str, Any], variants: Mapping[str, Any]) -> str:
    columns = {name: models[name].get("per_group") for name in MODELS if models.get(name)}
    columns |= {name: v["metrics"].get("per_group") for name, v in variants.items()}
    groups = {name: column for name, column in columns.items() if column}
    names = sorted({group for column in groups.values() for group in column})
    rows = [(group, [_shade(column.get(group)) for column in groups.values()]) for group in names]
    return _table("Right answers in percent; a stronger shade is better", map(escape, groups), rows) if rows else ""


def _shade(value: float | None) -> str:
    if value is None:
        return "<td>-</td>"
    return f'<td class=shade style="--v:{value:.2f}">{value * 100:.0f}</td>'


def _histories(student_folder: Path, finetune_folder: Path | None = None) -> dict[str, Any]:
    tuned = (finetune_folder or student_folder.with_name("finetune")) / "history.json"
    return {
        "Fine-tuning the teacher": _json(tuned) if tuned.is_file() else [],
        "Distilling the student": _json(student_folder / "history.json"),
    }


def _curves(histories: Mapping[str, list[Mapping[str, float]]]) -> Plots:
    charted = {}
    for title, history in histories.items():
        series = {
            heading: [(float(e["step"]), float(e[key])) for e in history if isinstance(e.get(key), (int, float))]
            for key, heading in (("loss", "training"), ("validation_loss", "validation"))
        }
        series = {name: line for name, line in series.items() if line}
        if series:
            charted[title.split()[0].lower()] = title, charts.lines(title, series, ("step", "loss"))
    return charted


def _lineage(bundle: Bundle, digest: str) -> str:
    facts = [("bundle digest", digest), ("licence of the model", bundle.licence.model)]
    facts += [("licence of the data", bundle.licence.data)]
    facts += [(f"runtime {name}", version) for name, version in bundle.runtimes.items()]
    for part, value in bundle.lineage.items():
        facts += [(f"{part}.{key}", text) for key, text in _facts(value)]
    facts += [(f"input {role}", value) for role, value in bundle.created_from.items()]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f"<dl class=facts>{rows}</dl>"


def _facts(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return [(prefix, str(value))]
    return [pair for key, item in value.items() for pair in _facts(item, f"{prefix}.{key}" if prefix else str(key))]


def _parameters(params: Params) -> str:
    import yaml

    text = yaml.safe_dump(params.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
    return f"<details><summary>params.yaml with every default written out</summary><pre>{escape(text)}</pre></details>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: report</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

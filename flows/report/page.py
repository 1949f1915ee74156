"""report.html: one run on one page, self-contained. Reads what the stages wrote and computes nothing new.

This module finds what differs from run to run, as a `Page`. report.html.jinja holds the words and their order,
parts.html.jinja the parts that it repeats, report.css the style. Jinja2 escapes every text; only charts are markup.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flows.report import charts, results
from flows.report.charts import Mark
from tasks.errors import ArtifactError
from tasks.metrics import METRICS, megabytes, percent, show
from tasks.package.bundle import Bundle, bundle_digest, load
from tasks.params import Params

HERE = Path(__file__).resolve().parent
TILES = ("accuracy", "accuracy_retention", "size_bytes", "size_ratio", "ttft_p50_s", "decode_tokens_per_s")
MODELS = ("base", "teacher", "pruned", "control", "distilled")
BASE = "teacher F16"
ORDER = {"pass": 0, "undecided": 1}  # of verdicts, before all others


@dataclass(frozen=True)
class Verdict:
    """A verdict says how one variant was judged. `told` says why."""

    name: str
    verdict: str
    told: str = ""


@dataclass(frozen=True)
class Column:
    """A column has a name. The column of a variant has its verdict too."""

    name: str
    verdict: str | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell shows one value as text. `shade` says how strong its colour is, from 0 to 1; None means no colour."""

    text: str
    shade: str | None = None


@dataclass(frozen=True)
class Table:
    """A table has a caption, columns, and rows by name."""

    caption: str
    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Students:
    """This compares the students of several seeds. `mean` and `spread` describe their accuracy."""

    mean: str
    spread: str
    table: Table


@dataclass(frozen=True)
class Figure:
    """A figure is a chart with its title. Its SVG is the only markup that Python hands to the template."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Page:
    """A page holds what the template shows of a run. The template leaves out a part that is empty or None."""

    name: str
    digest: str
    reason: str
    chosen: Verdict | None
    tiles: list[tuple[str, str]]
    verdicts: list[Verdict]
    devices: list[Verdict]
    quality: list[Figure]
    latency: list[Figure]
    variants: list[Table]
    models: Table | None
    students: Students | None
    classes: Table | None
    training: list[Figure]
    facts: list[tuple[str, str]]
    parameters: str | None


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
    page = _page(package_folder, student_folder, finetune_folder, params)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(render(HERE / "report.html.jinja", page=page), encoding="utf-8")


def render(template: Path, **values: Any) -> str:
    """A template as HTML; it may include the parts and the style that lie here. A name that it misspells raises an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader([template.parent, HERE]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    html: str = templates.get_template(template.name).render(**values)
    return html


def _page(package_folder: Path, student_folder: Path, finetune_folder: Path | None, params: Params | None) -> Page:
    bundle, report = load(package_folder), _report(package_folder)
    models = _json(student_folder / "models.json")
    variants: Mapping[str, Any] = report["variants"]
    digest = bundle_digest(package_folder)
    return Page(
        name=bundle.name,
        digest=digest,
        reason=report["reason"],
        chosen=_chosen(bundle),
        tiles=_tiles(bundle, variants),
        verdicts=_verdicts(bundle, variants),
        devices=_devices(report),
        quality=_figures(_quality_plots(bundle, variants)),
        latency=_figures(_latency_plots(bundle, variants)),
        variants=_variant_tables(bundle, variants),
        models=_model_table(models),
        students=_students(student_folder / "students.json"),
        classes=_class_table(models, variants),
        training=_figures(_curves(_histories(student_folder, finetune_folder))),
        facts=_facts(bundle, digest),
        parameters=_parameters(params) if params else None,
    )


def _report(package_folder: Path) -> Any:
    """report.json, with the verdict and the measurements of each variant on the device on which it does best."""
    report = _json(package_folder / "report.json")
    variants = {name: {**each, **each["devices"][each["device"]]} for name, each in report["variants"].items()}
    return {**report, "variants": variants}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): run that stage again, or `dvc pull`") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by dotted path. Left out: the yardstick's own numbers and those of single classes."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in ("reference", "per_group"):
            numbers |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            numbers[prefix + key] = value
    return numbers


def _chosen(bundle: Bundle) -> Verdict | None:
    return Verdict(bundle.chosen, bundle.evaluation[bundle.chosen].verdict) if bundle.chosen is not None else None


def _tiles(bundle: Bundle, variants: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tiles show the numbers of the chosen variant that a reader looks for first."""
    if bundle.chosen is None:
        return []
    chosen = variants[bundle.chosen]
    numbers = _flat(chosen["metrics"]) | _flat(chosen["measurements"])
    tiles = [(METRICS[name].label, METRICS[name].show(numbers[name])) for name in TILES if name in numbers]
    if bundle.minimum_ram_bytes:
        tiles.append(("Memory needed, full context", megabytes(bundle.minimum_ram_bytes)))
    return tiles


def _verdicts(bundle: Bundle, variants: Mapping[str, Any]) -> list[Verdict]:
    """What ships first, then by verdict."""
    verdicts = {name: variant["verdict"]["verdict"] for name, variant in variants.items()}
    order = sorted(verdicts, key=lambda name: (name != bundle.chosen, ORDER.get(verdicts[name], 2)))
    return [Verdict(name, verdicts[name], _told(variants[name])) for name in order]


def _told(variant: Mapping[str, Any]) -> str:
    devices = {name: each["verdict"] for name, each in variant["devices"].items()}
    misses = results.misses_by_device(devices)
    if variant["verdict"]["verdict"] != "pass":
        return misses
    where = results.summary(devices)
    held = ": ".join(filter(None, ["every gate held", results.narrowest(variant["verdict"])]))
    return "; ".join(filter(None, [held if where == "pass" else f"{where}, {held}", misses]))


def _devices(report: Mapping[str, Any]) -> list[Verdict]:
    """What is best for each kind of device, where there are several."""
    if len(report["devices"]) < 2:
        return []
    labels = {
        name: each["verdict"]["device"]["label"]
        for variant in report["variants"].values()
        for name, each in variant["devices"].items()
    }
    return [
        Verdict(
            f"{labels[name]}: {best['variant'] or 'nothing'}", "pass" if best["variant"] else "fail", best["reason"]
        )
        for name, best in report["devices"].items()
    ]


def _variant_tables(bundle: Bundle, variants: Mapping[str, Any]) -> list[Table]:
    columns = [Column(name, v["verdict"]["verdict"], name == bundle.chosen) for name, v in variants.items()]
    exact = [_flat(v["metrics"]) for v in variants.values()]
    measured = [_flat(v["measurements"]) for v in variants.values()]
    return [
        Table("On the packaged file, the same on every machine", columns, _numbers(exact, measured=False)),
        Table("Measured on the machine of this run", columns, _numbers(measured, measured=True)),
    ]


def _numbers(columns: list[dict[str, float]], *, measured: bool) -> list[tuple[str, list[Cell]]]:
    """Each number that a column has gets a row: first those of the table of metrics, then those that it does not know."""
    names = {name for column in columns for name in column}
    labels = {name: metric.label for name, metric in METRICS.items() if metric.measured == measured}
    labels |= {name: name for name in sorted(names - set(labels))}
    return [
        (label, [Cell(show(name, column.get(name))) for column in columns])
        for name, label in labels.items()
        if name in names
    ]


def _mark(bundle: Bundle, name: str, variant: Mapping[str, Any]) -> Mark:
    return Mark(name, variant["verdict"]["verdict"], name == bundle.chosen)


Plots = dict[str, tuple[str, str]]  # key -> title and chart


def plots(package_folder: Path, student_folder: Path) -> Plots:
    """The plots of the page, each a file of its own, for pages that are not ours.

    Raises:
        ArtifactError: a file that they rest on is missing or damaged.
    """
    bundle, variants = load(package_folder), _report(package_folder)["variants"]
    css = (HERE / "report.css").read_text(encoding="utf-8")
    charted = _quality_plots(bundle, variants) | _latency_plots(bundle, variants) | _curves(_histories(student_folder))
    return {key: (title, charts.standalone(svg, css)) for key, (title, svg) in charted.items()}


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


def _figures(charted: Plots) -> list[Figure]:
    """Charts become markup here and nowhere else: `charts` escapes each text in them."""
    return [Figure(title, Markup(svg)) for title, svg in charted.values()]


def _model_table(models: Mapping[str, Any]) -> Table | None:
    rows = [(name, _model(models[name])) for name in MODELS if models.get(name)]
    columns = [Column(name) for name in ("accuracy", "parameters", "layers", "test rows")]
    return Table("Before quantization, greedy answers to the test rows", columns, rows) if rows else None


def _model(model: Mapping[str, Any]) -> list[Cell]:
    return [
        Cell(percent(model["accuracy"]) if model.get("accuracy") is not None else "-"),
        Cell(f"{model['parameters'] / 1e6:,.1f} M" if model.get("parameters") else "-"),
        Cell(str(model.get("layers", "-"))),
        Cell(f"{model['rows']:,}" if model.get("rows") else "-"),
    ]


def _students(path: Path) -> Students | None:
    """The students of several seeds, and how far they are apart; nothing where there is one."""
    students = _json(path) if path.is_file() else []
    if len(students) < 2:
        return None
    columns = [Column(name) for name in ("validation loss", "accuracy on the test rows", "goes on")]
    rows = [(f"seed {each['seed']}", _student(each)) for each in students]
    accuracies = [each["accuracy"] for each in students]
    return Students(
        mean=percent(statistics.fmean(accuracies)),
        spread=f"{100 * statistics.stdev(accuracies):.1f}",
        table=Table("One student a seed", columns, rows),
    )


def _student(student: Mapping[str, Any]) -> list[Cell]:
    return [
        Cell(f"{student['validation_loss']:.4f}"),
        Cell(percent(student["accuracy"])),
        Cell("yes" if student["chosen"] else ""),
    ]


def _class_table(models: Mapping[str, Any], variants: Mapping[str, Any]) -> Table | None:
    columns_by_name = {name: models[name].get("per_group") for name in MODELS if models.get(name)}
    columns_by_name |= {name: v["metrics"].get("per_group") for name, v in variants.items()}
    groups = {name: column for name, column in columns_by_name.items() if column}
    names = sorted({group for column in groups.values() for group in column})
    rows = [(name, [_shaded(column.get(name)) for column in groups.values()]) for name in names]
    columns = [Column(name) for name in groups]
    return Table("Right answers in percent; a stronger shade is better", columns, rows) if rows else None


def _shaded(value: float | None) -> Cell:
    return Cell("-") if value is None else Cell(f"{value * 100:.0f}", shade=f"{value:.2f}")


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
        if any(len(line) > 1 for line in series.values()):
            charted[title.split()[0].lower()] = title, charts.lines(title, series, ("step", "loss"))
    return charted


def _facts(bundle: Bundle, digest: str) -> list[tuple[str, str]]:
    """The facts say what the bundle is made from."""
    licence = bundle.licence
    return [
        ("bundle digest", digest),
        *facts_of(licence.model_dump(), bundle.runtimes, bundle.lineage, bundle.created_from),
    ]


def facts_of(
    licence: Mapping[str, str], software: Mapping[str, str], lineage: Mapping[str, Any], inputs: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Each fact of a bundle's origin, with its name."""
    facts = [(f"licence of the {part}", name) for part, name in licence.items()]
    facts += [(f"version of {name}", version) for name, version in software.items()]
    for part, value in lineage.items():
        facts += [(f"{part}.{key}", text) for key, text in _texts(value)]
    return facts + [(f"input {role}, sha256 of its manifest", value) for role, value in inputs.items()]


def _texts(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """The values of a nested mapping become text, by dotted path."""
    if not isinstance(value, Mapping):
        return [(prefix, str(value))]
    return [pair for key, item in value.items() for pair in _texts(item, f"{prefix}.{key}" if prefix else str(key))]


def _parameters(params: Params) -> str:
    import yaml

    return yaml.safe_dump(params.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)

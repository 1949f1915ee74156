"""report.html: one page that holds every number, loads nothing and takes no text for markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_inputs import HOSTILE, SIZES, sample

from flows.report import charts
from flows.report.page import HERE, plots, write_report
from tasks import metrics, params
from tasks.errors import ArtifactError
from tasks.package import bundle


class Page(HTMLParser):
    """Tags, attributes and visible text of the page, checked for balance."""

    VOID = ("meta", "line", "circle", "rect", "polyline", "br")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.seen, self.text, self.links = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def written(root: Path, **changes) -> tuple[str, Page]:
    package, student = sample(root, **changes)
    write_report(package, student, root / "out" / "report.html")
    html = (root / "out" / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_it_is_one_page_that_loads_nothing(tmp_path: Path):
    html, page = written(tmp_path)
    assert page.links == []
    assert not re.search(r"https?://|url\(|@import", html)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.seen)


def test_texts_are_never_markup(tmp_path: Path):
    html, page = written(tmp_path, name='a"><b>x')
    assert HOSTILE not in html
    assert HOSTILE in "".join(page.text)


def hostile(where: str) -> str:
    return f'"><script>{where}</script>'


def spoil_package(package: Path) -> None:
    """Put hostile text wherever a package may hold text."""
    report = json.loads((package / "report.json").read_text())
    spoilt = report["variants"].pop("q4_0")
    judged = spoilt["devices"]["desktop"]["verdict"]
    judged["verdict"] = hostile("verdict")
    judged["checks"][0] |= {"name": hostile("check"), "direction": hostile("direction")}
    spoilt["metrics"][hostile("metric")] = 7
    spoilt["metrics"]["per_group"][hostile("class")] = 0.5
    report |= {"reason": hostile("reason"), "variants": {hostile("variant"): spoilt} | report["variants"]}
    (package / "report.json").write_text(json.dumps(report))
    whole = bundle.load(package)
    evaluation = whole.evaluation["q4_k_m"].model_copy(update={"verdict": hostile("chosen verdict")})
    changes = {
        "runtimes": {hostile("runtime"): hostile("version")},
        "licence": bundle.Licence(model=hostile("model licence"), data=hostile("data licence")),
        "lineage": {hostile("part"): {hostile("key"): hostile("fact")}},
        "created_from": {hostile("role"): hostile("digest")},
        "evaluation": whole.evaluation | {"q4_k_m": evaluation},
    }
    bundle.write(package, whole.model_copy(update=changes))


def spoil_students(student: Path) -> None:
    models = json.loads((student / "models.json").read_text())
    models["base"] |= {"layers": hostile("layers"), "per_group": {hostile("class of a model"): 0.5}}
    (student / "models.json").write_text(json.dumps(models))
    seeds = [{"seed": hostile("seed"), "validation_loss": 0.1, "accuracy": 0.9, "chosen": True}] * 2
    (student / "students.json").write_text(json.dumps(seeds))


def test_hostile_text_is_escaped_wherever_it_comes_from(tmp_path: Path, tiny_params: dict):
    package, student = sample(tmp_path / "run", name=hostile("name"))
    spoil_package(package)
    spoil_students(student)
    tiny_params["acquire"]["model"]["licence"] = hostile("params")
    write_report(package, student, tmp_path / "r.html", params=params.check(tiny_params, "test"))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "script" not in page.seen
    files = "".join(path.read_text() for folder in (package, student) for path in folder.glob("*.json"))
    places = {"params", *re.findall(r"<script>([a-z ]+)</script>", files)}
    assert len(places) == 22
    text = "".join(page.text)
    assert {each for each in places if hostile(each) not in text} == set()


def test_hostile_text_is_escaped_in_a_plot(tmp_path: Path):
    package, student = sample(tmp_path)
    spoil_package(package)
    for _, svg in plots(package, student).values():
        assert {each.tag.partition("}")[2] for each in ElementTree.fromstring(svg).iter()}.isdisjoint({"script"})


def test_page_and_plots_have_the_style_sheet_unchanged(tmp_path: Path):
    """Jinja2 reads the style sheet as a template, so what opens a tag of Jinja2 in it would be lost from the page."""
    html, _ = written(tmp_path / "page")
    css = (HERE / "report.css").read_text(encoding="utf-8")
    assert css in html
    assert all(css in svg for _, svg in plots(*sample(tmp_path / "plots")).values())


def test_importing_the_page_does_not_import_the_template_engine():
    code = "import flows.report.page, sys; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_every_variant_metric_and_model_is_told(tmp_path: Path):
    _, page = written(tmp_path)
    text = " ".join(page.text)
    for name in SIZES:
        assert text.count(name) >= 5  # two tables, two plots and a column of the classes
    assert page.seen.count("svg") == 6
    for wanted in (
        "q4_k_m",
        "84.0 MB",
        "97.6 %",
        "teacher F16",
        "light_on",
        "113.0 M",
        "21.5 %",
        "Tokens scored",
        "unheard_of",
        "343.0 MB",
    ):
        assert wanted in text, wanted
    assert "accuracy_retention is 96.4 %, 95 % interval 92.4 % to 99.4 %, wanted at least 96.0 %" in text
    assert "cd" * 32 in text


def test_each_chart_says_what_it_is_to_a_reader_of_screens(tmp_path: Path):
    html, _ = written(tmp_path)
    assert re.findall(r"<svg(?! role=\"img\" aria-label=\"[^\"]+\")", html) == []


def test_each_plot_is_a_picture_of_its_own(tmp_path: Path):
    package, student = sample(tmp_path)
    found = plots(package, student)
    assert list(found) == ["size-accuracy", "size-kld", "first-token", "decode-speed", "fine-tuning", "distilling"]
    for title, svg in found.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert (int(root.get("width", "")), root.get("aria-label")) == (920, title)
        assert "--card" in svg


def test_nothing_chosen_is_told_with_the_reason(tmp_path: Path):
    _, page = written(tmp_path, chosen=None)
    assert "Nothing passed its gates" in page.text


def test_parameters_are_shown_when_given(tmp_path: Path, tiny_params: dict):
    package, student = sample(tmp_path / "run")
    tiny_params["finetune"]["seed"] = 4711
    write_report(package, student, tmp_path / "r.html", params=params.check(tiny_params, "test"))
    assert "seed: 4711" in (tmp_path / "r.html").read_text()


def test_numbers_that_are_missing_leave_gaps_not_errors(tmp_path: Path):
    package, student = sample(tmp_path)
    report = json.loads((package / "report.json").read_text())
    for each in report["variants"].values():
        each["metrics"] = {"accuracy": None}
        each["devices"]["desktop"]["measurements"] = {}
        each["devices"]["desktop"]["verdict"]["checks"] = [
            {"name": "mean_kld", "value": None, "limit": 0.2, "direction": "at_most", "ok": False}
        ]
    (package / "report.json").write_text(json.dumps(report))
    (student / "history.json").write_text("[]")
    (student.parent / "finetune" / "history.json").write_text("[]")
    write_report(package, student, tmp_path / "r.html")
    assert "mean_kld is missing, wanted at most 0.2" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("name", ["report.json", "bundle.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str):
    package, student = sample(tmp_path)
    (package / name).write_text("{")
    with pytest.raises(ArtifactError, match=name):
        write_report(package, student, tmp_path / "r.html")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.27, 0.44), (3, 3), (-2, 5), (0, 1e9), (1e-6, 3e-6)])
def test_ticks_are_few_and_inside(low: float, high: float):
    found = charts.ticks(low, high)
    assert len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 * max(1, high) for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (1234567.8, "1,234,568"),
        (2, "2"),
        (0.0234, "0.0234"),
        (12.34, "12.3"),
        (float("nan"), "-"),
    ],
)
def test_numbers_are_short(value: float, text: str):
    assert metrics.number(value) == text


def test_students_of_several_seeds_are_told_with_their_spread(tmp_path: Path) -> None:
    assert "One student a seed" not in "".join(written(tmp_path / "one")[1].text)
    package, student = sample(tmp_path / "three")
    students = [
        {"seed": seed, "validation_loss": loss, "accuracy": right, "chosen": seed == 2}
        for seed, loss, right in ((1, 0.3, 0.9), (2, 0.1, 0.7), (3, 0.2, 0.8))
    ]
    (student / "students.json").write_text(json.dumps(students))
    write_report(package, student, tmp_path / "r.html")
    text = " ".join(" ".join(Page((tmp_path / "r.html").read_text()).text).split())
    assert "80.0 % on average, with a standard deviation of 10.0 points" in text
    assert "seed 2 0.1000 70.0 % yes" in text

"""Verdicts: directions, missing numbers, and what few test rows cannot decide."""

import json
import math
import shutil
from pathlib import Path

import pytest
from checkout import DEFAULTS, PROFILES
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from flows.report import results
from tasks import params, profiles
from tasks.errors import ArtifactError, ConfigError
from tasks.judge import gates
from tasks.judge.stage import judge
from tasks.stages import STAGES
from tasks.validate.params import Gate, Validate


def judged(values: dict, *rules: Gate, spread: dict | None = None, half: float = 0.03) -> dict:
    return gates.judge(Validate(gates=(), max_half_width=half), rules, values, spread or {})


@pytest.mark.parametrize(
    ("value", "rule", "verdict"),
    [
        (1.0, {"at_least": 1.0}, "pass"),
        (0.99, {"at_least": 1.0}, "fail"),
        (1.0, {"at_most": 1.0}, "pass"),
        (1.01, {"at_most": 1.0}, "fail"),
        (math.nan, {"at_least": 0.0}, "fail"),
        (math.nan, {"at_most": 9.0}, "fail"),
        (math.inf, {"at_least": 0.0}, "fail"),
        (None, {"at_most": 9.0}, "fail"),
    ],
)
def test_a_rule_has_a_direction_and_takes_no_missing_number(value: float | None, rule: dict, verdict: str) -> None:
    made = judged({} if value is None else {"mean_kld": value}, Gate(name="mean_kld", **rule))
    assert made["verdict"] == verdict
    (line,) = made["checks"]
    assert line["ok"] == (verdict == "pass")
    assert line["direction"] in rule
    assert line["limit"] == rule[line["direction"]]
    json.dumps(made, allow_nan=False)


def test_a_wide_interval_around_the_limit_is_undecided() -> None:
    rule = Gate(name="accuracy_retention", at_least=0.95)
    wide, narrow = {"accuracy_retention": (0.90, 1.0)}, {"accuracy_retention": (0.93, 0.97)}
    assert judged({"accuracy_retention": 0.96}, rule, spread=wide)["verdict"] == "undecided"
    assert judged({"accuracy_retention": 0.94}, rule, spread=wide)["verdict"] == "undecided"
    assert judged({"accuracy_retention": 0.96}, rule, spread=narrow)["verdict"] == "pass"
    assert judged({"accuracy_retention": 0.94}, rule, spread=narrow)["verdict"] == "fail"
    assert judged({"accuracy_retention": 0.80}, rule, spread={"accuracy_retention": (0.7, 0.9)})["verdict"] == "fail"


def test_a_failed_rule_outweighs_an_undecided_one() -> None:
    rules = Gate(name="accuracy_retention", at_least=0.95), Gate(name="size_ratio", at_most=0.5)
    values, spread = {"accuracy_retention": 0.96, "size_ratio": 0.6}, {"accuracy_retention": (0.8, 1.1)}
    assert judged(values, *rules, spread=spread)["verdict"] == "fail"
    assert judged(values | {"size_ratio": 0.4}, *rules, spread=spread)["verdict"] == "undecided"


def test_intervals_are_paired() -> None:
    """A model that errs where its teacher errs is as good as it, whatever rows are drawn."""
    teacher = [i % 3 != 0 for i in range(60)]
    assert gates.intervals(teacher, teacher, 500, 1)["accuracy_retention"] == (1.0, 1.0)
    low, high = gates.intervals(teacher[::-1], teacher, 500, 1)["accuracy_retention"]
    assert low < 1.0 < high


def test_intervals_match_the_binomial() -> None:
    """With 400 rows at 80 %, 1.96 standard errors are 0.0392."""
    ours = [i % 5 != 0 for i in range(400)]
    low, high = gates.intervals(ours, [True] * 400, 4000, 3)["accuracy"]
    assert low == pytest.approx(0.8 - 0.0392, abs=0.005)
    assert high == pytest.approx(0.8 + 0.0392, abs=0.005)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(0, 9))
def test_intervals_hold_their_order_and_repeat(rows: list[tuple[bool, bool]], seed: int) -> None:
    ours, teacher = zip(*rows, strict=True)
    first = gates.intervals(ours, teacher, 100, seed)
    low, high = first["accuracy"]
    assert 0 <= low <= high <= 1
    assert str(first) == str(gates.intervals(ours, teacher, 100, seed))
    if not any(teacher):
        assert all(map(math.isnan, first["accuracy_retention"]))


def measured(folder: Path, **numbers: object) -> Path:
    """What `validate` and `measure` leave: 40 rows, of which the file has 30 right and the teacher 32."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"mean_kld": 0.2, "perplexity": None, "per_group": {"lamp": 0.7}}))
    (folder / "measurements.json").write_text(json.dumps({"decode_speedup": 1.5, "ttft_p95_s": 0.2, **numbers}))
    rows = [{"reference": "a", "answer": "\u2028", "correct": i < 30, "teacher_correct": i < 32} for i in range(40)]
    write_jsonl(folder / "predictions.jsonl", rows)
    return folder


def judge_with(validated: Path, out: Path, *rules: Gate, device: str = "desktop") -> dict:
    whole = params.load(DEFAULTS).only(STAGES["judge"].sections)
    section = whole.validate_.model_copy(update={"gates": rules, "bootstrap": 200})
    out.mkdir()
    judge(
        whole.model_copy(update={"validate_": section}), root=out.parent, validated=validated, measured=validated,
        variant="q4_0", profile=device, out=out,
    )  # fmt: skip
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("verdict", "intervals")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(PROFILES, tmp_path / "profiles")
    return tmp_path


def test_what_was_measured_is_judged_without_the_files(root: Path) -> None:
    validated = measured(root / "validated")
    rules = [Gate(name="mean_kld", at_most=0.25), Gate(name="ttft_p95_s", at_most=0.3)]
    made = judge_with(validated, root / "out", *rules)
    assert made["verdict"]["verdict"] == "pass"
    assert [line["value"] for line in made["verdict"]["checks"]] == [0.2, 0.2]
    low, high = made["intervals"]["accuracy_retention_interval"]
    assert low < 30 / 32 < high
    stricter = judge_with(
        validated, root / "stricter", Gate(name="mean_kld", at_most=0.1), Gate(name="perplexity", at_most=9.0)
    )
    assert stricter["verdict"]["verdict"] == "fail"
    assert [line["value"] for line in stricter["verdict"]["checks"]] == [0.2, None]
    assert stricter["intervals"] == made["intervals"]


PHONE = "label: Phone\nmemory_mb: 300\nthreads: 1\ncontext: 512\nruntimes: null\ngates: [{name: ttft_p95_s, at_most: 0.1}]\n"


def test_a_device_adds_its_gates_and_its_memory(root: Path) -> None:
    (root / "profiles" / "phone.yaml").write_text(PHONE)
    validated = measured(root / "validated", peak_rss_bytes=2.9e8)
    rule = Gate(name="mean_kld", at_most=0.25)
    assert judge_with(validated, root / "desktop", rule)["verdict"]["verdict"] == "pass"
    made = judge_with(validated, root / "phone", rule, device="phone")["verdict"]
    assert made["verdict"] == "fail"
    assert made["device"]["label"] == "Phone"
    assert [(check["name"], check["limit"], check["ok"]) for check in made["checks"]] == [
        ("mean_kld", 0.25, True), ("ttft_p95_s", 0.1, False), ("peak_rss_bytes", 3e8, True),
    ]  # fmt: skip


def test_what_did_not_run_fails_whatever_the_gates(root: Path) -> None:
    validated = measured(root / "validated", ended="the device has no such runtime")
    made = judge_with(validated, root / "out", Gate(name="mean_kld", at_most=0.25))["verdict"]
    assert (made["verdict"], made["ended"]) == ("fail", "the device has no such runtime")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (PHONE.replace("memory_mb: 300", "memory_mb: 0"), "memory_mb"),
        (PHONE.replace("threads: 1", "thread: 1"), "thread"),
        (PHONE.replace("ttft_p95_s", "ttft_p96_s"), "gates.0.name"),
        (PHONE.replace("runtimes: null", "runtimes: [lama]"), "runtimes.0"),
        (PHONE.replace("context: 512\n", ""), "context"),
    ],
)
def test_a_wrong_profile_is_told_by_file_and_key(root: Path, text: str, key: str) -> None:
    (root / "profiles" / "phone.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)phone\.yaml.*\b{key}\b"):
        profiles.load(root, "phone")


def test_a_missing_profile_names_those_that_are_there(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"measure\.profiles.*tablet\.yaml.*desktop"):
        profiles.load(root, "tablet")


def test_another_gate_changes_what_judge_depends_on_and_nothing_that_runs_a_model() -> None:
    before = params.load(DEFAULTS)
    after = params.load(DEFAULTS, ["validate.gates=[{name: mean_kld, at_most: 0.1}]", "validate.bootstrap=300"])
    changed = {name for name, stage in STAGES.items() if before.digest(stage.sections) != after.digest(stage.sections)}
    assert changed == {"judge"}
    again = {name for name, stage in STAGES.items() if changed & set(stage.inputs.values())}
    assert again == {"package"}


def test_damaged_predictions_are_named(root: Path) -> None:
    validated = measured(root / "validated")
    (validated / "predictions.jsonl").write_text('{"correct": true}\n')
    with pytest.raises(ArtifactError, match=r"predictions\.jsonl"):
        judge_with(validated, root / "out", Gate(name="mean_kld", at_most=0.1))


@pytest.mark.parametrize(
    ("student", "rules", "below"),
    [
        (
            0.82,
            [Gate(name="accuracy_retention", at_least=0.95), Gate(name="size_ratio", at_most=0.6)],
            "accuracy_retention",
        ),
        (0.86, [Gate(name="accuracy_retention", at_least=0.95)], ""),
        (0.86, [Gate(name="accuracy", at_least=0.9), Gate(name="mean_kld", at_most=0.1)], "accuracy at least 0.9"),
    ],
)
def test_what_the_student_keeps_is_told_before_its_files_are_made(
    tmp_path: Path, student: float, rules: list[Gate], below: str
) -> None:
    (tmp_path / "build" / "select").mkdir(parents=True)
    models = {"teacher": {"accuracy": 0.877}, "distilled": {"accuracy": student}}
    (tmp_path / "build" / "select" / "models.json").write_text(json.dumps(models))
    told = results.student(tmp_path, rules)
    assert f"{student / 0.877:.1%}" in told
    assert ("not likely" in told) == bool(below)
    assert below in told

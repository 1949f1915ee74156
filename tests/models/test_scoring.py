"""Metrics: one of one's own, taken over by acquire and told about where it fails; when an answer is given up."""

import json
from pathlib import Path

import pytest
from checkout import DEFAULTS
from hypothesis import given
from hypothesis import strategies as st

from tasks import params
from tasks.errors import ConfigError
from tasks.frame import manifest, stage
from tasks.models import scoring
from tasks.models.params import OwnMetric
from tasks.stages import STAGES

NEAR = """import math

def match(answer: str, reference: str) -> bool:
    return math.isclose(float(answer), float(reference), rel_tol=0.1)
"""


def own(folder: Path, text: str, function: str = "match") -> scoring.Metric:
    (folder / scoring.OWN).write_text(text)
    metric = OwnMetric(file=Path("data/near.py"), function=function)
    return scoring.load(metric, folder)


def test_the_function_judges(tmp_path: Path) -> None:
    metric = own(tmp_path, NEAR)
    assert scoring.judged(metric, ["10.5", "12", "-10"], ["10", "10", "10"], "test.jsonl") == [True, False, False]
    assert metric.possible("anything", "10")
    assert [path.name for path in tmp_path.iterdir()] == [scoring.OWN]


@pytest.mark.parametrize(
    ("text", "function", "told"),
    [
        ("import nothing_of_this_name\n", "match", r"data/near\.py line 1: ModuleNotFoundError"),
        ("x = 1\ndef match(a, b):\n  return (\n", "match", r"data/near\.py line 3: SyntaxError"),
        ("raise SystemExit(3)\n", "match", "line 1: SystemExit"),
        (NEAR, "compare", "no function compare"),
        ("match = 3\n", "match", "no function match"),
        ("def match(answer): return True\n", "match", "cannot take"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: str, function: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        own(tmp_path, text, function)


def test_an_error_is_told_with_its_row_and_line(tmp_path: Path) -> None:
    metric = own(tmp_path, NEAR)
    with pytest.raises(ConfigError, match=r"row 2 of test\.jsonl .*data/near\.py line 4: ValueError"):
        scoring.judged(metric, ["1", "one"], ["1", "1"], "test.jsonl")
    vague = own(tmp_path, "def match(answer, reference): return None\n")
    with pytest.raises(ConfigError, match=r"row 1 .*None"):
        scoring.judged(vague, ["1"], ["1"], "test.jsonl")


def test_the_file_lies_where_dvc_sees_it_change() -> None:
    with pytest.raises(ConfigError, match=r"task\.metric\.file"):
        params.load(DEFAULTS, ["task.metric={file: other/near.py}"])
    with pytest.raises(ConfigError, match=r"task\.metric\.fil: .*'file'"):
        params.load(DEFAULTS, ["task.metric={fil: data/near.py}"])


def test_acquire_hands_it_on(tiny_workspace: Path) -> None:
    file = tiny_workspace / "data" / "near.py"
    given = ["task.metric={file: data/near.py, function: same}"]
    checked = params.load(tiny_workspace / "params.yaml", given)
    seen = []
    for text in ("def same(a, b): return a == b\n", "def same(a, b): return a.lower() == b.lower()\n"):
        file.write_text(text)
        made = stage.run(STAGES["acquire"], STAGES, checked, tiny_workspace)
        assert (tiny_workspace / "build" / "acquire" / scoring.OWN).read_text() == text
        seen.append(manifest.digest(tiny_workspace / "build" / "acquire"))
    assert made.files[scoring.OWN]
    assert seen[0] != seen[1]
    file.write_text("def same(a, b): return False\n")
    with pytest.raises(ConfigError, match=r"same of data/near\.py .*test\.jsonl:1\b"):
        stage.run(STAGES["acquire"], STAGES, checked, tiny_workspace)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_no_beginning_of_the_right_json_is_given_up(value: object, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert all(scoring.json_possible(text[:end], text) for end in range(len(text) + 1))


def test_half_a_character_gives_no_answer_up() -> None:
    half = "\u540d".encode()[:2].decode(errors="replace")
    for name in ("text", "json"):
        assert not scoring.hopeless(scoring.METRICS[name], half, "\u540d")
    assert scoring.hopeless(scoring.METRICS["text"], "x" + half, "\u540d")


@pytest.mark.parametrize(
    "beginning", ["Sure", '{"a": 1} and', '{"a": 2}', '{"a": 1,, ', '{"a": x', '{"a": "b"\n"c', "[1"]
)
def test_what_can_no_longer_become_the_json_is_given_up(beginning: str) -> None:
    assert not scoring.json_possible(beginning, '{"a": 1}')

"""What a form may change of what a commit says about release: towards stricter alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import DEFAULTS, commit, git
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.deployed import policy
from tasks import params
from tasks.errors import ConfigError
from tasks.judge import gates as judging
from tasks.validate.params import Gate

RAW = params.read(DEFAULTS)
BASE = params.check(RAW, "test")
NAMES = ("accuracy", "perplexity", "size_ratio")
limits = st.one_of(st.floats(0, 1, width=16), st.sampled_from([math.inf, -math.inf]))
gates = st.builds(
    lambda name, side, limit: Gate.model_validate({"name": name, side: limit}),
    st.sampled_from(NAMES), st.sampled_from(["at_least", "at_most"]), limits,
)  # fmt: skip
releases = st.builds(
    params.Release,
    approval=st.sampled_from(["manual", "auto"]), margin=st.floats(0, 0.9), expires_hours=st.floats(0.001, 100),
    separate_duties=st.booleans(),
)  # fmt: skip


def _with(release: params.Release, wanted: list[Gate], width: float) -> params.Params:
    base = BASE
    validated = base.validate_.model_copy(update={"gates": tuple(wanted), "max_half_width": width})
    return base.model_copy(update={"release": release, "validate_": validated})


busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is slow, not wrong
policies = st.builds(_with, releases, st.lists(gates, max_size=3), st.floats(0.01, 0.5))


def changed(**values: Any) -> params.Params:
    return params.check({**RAW, **{k: {**RAW[k], **v} for k, v in values.items()}}, "test")


@busy
@given(policies)
def test_a_policy_is_as_strict_as_itself(one: params.Params) -> None:
    assert policy.loosened(one, one) == []


@busy
@given(policies, policies, policies)
def test_strictness_is_transitive(one: params.Params, two: params.Params, three: params.Params) -> None:
    if not policy.loosened(one, two) and not policy.loosened(two, three):
        assert policy.loosened(one, three) == []


@busy
@given(policies, policies, st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1, width=16)))
def test_what_passes_the_stricter_gates_passes_the_others(
    said: params.Params, wanted: params.Params, values: dict[str, float]
) -> None:
    if policy.loosened(said, wanted):
        return
    if judging.judge(wanted.validate_, wanted.validate_.gates, values, {})["verdict"] == "pass":
        assert judging.judge(said.validate_, said.validate_.gates, values, {})["verdict"] == "pass"
    assert wanted.release.margin >= said.release.margin
    assert (said.release.approval, wanted.release.approval) != ("manual", "auto")


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("validate", {"gates": []}, "validate.gates"),
        ("validate", {"gates": RAW["validate"]["gates"][1:]}, "validate.gates"),
        ("validate", {"gates": [{**RAW["validate"]["gates"][0], "at_least": 0.94}, *RAW["validate"]["gates"][1:]]}, "validate.gates"),
        ("validate", {"gates": [{"name": "accuracy_retention", "at_least": math.nan}, *RAW["validate"]["gates"][1:]]}, "validate.gates"),
        ("validate", {"gates": [{"name": "accuracy_retention", "at_most": 0.95}, *RAW["validate"]["gates"][1:]]}, "validate.gates"),
        ("validate", {"max_half_width": 0.5}, "validate.max_half_width"),
        ("release", {"approval": "auto"}, "release.approval"),
        ("release", {"expires_hours": 73.0}, "release.expires_hours"),
    ],
)  # fmt: skip
def test_what_is_looser_is_told_by_its_key(section: str, values: dict[str, Any], key: str) -> None:
    found = policy.loosened(changed(), changed(**{section: values}))
    assert found
    assert all(line.startswith(key) for line in found)


def test_what_is_off_may_be_on_and_a_margin_may_grow_but_not_back() -> None:
    loose = changed(release={"approval": "auto"})
    strict = changed(
        release={"approval": "manual", "separate_duties": True, "margin": 0.1, "expires_hours": 1.0},
        validate={"gates": [*RAW["validate"]["gates"], {"name": "accuracy", "at_least": 0.9}], "max_half_width": 0.01},
    )
    assert policy.loosened(loose, strict) == []
    assert len(policy.loosened(strict, loose)) == 6


# --- whose say counts ----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main")
    say(tmp_path, {})
    return tmp_path


def say(root: Path, release: dict[str, Any], **sections: Any) -> str:
    """Commit such parameters."""
    (root / "params.yaml").write_text(yaml.safe_dump({**RAW, "release": {**RAW["release"], **release}, **sections}))
    return commit(root)


def test_an_old_commit_brings_no_old_policy_back(root: Path) -> None:
    old = git(root, "rev-parse", "HEAD")
    policy.check(root, old, changed())
    say(root, {"separate_duties": True})
    with pytest.raises(ConfigError, match=r"release\.separate_duties.*HEAD"):
        policy.check(root, old, changed())
    policy.check(root, old, changed(release={"separate_duties": True}))


def devices(root: Path, memory: int | None, *gates: dict[str, Any]) -> str:
    """Commit such a profile of the device that the parameters name."""
    values = {
        "label": "D",
        "memory_mb": memory,
        "threads": None,
        "context": 512,
        "runtimes": None,
        "gates": list(gates),
    }
    (root / "profiles").mkdir(exist_ok=True)
    (root / "profiles" / "desktop.yaml").write_text(yaml.safe_dump(values))
    return commit(root)


def test_an_old_commit_brings_no_looser_device_back(root: Path) -> None:
    fast, faster = ({"name": "decode_tokens_per_s", "at_least": limit} for limit in (10.0, 20.0))
    old = devices(root, 500, fast)
    policy.check(root, old, changed())
    devices(root, 500, faster)
    with pytest.raises(ConfigError, match=r"profiles/desktop\.yaml.*decode_tokens_per_s.*HEAD"):
        policy.check(root, old, changed())
    devices(root, 400, fast)
    with pytest.raises(ConfigError, match=r"profiles/desktop\.yaml.*memory_mb.*HEAD"):
        policy.check(root, old, changed())
    devices(root, None)
    policy.check(root, old, changed())


def test_a_form_names_no_other_devices(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"measure\.profiles"):
        policy.check(root, "HEAD", changed(measure={"profiles": ["desktop", "easier"]}))


def test_a_newer_commit_speaks_for_itself(root: Path) -> None:
    say(root, {"separate_duties": True})
    git(root, "checkout", "-q", "-b", "other")
    say(root, {"separate_duties": False})
    git(root, "checkout", "-q", "main")
    policy.check(root, "other", changed())


def test_what_a_run_committed_is_not_a_persons_say(root: Path) -> None:
    git(root, "checkout", "-q", "-b", "runs/a")
    (root / "params.yaml").write_text(yaml.safe_dump({**RAW, "validate": {**RAW["validate"], "gates": []}}))
    git(root, "commit", "-qam", "Validate a")
    git(root, "checkout", "-q", "-b", "runs/b")
    git(root, "commit", "-q", "--allow-empty", "-m", "Run b")
    git(root, "checkout", "-q", "main")
    for name in ("runs/a", "runs/b", git(root, "rev-parse", "runs/b")):
        with pytest.raises(ConfigError, match=r"validate\.gates"):
            policy.check(root, name, changed(validate={"gates": []}))
        policy.check(root, name, changed())
    git(root, "merge", "-q", "runs/b")  # a person takes it over
    policy.check(root, "HEAD", changed(validate={"gates": []}))


def test_a_form_without_gates_makes_no_run(root: Path) -> None:
    from flows.deployed import deployments

    def planned(**form: Any) -> params.Params:
        chosen = {key.replace("_", ".", 1): value for key, value in form.items()}
        return deployments._planned(root, "a", "HEAD", deployments._overrides(chosen)).params

    for form in ({"validate_gates": []}, {"release_approval": "auto"}, {"release_margin": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(form)).replace("_", r"\.")):
            planned(**form)
    stricter = [*RAW["validate"]["gates"], {"name": "accuracy", "at_least": 0.9}]
    made = planned(validate_gates=stricter, release_separate_duties=True)
    assert len(made.validate_.gates) == len(stricter)
    assert made.release.separate_duties

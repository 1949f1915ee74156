"""params.yaml is checked once, strictly, and every problem is told at once with its key path."""

from pathlib import Path

import pytest
import yaml
from checkout import DEFAULTS, ROOT

from tasks import params
from tasks.acquire.params import DATA_SOURCES, MODEL_SOURCES, HubModel
from tasks.errors import ConfigError
from tasks.package.params import TARGETS
from tasks.variants import VARIANTS


def problems(tmp_path: Path, *overrides: str) -> str:
    (tmp_path / "params.yaml").write_text(DEFAULTS.read_text())
    with pytest.raises(ConfigError) as caught:
        params.load(tmp_path / "params.yaml", overrides)
    return str(caught.value)


def test_the_file_of_this_checkout_is_valid() -> None:
    assert params.load(ROOT / "params.yaml").quantize.variants


def test_all_errors_come_at_once_with_key_paths_and_the_nearest_name(tmp_path: Path) -> None:
    text = problems(
        tmp_path, "finetune.learning_rte=0.1", "distill.epochs=many", "validate.windows=0", "package.choose=best"
    )
    assert "4 problems" in text
    assert "finetune.learning_rte: unknown key: did you mean 'learning_rate'?" in text
    assert "distill.epochs: 'many' is text, not a number" in text
    assert "validate.windows" in text
    assert "smallest" in text


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = DEFAULTS.read_text()
    (tmp_path / "params.yaml").write_text(text + "\nacquire:\n  watch: elsewhere\n")
    first, second = text.splitlines().index("acquire:") + 1, len(text.splitlines()) + 2
    with pytest.raises(ConfigError, match=rf"acquire .* {first} .* {second}\b"):
        params.load(tmp_path / "params.yaml")


def test_a_key_of_another_section_is_not_taken_for_a_slip(tmp_path: Path) -> None:
    assert "acquire.model.revision: unknown key: it belongs elsewhere" in problems(tmp_path, "acquire.model.revision=a")


def test_what_set_gave_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert problems(tmp_path, "validate.windows=0").startswith(
        f"{tmp_path / 'params.yaml'} with what --set changes has"
    )


def test_1e_4_without_a_dot_is_explained(tmp_path: Path) -> None:
    text = problems(tmp_path, "finetune.learning_rate=1e-4")
    assert "finetune.learning_rate: '1e-4' is text" in text
    assert "1.0e-04" in text


def test_a_quoted_number_and_a_boolean_are_not_numbers(tmp_path: Path) -> None:
    text = problems(tmp_path, "finetune.epochs='2'", "finetune.seed=true")
    assert "2 problems" in text


def test_a_branch_is_not_a_revision(tmp_path: Path) -> None:
    text = problems(tmp_path, "acquire.model={source: hub, repo: org/name, revision: main}")
    assert "acquire.model.revision: 'main' is not a 40-digit commit hash" in text


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path) -> None:
    text = problems(tmp_path, "acquire.model.source=torrent")
    assert all(name in text for name in ("package", "gguf", "local", "hub"))


def test_a_local_input_outside_the_watched_folder_is_refused(tmp_path: Path) -> None:
    for path in ("elsewhere/rows.jsonl", "data/../elsewhere/rows.jsonl"):
        assert "lies outside watch" in problems(tmp_path, f"acquire.data.path={path}")


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("quantize.variants=[q4_k_s]", f"quantize.variants.0: 'q4_k_s' is none of {', '.join(VARIANTS)}: did you mean 'q4_k_m'?"),
        ("quantize.variants=[q8_0, Q4_K_M]", f"quantize.variants.1: 'Q4_K_M' is none of {', '.join(VARIANTS)}: did you mean 'q4_k_m'?"),
        ("acquire.model.source=hubb", f"acquire.model.source: 'hubb' is none of {', '.join(MODEL_SOURCES)}: did you mean 'hub'?"),
        ("acquire.data={path: data}", f"acquire.data: missing 'source': one of {', '.join(DATA_SOURCES)}"),
        ("task.metric=xml", "task.metric: 'xml' is none of json, text"),
        ("package.targets=[olama]", f"package.targets.0: 'olama' is none of {', '.join(TARGETS)}: did you mean 'ollama'?"),
        ("package.targets=ollama", "package.targets: 'ollama' is no list: write [ollama]"),
        ("quantize.options.model_builder.block_size=33", "quantize.options.model_builder.block_size: 33 is none of 16, 32, 64, 128"),
    ],
)  # fmt: skip
def test_a_wrong_name_lists_the_right_ones_and_the_nearest(tmp_path: Path, override: str, want: str) -> None:
    assert problems(tmp_path, override).splitlines()[1:] == [f"  {want}"]


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    assert "quantize.variants" in problems(tmp_path, "quantize.variants=[]")


def test_a_gate_needs_exactly_one_limit(tmp_path: Path) -> None:
    assert "exactly one" in problems(tmp_path, "validate.gates=[{name: accuracy, at_least: 0.1, at_most: 0.9}]")


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("override", ["finetune.epochs", "=3", "package.name.deep=1", "seed=[1"])
def test_an_override_that_cannot_be_applied_is_a_config_error(tmp_path: Path, override: str) -> None:
    assert "--set" in problems(tmp_path, override)


def test_a_digest_covers_exactly_the_named_sections() -> None:
    raw = yaml.safe_load(DEFAULTS.read_text())
    before = params.check(raw, "x")
    raw["validate"]["windows"] = 3
    after = params.check(raw, "x")
    assert before.digest(["finetune", "task"]) == after.digest(["finetune", "task"])
    assert before.digest(["validate"]) != after.digest(["validate"])


def test_a_stage_sees_only_its_sections() -> None:
    view = params.load(DEFAULTS).only(["finetune", "validate"])
    assert view.finetune.enabled
    assert view.validate_.windows
    for absent in ("distill", "task"):  # also where the section has a default
        with pytest.raises(AttributeError):
            getattr(view, absent)
    part = params.load(DEFAULTS).only(["validate.context", "quantize.variants"])
    assert part.validate_.context
    assert "q8_0" in part.quantize.variants
    for section, absent in ((part.validate_, "gates"), (part.validate_, "seed"), (part.quantize, "options")):
        with pytest.raises(AttributeError):
            getattr(section, absent)


def test_a_file_of_overrides_replaces_whole_values_and_later_ones_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "acquire:\n  model: {source: hub, repo: some/model, revision: "
        + "a" * 40
        + "}\nfinetune: {learning_rate: 7.0e-5}\n"
    )
    given = params.expanded([f"@{recipe}", "finetune.epochs=2.0"])
    values = params.load(DEFAULTS, given)
    assert values.acquire.model == HubModel(source="hub", repo="some/model", revision="a" * 40)
    assert (values.finetune.learning_rate, values.finetune.epochs) == (7e-5, 2.0)
    assert values.distill == params.load(DEFAULTS).distill
    assert params.load(DEFAULTS, [*given, "finetune.learning_rate=1.0e-3"]).finetune.learning_rate == 1e-3


def test_a_file_of_overrides_is_refused_where_it_has_no_sections_and_never_read_from_a_form(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("learning_rate: 1.0e-3\n")
    with pytest.raises(ConfigError, match=r"--set @.*r\.yaml: learning_rate "):
        params.expanded([f"@{tmp_path / 'r.yaml'}"])
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        params.expanded(["@none.yaml"])
    with pytest.raises(ConfigError, match="unknown key"):
        params.load(DEFAULTS, [params.override(f"@{tmp_path / 'r.yaml'}", 1)])


def test_seeds_are_told_where_they_went_and_what_they_may_be(tmp_path: Path) -> None:
    text = problems(tmp_path, "distill.seed=17", "select.sedes=[1]", "select.seeds=[1, -1]")
    assert "distill.seed: unknown key: select.seeds (a list) has taken its place" in text
    assert "select.sedes: unknown key: did you mean 'seeds'?" in text
    assert "select.seeds.1: Input should be greater than or equal to 0" in text
    assert "select: a seed is named twice" in problems(tmp_path, "select.seeds=[1, 1]")


@pytest.mark.parametrize(
    ("key", "value"),
    [("acquire.data.path", "da\0ta"), ("acquire.licences", ["mit\0"]), ("package.name", "a\0")],
)
def test_a_text_with_nul_is_refused_before_it_is_used(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        params.load(DEFAULTS, [params.override(key, value)])

"""What an architecture does not allow is told before a run, with the parameter to change."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout import PROFILES

from flows.preflight import checks
from tasks import params
from tasks.errors import ConfigError
from tasks.models import supports
from tasks.prune import blockwise
from tasks.prune.params import Prune


def named(raw: dict, root: Path, kind: str, **changes: Any) -> params.Params:
    (root / "data" / "model" / "config.json").write_text(json.dumps({"model_type": kind}))
    shutil.copytree(PROFILES, root / "profiles", dirs_exist_ok=True)
    raw["prune"]["max_parameters"] = changes.get("max_parameters", 0.9)
    raw["quantize"]["variants"] = changes.get("variants", ["q8_0"])
    return params.check(raw, "test")


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("lfm2", {}, "prune.max_parameters"),
        ("smollm3", {}, "prune.max_parameters"),
        ("gemma3_text", {"variants": ["q8_0", "onnx-int4"]}, "quantize.variants"),
        ("ministral", {"variants": ["onnx-int4"], "max_parameters": 1.0}, "quantize.variants"),
    ],
)
def test_what_cannot_be_done_later_is_told_first(
    tiny_params: dict, tmp_path: Path, kind: str, changes: dict, key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        checks.check(tmp_path, named(tiny_params, tmp_path, kind, **changes))


def test_what_can_be_done_passes_and_what_acquire_must_judge_is_left_to_it(tiny_params: dict, tmp_path: Path) -> None:
    checks.check(tmp_path, named(tiny_params, tmp_path, "llama", variants=["q8_0", "onnx-int4"]))
    checks.check(tmp_path, named(tiny_params, tmp_path, "lfm2", max_parameters=1.0))
    checked = named(tiny_params, tmp_path, "lfm2")
    (tmp_path / "data" / "model" / "config.json").write_text("{")
    checks.check(tmp_path, checked)


def test_pruning_says_itself_what_it_cannot_do(tmp_path: Path) -> None:
    """A decoder without a last norm, of an architecture that no table names."""
    block = torch.nn.Linear(2, 2)
    decoder = SimpleNamespace(layers=[block, block])
    model = SimpleNamespace(get_decoder=lambda: decoder, config=SimpleNamespace(model_type="odd"))
    settings = Prune(max_parameters=0.9)
    with pytest.raises(ConfigError, match=r"prune\.max_parameters"):
        blockwise.prune(model, [], [], settings)
    whole = settings.model_copy(update={"max_parameters": 1.0})
    assert blockwise.prune(model, [], [], whole) == {"blocks": [], "channels": None}
    assert "odd" in supports.cannot_prune("odd")

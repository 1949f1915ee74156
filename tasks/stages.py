"""The whole pipeline on one page. Stage = params section = dvc stage = folder under build/."""

from collections.abc import Callable, Mapping
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.frame.bounded import Limits
from tasks.frame.items import AXES
from tasks.frame.stage import Stage
from tasks.params import Params


def _late(name: str) -> Callable[..., Mapping[str, float]]:
    """`tasks.NAME.NAME`, imported when it is called, so that listing the pipeline stays cheap."""

    def call(*args: object, **kwargs: object) -> Mapping[str, float]:
        result: Mapping[str, float] = getattr(import_module(f"tasks.{name}.stage"), name)(*args, **kwargs)
        return result

    return call


def _acquire_limits(params: Params, root: Path) -> Limits:
    return import_module("tasks.acquire.limits").limits(params, root)  # type: ignore[no-any-return]


_ROWS = (
    Stage("acquire", _late("acquire"), ("acquire", "task"), sources=True, scratch=True, limits=_acquire_limits),
    Stage("finetune", _late("finetune"), ("finetune", "task"), {"source": "acquire"}, scratch=True, alone=True),
    # What students share: which rows they will read is decided by seeds and by how they are trained.
    Stage(
        "teach", _late("teach"),
        ("teach", "task", "select.seeds", "distill.epochs", "distill.most_rows", "distill.batch_tokens", "distill.precision"),
        {"source": "acquire", "teacher": "finetune"}, scratch=True, alone=True,
    ),
    Stage(
        "prune", _late("prune"), ("prune", "task", "distill.precision"), {"source": "acquire", "teacher": "finetune"},
        alone=True,
    ),
    Stage(
        "distill", _late("distill"), ("distill", "task", "teach.temperature"),
        {"source": "acquire", "taught": "teach", "pruned": "prune"}, per=("seed",), scratch=True, alone=True,
    ),
    Stage("select", _late("select"), ("select",), {"students": "distill"}),
    # HF -> F16 GGUF, once for all variants; the teacher's file is the yardstick of size and speed.
    Stage("convert", _late("convert"), (), {"teacher": "finetune", "student": "select"}),
    Stage(
        "quantize", _late("quantize"), ("quantize.options",),
        {"source": "acquire", "student": "select", "converted": "convert"}, per=("variant",),
    ),
    Stage(
        "validate", _late("validate"), ("validate.context", "validate.windows", "task"),
        {"source": "acquire", "distilled": "select", "converted": "convert", "artifact": "quantize"},
        per=("variant",),
    ),
    Stage(
        "measure", _late("measure"), ("measure.repeats",),
        {"source": "acquire", "student": "select", "converted": "convert", "artifact": "quantize"},
        per=("variant", "profile"), sources=True, profile=("memory_mb", "threads", "context", "runtimes"),
        measured=("measurements.json",),
    ),
    # Apart from both, so that another gate runs no model again. Its verdict may rest on what was measured.
    Stage(
        "judge", _late("judge"), ("validate",), {"validated": "validate", "measured": "measure"},
        per=("variant", "profile"), sources=True, profile=("gates", "label", "memory_mb", "threads", "context", "runtimes"), measured=("verdict.json",),
    ),
    Stage(
        "package", _late("package"), ("package", "quantize.variants", "measure.profiles"),
        {
            "source": "acquire", "student": "select", "artifacts": "quantize", "validated": "validate",
            "measured": "measure", "verdicts": "judge",
        },
        measured=("report.json",),
    ),
)  # fmt: skip

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _ROWS}


def unnamed(raw: Mapping[str, Any], checked: Params) -> list[str]:
    """What dvc.yaml names and a raw params mapping lacks, with the value that the code would take (`task: {...}`)."""
    wanted = {key for stage in STAGES.values() for key in stage.sections}
    wanted |= {AXES[axis] for stage in STAGES.values() for axis in stage.per}
    values = checked.model_dump(mode="json", by_alias=True)

    def lacks(key: str) -> bool:
        node: Any = raw
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return True
            node = node[part]
        return False

    return [
        f"{key}: {reduce(lambda node, part: node[part], key.split('.'), values)}"
        for key in sorted(filter(lacks, wanted))
    ]

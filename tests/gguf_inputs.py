"""GGUF files of the tiny model, made for real by the stages themselves, once a session."""

import functools
import shutil
from pathlib import Path

from checkout import DEFAULTS
from conftest import ROOMS, tiny_rows, write_jsonl

from tasks import params
from tasks.convert.stage import convert
from tasks.quantize.stage import quantize

ROOT = Path(__file__).resolve().parent.parent


def stage_input(model: Path, folder: Path) -> Path:
    """A folder as finetune and distill leave it: `model/` and nothing else that matters here."""
    shutil.copytree(model, folder / "model")
    return folder


@functools.cache
def converted(model: Path) -> Path:
    """The convert stage's output for `model` as teacher and as student."""
    home = model.with_name(f"{model.name}-converted")
    source = stage_input(model, home / "source")
    out = home / "out"
    out.mkdir()
    convert(params.load(DEFAULTS), teacher=source, student=source, out=out)
    return out


@functools.cache
def quantized(model: Path, variant: str) -> Path:
    """The quantize stage's output of one variant."""
    files = converted(model)
    out = files.with_name("quantize") / variant
    out.mkdir(parents=True)
    source = files.with_name("source")
    if not (source / "data").exists():
        write_jsonl(source / "data" / "train.jsonl", tiny_rows(ROOMS[:4]))
    quantize(params.load(DEFAULTS), source=source, student=source, converted=files, variant=variant, out=out)
    return out

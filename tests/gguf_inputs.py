"""Files of the tiny model, made for real by the stages themselves, once a session."""

import fcntl
import functools
import hashlib
import re
import shutil
from collections.abc import Callable
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


def once(model: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills from the folder `model`: one for all processes of this session and equal models."""
    sessions = [each for each in model.parents if re.fullmatch(r"pytest-\d+", each.name)]
    session = sessions[0] if sessions else model.parent  # another folder by --basetemp
    content = b"".join(each.read_bytes() for each in sorted(model.iterdir()) if each.is_file())
    out = session / "shared" / hashlib.sha256(content).hexdigest()[:16] / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            making = out.with_name(f".{out.name}.making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(out)
    return out


@functools.cache
def converted(model: Path) -> Path:
    """The convert stage's output for `model` as teacher and as student."""

    def make(out: Path) -> None:
        shutil.rmtree(out.with_name("source"), ignore_errors=True)  # of an attempt that failed
        source = stage_input(model, out.with_name("source"))
        convert(params.load(DEFAULTS), teacher=source, student=source, out=out)

    return once(model, "converted", make)


@functools.cache
def quantized(model: Path, variant: str) -> Path:
    """The quantize stage's output of one variant."""

    def make(out: Path) -> None:
        source = files.with_name("source")
        with out.with_name(".data.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (source / "data").exists():
                write_jsonl(source / "data" / "train.jsonl", tiny_rows(ROOMS[:4]))
        quantize(params.load(DEFAULTS), source=source, student=source, converted=files, variant=variant, out=out)

    files = converted(model)
    return once(model, f"quantize/{variant}", make)

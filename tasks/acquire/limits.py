"""What acquiring files of some size may take at most: several times what it was seen to take."""

import os
from contextlib import suppress
from pathlib import Path

from tasks.acquire import model_sources
from tasks.acquire.params import PackageModel
from tasks.errors import PipelineError
from tasks.frame.bounded import Limits
from tasks.frame.stage import folder
from tasks.params import Params

_CPU_S, _CPU_S_A_MODEL_MB, _CPU_S_A_DATA_MB = 60.0, 4.0, 200.0
_MEMORY, _MEMORY_A_MODEL_BYTE, _MEMORY_A_DATA_BYTE = 3e9, 10, 400
_CORES = 4  # with more, threads that wait for each other use more


def limits(params: Params, root: Path) -> Limits:
    """By the files that are there now."""
    settings = params.acquire
    downloads = root / "build" / f".{folder(root, 'acquire').name}.scratch"
    model = _size(downloads)
    if isinstance(settings.model, PackageModel):
        with suppress(PipelineError):  # acquire says it
            model += _size(model_sources.package(settings.model, root, downloads).path)
    elif path := getattr(settings.model, "path", None):
        model += _size(root / path)
    names = ("path", "unlabelled", "text")
    data = sum(_size(root / path) for name in names if (path := getattr(settings.data, name, None)))
    more = max(1.0, (os.cpu_count() or 1) / _CORES)
    return Limits(
        cpu_s=more * (_CPU_S + (_CPU_S_A_MODEL_MB * model + _CPU_S_A_DATA_MB * data) / 1e6),
        memory=_MEMORY + _MEMORY_A_MODEL_BYTE * model + _MEMORY_A_DATA_BYTE * data,
    )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what is removed meanwhile, as downloads are in the end, counts nothing."""
    files = [path, *(Path(place) / name for place, _, names in os.walk(path) for name in names)]
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size

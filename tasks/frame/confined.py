"""For converters of others: their home and caches lie in a temporary folder, and nothing is fetched."""

import os
from collections.abc import Mapping
from pathlib import Path

from tasks.frame.cores import threads
from tasks.frame.environment import NO_TELEMETRY, OFFLINE, QUIET

# An outer setting may point elsewhere than into the temporary folder.
OUTER = ("HF_HUB_CACHE", "OLIVE_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONHASHSEED")


def environment(scratch: Path) -> Mapping[str, str]:
    """Of a process that writes to its home."""
    own = {"HOME": str(scratch), "HF_HOME": str(scratch / "hub"), "OMP_NUM_THREADS": str(threads())}
    kept = {name: value for name, value in os.environ.items() if name not in OUTER}
    return {**kept, **NO_TELEMETRY, **OFFLINE, **QUIET, **own}

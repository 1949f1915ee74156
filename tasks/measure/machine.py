"""The machine that measures: what a reader of its numbers must know."""

import os
import platform
import re
from pathlib import Path
from typing import Any

TOLD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "neon", "asimddp", "i8mm", "sve")


def facts() -> dict[str, Any]:
    """Its processor, the instructions that matter to a runtime, cores, memory in bytes, and system."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)).split())
    return {
        "processor": name[1] if name else platform.machine(),
        "instructions": [each for each in TOLD if each in flags],
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }

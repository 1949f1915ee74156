"""The C library's allocator as training needs it.

Every step asks for the same large blocks and gives them back. glibc returns each to the system at once, which hands
it out again page by page, zeroed: a quarter of the time of a step in float32 on two cores. So blocks are
kept between steps, on huge pages where the system offers them. glibc reads this when a process starts.
"""

import os
import sys

_GIB = 2**30
_TUNABLES = {
    "glibc.malloc.mmap_threshold": 4 * _GIB,  # blocks from here on are given back when they are freed
    "glibc.malloc.trim_threshold": 8 * _GIB,  # so much may lie unused
    "glibc.malloc.hugetlb": 1,  # transparent huge pages, from glibc 2.35 on
}


def keep_blocks(command: list[str]) -> None:
    """Start `command`, this process's own, anew in its place with these settings, unless some are set already."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        settings = ":".join(f"{name}={value}" for name, value in _TUNABLES.items())
        os.execve(command[0], command, os.environ | {"GLIBC_TUNABLES": settings})

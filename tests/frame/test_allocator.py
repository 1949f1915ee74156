"""That training's allocator keeps blocks, and leaves alone what a person chose."""

import subprocess
import sys

import pytest

STARTS = """
import os, resource, sys
from tasks.frame.allocator import keep_blocks

if "begun" not in os.environ:
    os.environ["begun"] = str(os.getpid())
    keep_blocks([sys.executable, *sys.orig_argv[1:]])
import torch
torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16_000_000)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(os.environ["begun"] == str(os.getpid()), faults, os.environ["GLIBC_TUNABLES"])
"""


def started(**environment: str) -> tuple[str, int, str]:
    env = {"PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run([sys.executable, "-c", STARTS], env=env, capture_output=True, text=True, check=True)
    same, faults, tunables = done.stdout.split()
    return same, int(faults), tunables


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_blocks_are_kept_in_the_same_process() -> None:
    same, faults, _ = started()
    assert same == "True"
    assert faults < 5_000  # 64 MB are 16,384 pages, twenty times


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_what_a_person_set_stays() -> None:
    assert started(GLIBC_TUNABLES="glibc.malloc.check=0")[2] == "glibc.malloc.check=0"

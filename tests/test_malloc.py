"""Freed memory is kept: tensors that come and go cost no traps into the kernel. The environment goes first; other systems are left alone."""

import os
import subprocess
import sys

import pytest

from alignlab import malloc

FAULTS = """
import resource, sys
import torch
from alignlab.malloc import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    together = [torch.ones(2**14) for _ in range(512)]
    del together
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> tuple[str, int]:
    """Of a step that takes 512 tensors of 64 KiB and frees them, 20 times."""
    clean = {key: value for key, value in os.environ.items() if key not in malloc.CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *words], capture_output=True, text=True, env=clean | environment, check=True
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_is_kept():
    pages = 2**25 // os.sysconf("SC_PAGE_SIZE")
    (_, before), (kept, after) = faults(), faults("keep")
    if kept == "False":
        pytest.skip("not glibc")
    assert before > 5 * pages
    assert after < 2 * pages


def test_the_environment_has_chosen():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert malloc.keep_freed_memory() is False

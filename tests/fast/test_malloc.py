"""Freed memory is kept: tensors that come and go cost no traps into the kernel. The environment goes first;
other systems are left alone."""

import os
import subprocess
import sys

import pytest

from alignlab.fast import malloc

FAULTS = """
import resource, sys
import torch
from alignlab.fast.malloc import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1, 21):
    torch.ones(size, 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> tuple[str, int]:
    """Of tensors of 1, 2 ... 20 MiB, each freed before the next."""
    clean = {key: value for key, value in os.environ.items() if key not in malloc.CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *words],
        capture_output=True,
        text=True,
        env=clean | environment,
        check=True,
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_is_kept():
    pages = 2**20 // os.sysconf("SC_PAGE_SIZE")
    (_, before), (kept, after) = faults(), faults("keep")
    if kept == "False":
        pytest.skip("not glibc")
    assert before > 0.9 * sum(range(1, 21)) * pages
    assert after < before / 2


def test_the_environment_has_chosen():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert malloc.keep_freed_memory() is False

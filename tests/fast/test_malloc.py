"""Freed memory is kept for the next step, unless the environment says otherwise. Other systems stay as they
are."""

import os
import subprocess
import sys

import pytest

from alignlab.fast import malloc

RESIDENT = """
import os, sys
from alignlab.fast.malloc import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

kept = keep_freed_memory() if "keep" in sys.argv else None
before = resident()
piece = bytearray(b"x") * (20 * 2**20)
del piece
print(kept, resident() - before)
"""


def left_after_free(*words: str, **environment: str) -> tuple[str, float]:
    """What keep_freed_memory returns in a new process, and MiB that stay of 20 MiB after they were freed."""
    clean = {key: value for key, value in os.environ.items() if key not in malloc.CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, *words],
        capture_output=True,
        text=True,
        env=clean | environment,
        check=True,
    )
    kept, left = done.stdout.split()
    return kept, int(left) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_is_kept() -> None:
    """Of 20 MiB all stay with the process; without the setting the system gets them back."""
    (_, without), (kept, left) = left_after_free(), left_after_free("keep")
    if kept == "False":
        pytest.skip("not glibc")
    assert without < 2 and left > 18


def test_the_environment_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets one of malloc's own variables keeps what that says."""
    for name in malloc.CHOSEN:
        with monkeypatch.context() as patch:
            patch.setenv(name, "131072")
            assert malloc.keep_freed_memory() is False


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no glibc on a Mac."""
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert malloc.keep_freed_memory() is False

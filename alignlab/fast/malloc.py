"""Memory that a step gives back is kept for the next one.

glibc gives freed memory back to the system, and each first touch of a page that it takes anew is a trap into
the kernel: a fifth of a small U-Net's pass. It keeps twice the largest piece that was freed so far, up to 64
MiB: so a run gets faster once it has trained, and sampling and evaluating never do. Here it begins where that
ends. On a GPU only the host's memory is meant, and nothing changes.
"""

import ctypes
import os
import sys

KEPT = 32 * 2**20
"""Bytes; glibc's own upper bound (DEFAULT_MMAP_THRESHOLD_MAX). At the top of the heap it keeps twice as
much."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h's names of what is set."""
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Whoever sets one of these in the environment has chosen."""


def keep_freed_memory() -> bool:
    """For this whole process. Returns whether it is set: it is on Linux with glibc, unless the environment
    says otherwise."""
    if sys.platform != "linux" or any(os.environ.get(name) for name in CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT) and mallopt(M_TRIM_THRESHOLD, 2 * KEPT))

"""alignlab: fine-tune text-to-image diffusion models on rewards, and compare the ways of doing it."""

import os
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Before torch is imported: idle threads sleep. Spinning ones make two jobs on one machine several times slower than one after the other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(run: str | Path) -> Any:
    """The diffusers pipeline of a finished run (`alignlab.tuned.load`)."""
    from alignlab import tuned  # slow to import

    return tuned.load(run)

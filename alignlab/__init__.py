"""alignlab: fine-tune text-to-image diffusion models on rewards, and compare the ways of doing it."""

import sys
from pathlib import Path
from typing import Any

from alignlab.fast import spin_shortly
from alignlab.runs import old_imports

__version__ = "0.1.0"

spin_shortly()  # before torch is loaded
old_imports.allow()
if sys.argv[:1] == ["-m"]:  # Python looks for the module of `python -m`
    from alignlab.config import help as _help

    _help.early()


def load(run: str | Path) -> Any:
    """The diffusers pipeline of a finished run (`alignlab.weights.load.load`)."""
    from alignlab.weights import load as weights  # slow to import

    return weights.load(run)

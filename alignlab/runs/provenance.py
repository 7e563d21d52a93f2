"""What made the numbers of a run: versions, machine and commit."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """What made the numbers: versions, machine, and the commit of the checkout (None outside one)."""
    here = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    return {
        "versions": {name: version(name) for name in ("alignlab", "torch", "diffusers", "peft")}
        | {"python": platform.python_version()},
        "machine": {
            "device": str(device),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "git": commit
        and {"commit": commit, "clean": not git("status", "--porcelain", "--untracked-files=no")},
    }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", told.read_text(), re.MULTILINE) if told.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()

"""What stands where in a run folder, and how commands find it."""

import glob
import re
from pathlib import Path

from alignlab.files.safe_folder import LOCK, RunError, refuse_devices
from alignlab.runs.pasted import resume

METRICS = "metrics.jsonl"
FOLDERS = ("samples", "checkpoints", "collected", "tensorboard", "model")
FILES = ("config.yaml", METRICS, "summary.json", "tracker_id", ".lock")
"""What a run makes in its folder."""
PARTS = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "tracker_id",
    LOCK,
    ".new_*",
    "samples",
    "checkpoints",
    "collected",
    "tensorboard",
    "model",
    ".model",
)
"""What a run writes in its folder."""
READ = (*PARTS, "evaluation", "probes")
"""What commands read of it."""


def run_folders(pattern: str) -> list[Path]:
    """The run folders that a name, or a pattern of names, means. A folder's own name may hold brackets."""
    paths = [pattern] if Path(pattern).is_dir() else sorted(glob.glob(pattern, recursive=True))
    # perhaps the brackets are those of the names themselves
    paths = paths or sorted(glob.glob(pattern.replace("[", "[[]"), recursive=True))
    return [folder for folder in map(Path, paths) if (folder / "config.yaml").is_file()]


def numbered(folder: Path, kind: str, ending: str = "") -> list[Path]:
    """What a run numbered by its epochs, in their order: step_000002, but not step_x or step_000002.bak,
    which are somebody else's."""
    name = re.compile(rf"{kind}_([0-9]{{6,}}){re.escape(ending)}")
    named = {path: match for path in folder.glob(f"{kind}_*") if (match := name.fullmatch(path.name))}
    return sorted(named, key=lambda path: int(named[path][1]))


def weights(run: Path) -> Path:
    """RUN/model, which must hold some.

    Raises:
        RunError: if it does not.
    """
    refuse_devices(run, "model")
    if not any((run / "model").rglob("*.safetensors")):
        raise RunError(f"{run / 'model'} holds no weights; finish the run first: {resume(run)}")
    return run / "model"

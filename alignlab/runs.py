"""The run directory: what a run leaves behind, and how it goes on after it was stopped.

    RUN/config.yaml  metrics.jsonl  summary.json  samples/step_*.png  checkpoints/step_*/  model/

A checkpoint is written aside, synced and renamed, so a killed run never leaves half a one that counts.
"""

import fcntl
import glob
import json
import math
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT_CHECKPOINTS = 2
NOT_SCIENCE = ("output_dir", "resume", "device", "tracker", "checkpoint_every", "offload", "push_to_hub")
"""Keys in which a resumed run may differ."""
LATER_KEYS = {
    "quick": False, "lr_schedule": "constant", "lr_warmup": 0, "ema": 0.0, "select": "last", "compile": False,
    "init_from": None, "push_to_hub": None,
}  # fmt: skip
LATER_POLICY_KEYS = {"decode_batch": None, "text_on_host": False, "channels_last": False, "shard": False}


class RunError(Exception):
    """The run folder cannot be used as asked; one sentence."""


class Run:
    """One run folder.

    Args:
        folder: looked at only, until `begin`.
        config: the resolved configuration. A non-empty folder must have been started with the same one.
        ignore: top-level keys in which the two may differ.

    Raises:
        RunError: if the folder holds another run, or files that are none.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
        self.folder, self.config = folder, config
        stored = folder / "config.yaml"
        if stored.is_file():
            old = read_config(folder)
            before, asked = ({k: v for k, v in c.items() if k not in ignore} for c in (old, config))
            difference = first_difference(before, asked)
            if difference is not None:
                key, then, now = difference
                raise RunError(
                    f"{folder} holds a run with {key}={then}, but {key}={now} was asked for; choose another output_dir, or the same configuration to resume"
                )
        elif folder.is_dir() and any(p.name not in ("tensorboard", "multirun.yaml") for p in folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no run (no config.yaml); choose another output_dir")

    def begin(self) -> None:
        """Creates the folder, and keeps other processes out of it until this one ends.

        Raises:
            RunError: if it cannot be written, or another process trains in it.
        """
        try:
            for name in ("samples", "checkpoints"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written ({error.strerror}); choose another output_dir") from None
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{self.folder} is being trained by another process; wait for it, or choose another output_dir"
            ) from None
        write_aside(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run.

        Raises:
            RunError: if it is none.
        """
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        try:
            its = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(its[key], dict) for key in ("base", "final")):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise RunError(
                f"{path} is no summary of a run; remove it, and the run is finished again from its last checkpoint"
            ) from None
        return dict(its)

    def finish(self, summary: dict[str, Any]) -> None:
        write_aside(self.folder / "summary.json", json.dumps(_finite(summary), indent=2) + "\n")
        (self.folder / ".lock").unlink(missing_ok=True)

    # -- metrics

    def log(self, line: dict[str, Any]) -> None:
        """Appends one JSON object to metrics.jsonl, to the disk."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    # -- checkpoints

    def save_checkpoint(self, step: int, policy: dict[str, Tensor], state: dict[str, Any]) -> None:
        """`policy` goes to policy.safetensors; `state` (plain values and tensors) to state.pt."""
        final = self.folder / "checkpoints" / f"step_{step:06d}"
        aside = final.with_name(f".{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in policy.items()}, aside / "policy.safetensors")
        torch.save({"step": step, "metrics_lines": len(self.metrics()), **state}, aside / "state.pt")
        for path in (*aside.iterdir(), aside):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(final.parent)
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest one, with metrics.jsonl cut back to it; None if there is none."""
        found = self._checkpoints()
        if not found:
            self._cut_back(0)
            return None
        state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
        self._cut_back(state["metrics_lines"])
        return load_file(found[-1] / "policy.safetensors"), state

    def _cut_back(self, lines: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            write_aside(path, "".join(path.read_text().splitlines(keepends=True)[:lines]))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def save_best(self, step: int, policy: dict[str, Tensor]) -> None:
        """Keeps the weights that did best so far in an evaluation, and those before, which a resumed run may come back to."""
        aside = self.folder / "checkpoints" / f".best_{step:06d}.safetensors"
        save_file({k: v.contiguous() for k, v in policy.items()}, aside)
        _sync(aside)
        aside.rename(aside.with_name(aside.name[1:]))
        for old in sorted(aside.parent.glob("best_*"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def load_best(self, step: int) -> dict[str, Tensor]:
        return load_file(self.folder / "checkpoints" / f"best_{step:06d}.safetensors")

    @property
    def started(self) -> bool:
        """Whether it has a checkpoint to go on from."""
        return bool(self._checkpoints())

    # -- pictures

    def save_samples(self, step: int, images: Tensor, columns: int) -> None:
        save_grid(images, self.folder / "samples" / f"step_{step:06d}.png", columns)


class Onlooker(Run):
    """A run as the other processes see it, that train it too: process 0 writes."""

    def begin(self) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...
    def log(self, line: dict[str, Any]) -> None: ...
    def save_checkpoint(self, step: int, policy: dict[str, Tensor], state: dict[str, Any]) -> None: ...
    def save_best(self, step: int, policy: dict[str, Tensor]) -> None: ...
    def save_samples(self, step: int, images: Tensor, columns: int) -> None: ...
    def _cut_back(self, lines: int) -> None: ...

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not (self.folder / "config.yaml").is_file():
            raise RunError(f"{self.folder} is not to be seen here; set output_dir to a folder that all machines share")
        return super().load_checkpoint()


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.yaml; keys that came later have the value that they had before they were keys.

    Raises:
        RunError: if it cannot be read, or is none.
    """
    path = run / "config.yaml"
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(
            f"{path} cannot be read as YAML ({next(iter(str(error).splitlines()), '')}); give a run folder that is whole"
        ) from None
    groups = ("model", "algo", "reward", "prompts", "policy", "eval_rewards")
    if not isinstance(read, dict) or not all(isinstance(read.get(key, {}), dict) for key in groups):
        raise RunError(
            f"{path} is not the configuration of a run ({', '.join(groups)} are tables there); give a run folder that is whole"
        )
    stored: dict[str, Any] = {**LATER_KEYS, **read}
    if stored.get("policy", {}).get("_target_") == "alignlab.policy.Policy":
        stored["policy"] = {**LATER_POLICY_KEYS, **stored["policy"]}
    return stored


def weights(run: Path) -> Path:
    """RUN/model, which must hold some.

    Raises:
        RunError: if it does not.
    """
    if not any((run / "model").rglob("*.safetensors")):
        raise RunError(f"{run / 'model'} holds no weights; finish the run first (python -m alignlab.train resume={run})")
    return run / "model"


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """A grid of images [n, 3, H, W] in [0, 1], small ones enlarged for the eye."""
    from torchvision.utils import save_image

    factor = max(1, 96 // images.shape[-1])
    save_image(images.repeat_interleave(factor, 2).repeat_interleave(factor, 3), path, nrow=columns, padding=2)


def run_folders(pattern: str) -> list[Path]:
    """The run folders that a name, or a pattern of names, means. A folder's own name may hold brackets."""
    found = [pattern] if Path(pattern).is_dir() else sorted(glob.glob(pattern, recursive=True))
    return [folder for folder in map(Path, found) if (folder / "config.yaml").is_file()]


def first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two nested dictionaries differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (prefix.rstrip("."), old, new)
    for key in (*new, *(k for k in old if k not in new)):
        found = first_difference(old.get(key), new.get(key), f"{prefix}{key}.")
        if found is not None:
            return found
    return None


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_aside(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old text or the new, never half."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def provenance(device: torch.device) -> dict[str, Any]:
    """What made the numbers: versions, machine, and the commit of the checkout (None outside one)."""
    here = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    return {
        "versions": {name: version(name) for name in ("alignlab", "torch", "diffusers", "peft")}
        | {"python": platform.python_version()},
        "machine": {"device": str(device), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "git": commit and {"commit": commit, "clean": not git("status", "--porcelain")},
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

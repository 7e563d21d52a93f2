"""What a run reports while it runs: averaged metrics and a progress bar."""

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from alignlab.distributed.ranks import gathered, rank, whole
from alignlab.training.trackers import Trackers


class Averages:
    """Averages metrics of micro-batches by their shares; of a name ending in _max it keeps the largest.

    Sums stay on the device until they are read, so that no micro-batch waits for the device.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor | float] = {}

    def add(self, share: float, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            if name.endswith("_max"):
                self.sums[name] = torch.maximum(self.sums.get(name, value), value)
                self.shares[name] = 1.0
            else:
                weight: Tensor | float = share
                # In a vector nan marks a pair without a value. A scalar's nan is an accident, and is shown.
                if value.dim():
                    weight, value = share * (~value.isnan()).float().mean(), value.nansum() / len(value)
                self.sums[name] = self.sums.get(name, 0) + share * value
                self.shares[name] = self.shares.get(name, 0) + weight

    def means(self) -> dict[str, float]:
        """Computes the means over all processes."""
        parts = gathered(
            {name: (float(value), float(self.shares[name])) for name, value in self.sums.items()}
        )
        out: dict[str, float] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            sums, shares = np.array([part[name] for part in parts if name in part]).T
            whole_share = shares.sum() or math.nan  # nothing was measured
            out[name] = float(sums.max() if name.endswith("_max") else sums.sum() / whole_share)
        return out


def reward_numbers(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Computes the mean and standard deviation of each reward of an epoch, over all processes.

    Args:
        parts: the rewards of each rollout of this process, [B] by name; none if nothing was sampled.
    """
    out: dict[str, float] = {}
    for name in parts[0] if parts else ():
        values = whole(torch.cat([part[name] for part in parts]).double())
        prefix = "reward" if name == "reward" else f"reward/{name}"
        out |= {f"{prefix}/mean": values.mean().item(), f"{prefix}/std": values.std(correction=0).item()}
    return out


def tell(summary: dict[str, Any], folder: Path) -> None:
    """Prints the base and final values of a finished run."""
    units = {
        "reward": summary.get("reward_unit"),
        "lpips": summary.get("diversity_metric"),
        **summary.get("units", {}),
    }
    for name, value in summary["final"].items():
        if value is not None and not name.startswith("image/") and not name.endswith("_std"):
            print(
                f"{name:>24}  base {summary['base'][name]:8.3f}  final {value:8.3f}  {units.get(name) or ''}"
            )
    print(f"pictures: {folder / 'samples'}")


class Journal:
    """Shows a progress bar, a line at each evaluation, and feeds the trackers, on process 0 only.

    Args:
        epochs: the epochs that are still to run, counted from 1.
        trackers: get every line too.
        diversity: the name of the perceptual distance.
    """

    def __init__(self, epochs: range, *, trackers: Trackers, diversity: str) -> None:
        self.trackers, self.diversity, self.silent = trackers, diversity, rank() > 0
        self.bar = Progress(
            TextColumn("epoch"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            disable=self.silent,
        )
        self.task = self.bar.add_task("epoch", total=epochs.stop - 1, completed=epochs.start - 1, note="")

    def __enter__(self) -> "Journal":
        self.bar.start()
        return self

    def __call__(self, line: dict[str, Any]) -> None:
        """Shows one line of metrics; that of step 0 is the base model's evaluation and has nothing else."""
        if self.silent:
            return
        self.trackers(line)
        note = "base model"
        if line["step"]:
            loss = "no update" if line["loss"] is None else f"loss {line['loss']:.4g}"
            earned = f"reward {line['reward/mean']:.3f}" if "reward/mean" in line else loss
            note = f"{earned}  {line['images_per_second']:.1f} images/s"
        self.bar.update(self.task, completed=line["step"], note=note)
        if "eval/reward" in line:
            self.bar.print(
                f"epoch {line['step']:>4}  {note}  evaluation: reward {line['eval/reward']:.3f}  "
                f"{self.diversity} {line['eval/lpips']:.3f}"
            )
        if line.get("reward/std") == 0:
            self.bar.print(
                f"epoch {line['step']:>4}  warning: every image of this epoch earned the same reward, so "
                "there is nothing to learn from"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.trackers.finish()


def reset_peak_memory(device: torch.device) -> None:
    """Begins to count the device's peak memory anew; a CPU has no such counter."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb(device: torch.device) -> float:
    """Measures the peak memory in MiB: of the GPU since its counter was reset, or of the process on a CPU.

    On a CPU it is the peak of the whole process. Linux starts `ru_maxrss` at the parent's memory, so /proc is
    preferred.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    return high_water_mb() or counted


def high_water_mb(process: int | str = "self") -> float:
    """Reads the peak memory of a process in MiB from Linux; 0 if it is ending, and on other systems."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), 0.0)

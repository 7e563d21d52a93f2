"""The learning rate over a run, a pure function of the epoch: nothing to save, nothing to resume."""

import math

import torch


def lr_factor(schedule: str, epoch: int, *, epochs: int, warmup: int = 0) -> float:
    """What the optimiser's lr is multiplied with in `epoch` (counted from 1), in (0, 1].

    It rises linearly over `warmup` epochs to 1, then stays (constant) or falls towards 0, which it would
    reach after the last epoch, along a line or half a cosine.

    Args:
        schedule: constant, linear or cosine.
    """
    if epoch <= warmup:
        return epoch / warmup
    done = (epoch - 1 - warmup) / (epochs - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group's lr to `factor` times what it was built with; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])

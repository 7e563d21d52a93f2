"""What fits: the largest micro_batch and evaluation.batch that a dry run (footprint.py) says a device has
room for."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch

from alignlab.config.reward_nodes import groupwise
from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import launched
from alignlab.planning.footprint import Epoch, Footprint, footprint

GIB = 2**30
MARGIN = 1.15
"""Of the memory asked of a device over what is predicted: the prediction is within 15 % of what is measured
(tests/test_plan.py)."""
KEYS = ("micro_batch", "evaluation.batch")


def free_memory(device: str) -> float | None:
    """Bytes free on a device; None if it is not here."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    if device == "mps" and not torch.backends.mps.is_available():
        return None
    return float(psutil.virtual_memory().available)  # a Mac's GPU shares it


def size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending candidates that fits, by bisection; None if none does."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(candidates[middle]) else (low, middle)
    return candidates[low] if low >= 0 else None


def at(c: TrainConfig, epoch: Epoch, micro_batch: int, batch: int) -> Footprint:
    """Of a configuration with these two sizes."""
    sized = replace(c, micro_batch=micro_batch, evaluation=replace(c.evaluation, batch=batch))
    return footprint(sized, epoch, device=c.device)


def micro_batches(c: TrainConfig) -> list[int]:
    """Those that divide what each process samples, and hold whole groups where a reward compares a prompt's
    images; ascending."""
    each = c.samples_per_step // launched()
    group = c.prompts.get("per_prompt", 1) if groupwise(c.reward) else 1
    return [k for k in range(group, each + 1, group) if each % k == 0]


def batches(c: TrainConfig) -> list[int]:
    """Powers of 2 below evaluation.batch."""
    batch = c.evaluation.batch
    return [2**k for k in range(batch.bit_length()) if 2**k < batch]


def proposals(c: TrainConfig, predicted: Footprint, room: float, epoch: Epoch) -> dict[str, int | None]:
    """For micro_batch and evaluation.batch the largest that fits in `room` bytes, None if not even 1 does.

    micro_batch is one that divides samples_per_step. evaluation.batch stays as it is if it fits, and else is
    a power of 2.
    """
    batch = c.evaluation.batch
    micro_batch = largest(
        micro_batches(c),
        lambda k: (predicted if k == c.micro_batch else at(c, epoch, k, batch)).training <= room,
    )
    if micro_batch is None or predicted.evaluation <= room:
        return {"micro_batch": micro_batch, "evaluation.batch": batch}
    least = micro_batches(c)[0]
    return {
        "micro_batch": micro_batch,
        "evaluation.batch": largest(batches(c), lambda k: at(c, epoch, least, k).evaluation <= room),
    }


def other_ways(c: TrainConfig) -> str:
    """What takes less memory, where a smaller batch is no help."""
    ways = [
        "policy.checkpointing=true" if not c.policy.get("checkpointing") else "",
        "precision=bf16" if c.precision == "fp32" else "",
        "policy.full=false" if c.policy.get("full") else "",
        "offload=true" if not c.offload else "",
    ]
    return ", ".join(filter(None, ways)) or "a larger device"


def instead(c: TrainConfig, key: str, room: float | None, epoch: Epoch) -> str:
    """What to lower after memory ran out, and by how much.

    Args:
        c: with the type of the device in `device`.
        key: one of KEYS: what the memory ran out for.
        room: bytes that the device has for the run; None where that is not known.
    """
    training, batch = key == "micro_batch", c.evaluation.batch
    present = c.micro_batch if training else batch
    lower = [k for k in (micro_batches(c) if training else batches(c)) if k < present]
    if not lower:
        return f"{key}={present} cannot be lower; try {other_ways(c)}"

    def need(value: int) -> float:
        predicted = at(c, epoch, value if training else c.micro_batch, batch if training else value)
        return MARGIN * (predicted.training if training else predicted.evaluation)

    try:
        # a prediction is that of one process that shares nothing, and to make one of several would call on
        # the others in mid-epoch
        if room is None or launched() > 1 or c.policy.get("shard"):
            return f"{key}={present} is too much; set {key}={lower[-1]}"
        needed, needs = need(present), {}

        def fits(value: int) -> bool:
            needs[value] = need(value)
            return needs[value] <= room

        chosen = largest(lower, fits)
        if chosen is None:
            return (
                f"{key}={present} needs about {size(needed)} of {size(room)}, and {key}={lower[0]} still "
                f"{size(needs[lower[0]])}; try {other_ways(c)}"
            )
        return (
            f"{key}={present} needs about {size(needed)} of {size(room)}; {key}={chosen} needs "
            f"{size(needs[chosen])}: set that"
        )
    except Exception as error:  # a part that cannot be run dry: a reward of the user's own, say
        return f"{key}={present} is too much; set {key}={lower[-1]} (no prediction: {type(error).__name__})"


def smaller(c: TrainConfig, key: str, epoch: Epoch) -> str:
    """What `instead` says, for the memory that the device has now."""
    return instead(c, key, free_memory(c.device), epoch)

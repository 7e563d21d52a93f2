"""The processes that train together (accelerate launch, torchrun): which rows of an epoch each one holds, and
what all must agree on.

Process r of W holds the r-th of W equal runs of rows. It samples, scores and replays those alone; every
process makes the draws of the whole epoch, what an objective must know of the whole (rewards, prompts) is
gathered, and gradients are summed. So W processes do what one would do with all the rows. For one process
every function here gives back what it was given.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
BUCKET = 2**24
"""Numbers of one sum over the processes."""
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others before it gives up: longer than the slowest reward."""


def launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Meets the other processes, if the launcher started any; once in a process' life."""
    if launched() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of their ranks."""
    out = [value] * world()
    if world() > 1:
        dist.all_gather_object(out, value)
    return out


def wait() -> None:
    """Until every process is here."""
    gathered(None)


def signed(sentence: str) -> str:
    """A mistake with the number of the process that has it, but for process 0."""
    return f"process {rank()}: {sentence}" if rank() else sentence


def shared(value: T) -> T:
    """That of process 0."""
    return gathered(value)[0]


def whole(rows: Tensor) -> Tensor:
    """Every process's rows [n/W, ...] one after another, [n, ...], on the CPU."""
    mine = rows.detach().cpu().contiguous()
    if world() == 1:
        return mine
    out = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(out, mine)
    return torch.cat(out)


def own(n: int) -> range:
    """Which of n rows this process holds; n is a multiple of W."""
    each = n // world()
    return range(rank() * each, (rank() + 1) * each)


def own_shares(items: Tensor, n: int, size: int, *, even: bool = False) -> Iterator[tuple[float, Tensor]]:
    """This process's part of one update: slices of at most `size` items, with their share of all processes'
    items.

    Args:
        items: [M] rows of the whole epoch, or [M, 2] such rows and something that belongs to each.
        n: rows of the whole epoch.
        even: equally many slices for every process, because a sharded model runs on all of them at once:
            where one has less, it gets an item with share 0.

    Yields:
        A share, and items whose rows are counted from this process's first.
    """
    rows = items.view(len(items), -1)[:, 0]
    owner, mine = rows // (n // world()), items.clone()
    mine.view(len(items), -1)[:, 0] %= n // world()
    held = mine[owner == rank()]
    most = int(owner.bincount().max()) if even else len(held)
    for k in range(0, most, size):
        part = held[k : k + size]
        yield len(part) / len(items), part if len(part) else mine[:1]


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Adds up what the processes' shares of an update gave."""
    if world() == 1:
        return
    used = torch.tensor(gathered([parameter.grad is not None for parameter in parameters])).any(0).tolist()
    for parameter, somewhere in zip(parameters, used, strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if hasattr(grads[0], "full_tensor"):  # a shard: fully_shard has averaged it already
        torch._foreach_mul_(grads, float(world()))
        return
    while grads:  # in buckets: all at once would need the memory of all gradients again
        bucket = [grads.pop()]
        while grads and sum(grad.numel() for grad in bucket) < BUCKET:
            bucket.append(grads.pop())
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in bucket])
        torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])


def clip_gradients(parameters: list[nn.Parameter], most: float) -> float:
    """Scales the gradient of all parameters together to a norm of at most `most`; returns the norm that it
    had."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

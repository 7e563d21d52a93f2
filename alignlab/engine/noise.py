"""Every normal draw is a pure function of (seed, stream, epoch, prompt, replica, step).

So an image does not depend on the batch it was drawn in, on the number of processes, or on whether the run
was resumed; keys never collide between ranks or prompts; and noise need not be stored.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

FIRST = -1  # the `step` of x_T; steps 0..N-1 are the sampler's, later ones DRaFT-LV's


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """The identity of B images."""

    seed: int
    stream: str
    """What the draws are for ("train", "eval", ...): streams never share noise."""
    epoch: int
    prompts: tuple[str, ...]
    replicas: tuple[int, ...]
    """Which of the images of the same prompt and epoch each one is, [B]."""
    shared_first: bool = False
    """All images of a prompt and epoch begin at the same x_T, that of replica 0."""

    def normal(self, step: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """[B, *shape] float32, standard normal."""
        shared = self.shared_first and step == FIRST
        rows = [
            _generator(self.seed, self.stream, self.epoch, p, 0 if shared else r, step).standard_normal(
                tuple(shape), dtype=np.float32
            )
            for p, r in zip(self.prompts, self.replicas, strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(device, non_blocking=True)

    def uniform(self, step: int) -> Tensor:
        """[B] float64 on the CPU, uniform in [0, 1): the quantile of a normal draw, which has a `step` of its
        own."""
        return torch.special.ndtr(self.normal(step, ()).double())

    def __getitem__(self, rows: Iterable[int]) -> "NoiseKey":
        rows = list(rows)
        return replace(
            self, prompts=tuple(self.prompts[r] for r in rows), replicas=tuple(self.replicas[r] for r in rows)
        )


def noise_key(
    prompts: Sequence[str], *, seed: int, stream: str, epoch: int = 0, shared_first: bool = False
) -> NoiseKey:
    """The key of one epoch's whole list of prompts; equal prompts are numbered in order."""
    seen: Counter[str] = Counter()
    replicas = []
    for prompt in prompts:
        replicas.append(seen[prompt])
        seen[prompt] += 1
    return NoiseKey(
        seed=seed,
        stream=stream,
        epoch=epoch,
        prompts=tuple(prompts),
        replicas=tuple(replicas),
        shared_first=shared_first,
    )


def _generator(*key: int | str) -> np.random.Generator:
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

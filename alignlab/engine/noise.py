"""Every normal draw is a pure function of (seed, stream, epoch, prompt, replica, step).

There is no generator with a state that a checkpoint would have to keep. An image therefore does not depend on
the batch it was drawn in, on the number of processes, or on whether the run was resumed. Noise need not be
stored, because the key gives it again.
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
    """Identifies B images, and with them all noise that they are drawn from."""

    seed: int
    stream: str
    """What the draws are for ("train", "eval", ...): streams never share noise."""
    epoch: int
    prompts: tuple[str, ...]
    replicas: tuple[int, ...]
    """[B] counts the images of the same prompt and epoch, from 0."""
    shared_first: bool = False
    """True if all images of a prompt and epoch begin at the same x_T, that of replica 0."""

    def normal(self, step: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draws standard normal noise, [B, *shape] float32.

        numpy draws it on the CPU, so that it is the same on every device and under every version of torch.
        """
        shared = self.shared_first and step == FIRST
        rows = [
            _generator(self.seed, self.stream, self.epoch, p, 0 if shared else r, step).standard_normal(
                tuple(shape), dtype=np.float32
            )
            for p, r in zip(self.prompts, self.replicas, strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(device, non_blocking=True)

    def uniform(self, step: int) -> Tensor:
        """Draws numbers uniform in [0, 1), [B] float64 on the CPU: the quantiles of a normal draw.

        The draw takes a `step` that no other draw of this key may use.
        """
        return torch.special.ndtr(self.normal(step, ()).double())

    def __getitem__(self, rows: Iterable[int]) -> "NoiseKey":
        """Takes the key of some of the images; their noise stays the same."""
        rows = list(rows)
        return replace(
            self, prompts=tuple(self.prompts[r] for r in rows), replicas=tuple(self.replicas[r] for r in rows)
        )


def noise_key(
    prompts: Sequence[str], *, seed: int, stream: str, epoch: int = 0, shared_first: bool = False
) -> NoiseKey:
    """Makes the key of one epoch's whole list of prompts. Equal prompts are numbered in order."""
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
    # A digest of the key seeds a counter-based generator: other keys give independent streams.
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

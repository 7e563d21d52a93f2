"""A tiny policy and noise in float64, for proofs by finite differences."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignlab.engine.conditioning import Conditioning
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from tests.conftest import tiny_policy


@dataclass(frozen=True, kw_only=True)
class Noise64(NoiseKey):
    def normal(self, step, shape, device="cpu"):
        return super().normal(step, shape, device).double()


class Policy64(Policy):
    """The same policy in float64 throughout, whose LoRA may be moved along `direction` for late steps
    only."""

    direction: list[Tensor] | None = None
    late: int = 0  # moved at timesteps <= late

    def encode(self, prompts: Any) -> Conditioning:
        cond = super().encode(prompts)
        return Conditioning(
            text={k: v.double() for k, v in cond.text.items()},
            null={k: v.double() for k, v in cond.null.items()},
        )

    def _denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guided: bool) -> Tensor:
        with self.moved() if self.direction is not None and int(t[0]) <= self.late else torch.enable_grad():
            with torch.set_grad_enabled(self.direction is None and torch.is_grad_enabled()):
                return self.family.denoise(x, t, text)

    @contextmanager
    def moved(self):
        kept = [p.detach().clone() for p in self.parameters()]
        for p, d in zip(self.parameters(), self.direction or [], strict=True):
            p.data += d
        yield
        for p, k in zip(self.parameters(), kept, strict=True):
            p.data = k


def policy64(path: str, *, checkpointing: bool = False) -> Policy64:
    policy = tiny_policy(path, size=0.1)
    policy.__class__, policy.checkpointing = Policy64, checkpointing
    for module in (*policy.family.frozen, policy.family.denoiser):
        module.double()
    return policy


def pixels(images: Tensor) -> Tensor:
    """[B] a smooth reward with a gradient in every pixel."""
    weight = torch.sin(torch.arange(images[0].numel(), dtype=images.dtype)).view(images.shape[1:])
    return ((images - 0.3 * weight) ** 2 * (1 + weight)).mean((1, 2, 3)) * 100

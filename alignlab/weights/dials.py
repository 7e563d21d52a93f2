"""Dials of a tuned model that need no training: how much of the tuning a sample gets.

scale_lora   W + s (alpha/rank) B A
             s = 0 is the base model, 1 the tuned one (DRaFT, arXiv 2309.17400)
Annealed     out_i = g_i tuned_i + (1 - g_i) base_i,   g_i = (i/N)^power at step i of N
             The base model lays out the picture, the tuned one finishes it (Jena et al., arXiv 2409.06493)
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from alignlab.models.lora import adapters

if TYPE_CHECKING:
    from alignlab.engine.conditioning import Conditioning
    from alignlab.engine.policy import Policy
    from alignlab.engine.samplers import Sampler


def scale_lora(policy: "Policy", scale: float) -> None:
    """Sets s of every adapter, for all calls that follow."""
    for layer in adapters(policy.family.denoiser):
        for adapter in layer.active_adapters:
            layer.set_scale(adapter, scale)


class Annealed:
    """A policy whose predictions go over from the base model's to the tuned one's along the trajectory.

    Args:
        policy: everything but the prediction is its own.
        sampler: whose steps are counted.
        power: > 0; large ones stay with the base model longer.
    """

    def __init__(self, policy: "Policy", sampler: "Sampler", power: float) -> None:
        if power <= 0:
            raise ValueError(f"annealing={power} must be positive")
        self.policy, self.sampler, self.power = policy, sampler, power

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def branches(self, x: Tensor, t: Tensor, cond: "Conditioning", guidance_scale: float) -> Tensor:
        """Like `Policy.branches`: [R, M, C, h, w]."""
        tuned = self.policy.branches(x, t, cond, guidance_scale)
        with self.policy.reference():
            base = self.policy.branches(x, t, cond, guidance_scale)
        step = (self.sampler.timesteps[None] - t[:, None]).abs().argmin(1)
        g = ((step / len(self.sampler)) ** self.power).view(1, -1, *[1] * (x.dim() - 1))
        return base + g * (tuned - base)

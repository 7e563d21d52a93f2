"""The denoising error of an image: what the model was trained to lower, and what RWR, SFT, DPO and KTO make
something of.

    e(x) = mean_D (target - out(x_t, t, c))^2,   x_t = alpha_t x + sigma_t eps,
           t uniform over all training timesteps

with the model's own target (eps, v, x0 or velocity: engine/forward_process.py). t and eps are draws of the
image's noise key, so that they are the same whatever micro-batch or process it falls in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.engine.conditioning import Conditioning
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.objectives import Batch, ImagesOf


@dataclass(frozen=True, kw_only=True)
class Examples(Batch):
    """M prompts with S images each: the two of a pair, or one."""

    process: ForwardProcess
    latents: Tensor
    """[S, M, C, h, w]"""
    prompts: tuple[str, ...]
    """[M], "" where it was dropped."""
    noise: NoiseKey
    """Of M examples: it names the timestep and the noise that all images of each share."""

    def named(self) -> ImagesOf:
        return ImagesOf(prompts=self.prompts, replicas=self.noise.replicas)

    @property
    def levels(self) -> Tensor:
        """[M] long on the CPU: the rows of the process's table that t is drawn from."""
        return timestep_rows(self.noise, len(self.process))


def timestep_rows(key: NoiseKey, timesteps: int, draw: int = 0) -> Tensor:
    """[M] long on the CPU, uniform in 0..timesteps-1. `draw` tells the passes over the same key apart."""
    return (key.uniform(-2 - draw) * timesteps).long().clamp(max=timesteps - 1)


def error(
    policy: Policy,
    process: ForwardProcess,
    t: Tensor,
    x0: Tensor,
    noise: Tensor,
    cond: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """e of each of M noised latents x0 [M, C, h, w], at the rows t [M] of the process's table."""
    out = policy.predict(process.noised(t, x0, noise), process.timesteps[t], cond, guidance_scale)
    return (process.target(t, x0, noise) - out).square().mean((1, 2, 3))


def errors(policy: Policy, batch: Examples) -> Tensor:
    """e of every image [S, M], without guidance, by the policy as it is: within `policy.reference()`, by the
    frozen model."""
    s, m, x0 = *batch.latents.shape[:2], batch.latents.flatten(0, 1).to(policy.device)
    t = batch.levels.to(x0.device).repeat(s)
    noise = batch.noise.normal(0, x0.shape[1:], x0.device).repeat(s, 1, 1, 1)
    cond = policy.encode(batch.prompts)[torch.arange(m, device=x0.device).repeat(s)]
    return error(policy, batch.process, t, x0, noise, cond, 1.0).view(s, m)

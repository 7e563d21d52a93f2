"""The schedule of a rectified-flow model whose shift depends on the resolution: at one resolution it is a
constant."""

import math
from typing import Any

import numpy as np


def at_resolution(scheduler: Any, tokens: int) -> Any:
    """A `FlowMatchEulerDiscreteScheduler` that takes the steps of diffusers' own pipelines for images of
    `tokens` latent patches.

    With dynamic shifting the pipelines pass linspace(1, 1/N, N) and mu, linear in the number of tokens; here
    the scheduler knows both. Its `static_shift` is the constant that mu amounts to. Without dynamic shifting
    the scheduler is returned as it is.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return scheduler
    from diffusers import FlowMatchEulerDiscreteScheduler

    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)

    class AtResolution(FlowMatchEulerDiscreteScheduler):
        static_shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

        def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            super().set_timesteps(  # type: ignore[misc]
                sigmas=sigmas, mu=mu, device=device
            )

    return AtResolution.from_config(config)

"""The forward process that the model was trained on: x_t = alpha_t x0 + sigma_t eps, and its target.

RWR, SFT, KTO and DPO train on it; the sampler (samplers.py) runs the other way.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignlab.engine.samplers import Prediction, rows_of


@dataclass(frozen=True, kw_only=True)
class ForwardProcess:
    """Holds the table of noise levels of T training timesteps."""

    timesteps: Tensor
    """[T] the time that the network is given."""
    alpha: Tensor
    """[T] float32, the signal in x_t."""
    sigma: Tensor
    """[T] float32, the noise in x_t."""
    prediction: Prediction
    """What the network predicts."""

    @classmethod
    def of(cls, scheduler: Any) -> "ForwardProcess":
        """Reads a diffusers DDIM/DDPM-like scheduler (alphas_cumprod) or a flow-matching one (sigmas)."""
        if hasattr(scheduler, "alphas_cumprod"):
            abar = scheduler.alphas_cumprod.double().cpu()
            prediction = scheduler.config["prediction_type"]
            return cls(
                timesteps=torch.arange(len(abar)),
                alpha=abar.sqrt().float(),
                sigma=(1 - abar).sqrt().float(),
                prediction=prediction,
            )
        train = int(scheduler.config["num_train_timesteps"])
        sigma = torch.arange(train, 0, -1).double() / train
        shift = getattr(scheduler, "static_shift", scheduler.config.get("shift", 1.0))
        sigma = (shift * sigma / (1 + (shift - 1) * sigma)).float()
        return cls(timesteps=sigma * train, alpha=1 - sigma, sigma=sigma, prediction="flow")

    def to(self, device: torch.device | str) -> "ForwardProcess":
        """Returns the same table on a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            alpha=self.alpha.to(device),
            sigma=self.sigma.to(device),
        )

    def __len__(self) -> int:
        return len(self.alpha)

    def noised(self, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """Adds noise to x0: x_t [M, C, h, w] at table rows t [M] long."""
        return rows_of(self.alpha, t, x0) * x0 + rows_of(self.sigma, t, x0) * noise

    def target(self, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """Computes what the model was trained to predict from x_t, [M, C, h, w].

        It is eps, v = alpha eps - sigma x0, x0, or the flow's velocity eps - x0.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return noise - x0
        return rows_of(self.alpha, t, x0) * noise - rows_of(self.sigma, t, x0) * x0

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """Computes the min-SNR weight of the squared error of each target, [M] at table rows t [M] long.

        With it the loss is min(SNR, gamma) times the squared error of x0 (Hang et al. 2023, arXiv
        2303.09556). The error of x0 is sigma/alpha times that of eps, and sigma times that of v and of the
        velocity.
        """
        alpha, sigma = self.alpha[t], self.sigma[t]
        snr = (alpha / sigma).square()
        scale = {"epsilon": 1 / snr, "sample": torch.ones_like(snr)}.get(self.prediction, sigma.square())
        return snr.clamp(max=gamma) * scale

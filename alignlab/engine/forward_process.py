"""How the model was trained: x_t = alpha_t x0 + sigma_t eps, and what it regresses. RWR, SFT, KTO and DPO
train with it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignlab.engine.samplers import Prediction, rows_of


@dataclass(frozen=True, kw_only=True)
class ForwardProcess:
    """Noise levels over T training timesteps."""

    timesteps: Tensor
    """[T] what the network is told."""
    alpha: Tensor
    sigma: Tensor
    """[T] float32."""
    prediction: Prediction

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
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            alpha=self.alpha.to(device),
            sigma=self.sigma.to(device),
        )

    def __len__(self) -> int:
        return len(self.alpha)

    def noised(self, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """x_t [M, C, h, w] for table rows t [M]."""
        return rows_of(self.alpha, t, x0) * x0 + rows_of(self.sigma, t, x0) * noise

    def target(self, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """What the model was trained to predict from x_t: eps, v, x0, or the flow's velocity eps - x0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return noise - x0
        return rows_of(self.alpha, t, x0) * noise - rows_of(self.sigma, t, x0) * x0

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """[M] the weight of the target's squared error at table rows t that makes of it min(SNR, gamma) times
        that of x0 (Hang et al. 2023, arXiv 2303.09556): x0's error is sigma/alpha times that of eps, and
        sigma times that of v and of the velocity."""
        alpha, sigma = self.alpha[t], self.sigma[t]
        snr = (alpha / sigma).square()
        scale = {"epsilon": 1 / snr, "sample": torch.ones_like(snr)}.get(self.prediction, sigma.square())
        return snr.clamp(max=gamma) * scale

"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): images that people preferred, and those that they did not.

    e(x) = mean_D (target - out(x_t, t, c))^2,   x_t = alpha_t x + sigma_t eps,   t uniform over all training timesteps
    h    = -1/2 [(e_w - e_l)_theta - (e_w - e_l)_ref]        one t and one eps for winner and loser, both models

    sigmoid   L = -log sigmoid(beta h)
    hinge     L = max(0, 1 - beta h)
    ipo       L = (h - 1/(2 beta))^2

Offline: the pairs are given, and nothing is sampled or scored in training. beta stands with the 1/2 and the mean over D = C h w of the
published code (5000 at D = 16384); the paper's formula sums instead (`mse_reduction="sum"`), and the same strength is then beta / D.

Differs from the published code: latents are the mode of the VAE's posterior, not a draw, and so are encoded once; the target is the
model's own (eps, v, x0 or velocity), published: eps; no horizontal flips. The prediction is without guidance, as published.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.data.preferences import preferences
from alignlab.forward import ForwardProcess
from alignlab.noise import NoiseKey, noise_key
from alignlab.objectives import Metrics, Update, one_of
from alignlab.policy import Policy
from alignlab.ranks import own, own_shares
from alignlab.rollout import NothingToLearn, Rollout


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Winners and losers of the same prompts."""

    process: ForwardProcess
    latents: Tensor
    """[2, M, C, h, w], winners first."""
    prompts: tuple[str, ...]
    """[M], "" where it was dropped."""
    noise: NoiseKey
    """Of M pairs: it names their timestep and noise."""


class DPO:
    """Direct preference optimisation on a fixed set of pairs.

    Args:
        data: a .jsonl, .csv or .parquet file of pairs, or a folder with some (data/preferences.py).
        loss: "sigmoid", "hinge" or "ipo".
        beta: how strongly to hold on to the reference: large is near.
        mse_reduction: "mean" (published code) or "sum" (the paper's formula) over the D latent dimensions.
        prompt_dropout: share of the pairs whose prompt is replaced by the empty one, so that guidance goes on working.
        pairs: of each epoch, from shuffled passes over the data.
        updates_per_epoch: optimiser steps among which they are divided.
    """

    needs_noise = False
    needs_gradient = False
    kl_coeff = 0.0

    def __init__(
        self,
        *,
        data: str,
        loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
        beta: float = 5000.0,
        mse_reduction: Literal["mean", "sum"] = "mean",
        prompt_dropout: float = 0.0,
        pairs: int = 16,
        updates_per_epoch: int = 1,
        kl_coeff: float = 0.0,
    ) -> None:
        one_of("loss", loss, ("sigmoid", "hinge", "ipo"))
        one_of("mse_reduction", mse_reduction, ("mean", "sum"))
        if beta <= 0 or not 0 <= prompt_dropout <= 1:
            raise ValueError(f"algo.beta={beta} must be positive and algo.prompt_dropout={prompt_dropout} in [0, 1]")
        if not 1 <= updates_per_epoch <= pairs:
            raise ValueError(f"algo.updates_per_epoch={updates_per_epoch} must be at least 1 and at most algo.pairs={pairs}")
        if kl_coeff:
            raise ValueError(
                f"kl_coeff={kl_coeff}: DPO has no KL term (algo.beta holds it to the reference); leave kl_coeff at 0"
            )
        self.data = preferences(data)
        self.kind, self.beta, self.mse_reduction, self.prompt_dropout = loss, beta, mse_reduction, prompt_dropout
        self.pairs, self.updates_per_epoch = pairs, updates_per_epoch
        self._left = np.empty(0, dtype=np.int64)
        """What remains of the last shuffled pass over the data."""
        self._latents: dict[int, Tensor] = {}

    def plan(self, steps: int, rng: np.random.Generator) -> None:
        return None

    def store(self, steps: int) -> Literal["all", "image"]:
        return "image"

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        n, process = self.pairs, ForwardProcess.of(policy.family.scheduler).to(policy.device)
        while len(self._left) < n:
            self._left = np.concatenate([self._left, rng.permutation(len(self.data))])
        chosen, self._left = self._left[:n].tolist(), self._left[n:]
        # rng is a pure function of (seed, epoch), so these draws are one of (seed, epoch, pair).
        key = noise_key([str(k) for k in chosen], seed=int(rng.integers(2**63)), stream="train/dpo")
        mine, key = [chosen[row] for row in own(n)], key[own(n)]
        for first in range(self.updates_per_epoch):
            positions = torch.arange(first, n, self.updates_per_epoch)  # the order is random already; each process has its part
            batches = (
                (share, self._batch(policy, process, [mine[row] for row in part.tolist()], key[part.tolist()]))
                for share, part in own_shares(positions, n, micro_batch, even=policy.sharded)
            )
            yield Update(batches=batches)

    def loss(self, policy: Policy, batch: Pairs) -> tuple[Tensor, Metrics]:
        m, process, x0 = len(batch.prompts), batch.process, batch.latents.flatten(0, 1)
        t = (batch.noise.uniform(-2) * len(process)).long().clamp(max=len(process) - 1).to(x0.device).repeat(2)
        noise = batch.noise.normal(0, x0.shape[1:], x0.device).repeat(2, 1, 1, 1)
        seen, target = process.noised(t, x0, noise), process.target(t, x0, noise)
        cond = policy.encode(batch.prompts)[torch.arange(m, device=x0.device).repeat(2)]

        def errors() -> Tensor:
            """[2, M] mean over D, without guidance."""
            out = policy.predict(seen, process.timesteps[t], cond, 1.0)
            return (target - out).square().mean((1, 2, 3)).view(2, m)

        with policy.reference(), torch.no_grad():
            reference = errors()
        winner, loser = errors() - reference
        h = -(winner - loser) / 2 * (x0[0].numel() if self.mse_reduction == "sum" else 1)
        if self.kind == "sigmoid":
            loss = -F.logsigmoid(self.beta * h)
        elif self.kind == "hinge":
            loss = F.relu(1 - self.beta * h)
        else:
            loss = (h - 1 / (2 * self.beta)).square()
        h = h.detach()
        metrics = {
            "dpo/implicit_accuracy": ((h > 0) + (h == 0) / 2).mean(),
            "dpo/margin": self.beta * h.mean(),
            "dpo/winner_drift": winner.detach().mean(),
            "dpo/loser_drift": loser.detach().mean(),
        }
        return loss.mean(), metrics

    def _batch(self, policy: Policy, process: ForwardProcess, pairs: list[int], key: NoiseKey) -> Pairs:
        dropped = (key.uniform(-3) < self.prompt_dropout).tolist()
        prompts = tuple("" if drop else self.data.prompts[k] for k, drop in zip(pairs, dropped, strict=True))
        latents = torch.stack([self._encoded(policy, k) for k in pairs], 1).to(policy.device)
        return Pairs(process=process, latents=latents, prompts=prompts, noise=key)

    def _encoded(self, policy: Policy, k: int) -> Tensor:
        """[2, C, h, w] winner and loser of pair k in host memory: encoded once, and alone, so that they do not depend on the batch."""
        if k not in self._latents:
            try:
                images = torch.stack(self.data.images(k, policy.family.image_size))
            except ValueError as error:
                raise NothingToLearn(f"algo.{error}") from None
            with torch.no_grad():
                self._latents[k] = policy.family.encode_images(images.to(policy.device)).cpu()
        return self._latents[k]

    def epoch_metrics(self) -> dict[str, float]:
        return {"dpo/pairs": float(len(self.data)), "dpo/ties": float(self.data.ties)}

    def state_dict(self) -> dict[str, Any]:
        return {"left": torch.from_numpy(self._left.copy()), "pairs": len(self.data)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["pairs"] != len(self.data):
            raise NothingToLearn(
                f"algo.data holds {len(self.data)} pairs, but the run began with {state['pairs']}; give it the same ones, or start anew"
            )
        self._left = state["left"].numpy()

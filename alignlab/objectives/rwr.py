"""RWR, reward-weighted regression (Peters & Schaal 2007; as the baseline of DDPO, arXiv 2305.13301, section
4.1).

    L = w_i mean_D (target - out_theta(x_t, t, c))^2,   x_t = alpha_t x_0 + sigma_t eps,
        t uniform over all training timesteps

on the policy's own samples x_0, with the model's own regression target (eps, v, x0 or velocity).

    sparse   w_i = 1 for rewards at or above a quantile, within each prompt or over the batch, else 0 (the
             sample is skipped)
    dense    w_i = n softmax(r_i / tau)

Differs from the published code: rewards are standardised (over the batch by default) before the softmax,
because a raw inverse temperature leaves an effective sample size near 100 % on one reward and near 0 % on
another (`standardise=false` is the published form); latents come from the rollout instead of re-encoding the
image; the optimiser's state is kept between iterations; samples are shuffled in every inner epoch. The
prediction is guided with the rollout's w, as published.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.distributed.ranks import gathered, own, own_shares
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Rollout
from alignlab.objectives import Batch, ImagesOf, Metrics, Objective, Update, images_of, one_of, split
from alignlab.objectives.advantages import PromptStatistics
from alignlab.objectives.regression import error, timestep_rows


@dataclass(frozen=True, kw_only=True)
class Weighted(Batch):
    """Samples to regress on."""

    rollout: Rollout
    process: ForwardProcess
    rows: Tensor
    """[M] long"""
    weights: Tensor
    """[M] float32"""
    draw: int
    """Which pass over the samples this is: it names the noise and the timesteps."""

    def named(self) -> ImagesOf:
        return replace(images_of(self.rollout), rows=self.rows)


class RWR(Objective):
    """Reward-weighted regression on the policy's own samples.

    Args:
        weighting: "sparse" (at or above a quantile) or "dense" (softmax).
        scope: whether softmax or quantile are taken over the "batch" or within each "prompt".
        temperature: tau of the softmax, in standard deviations when standardise is true.
            [standard deviations]
        quantile: of the sparse rule, in [0, 1). [share of the samples]
        streaming: take the sparse quantile over a running buffer of the last `streaming` rewards (0: this
            epoch's only); it compares raw rewards of the whole batch, so it needs scope="batch" and
            standardise=False. [rewards]
        standardise: standardise rewards with `statistics` first.
        inner_epochs: shuffled passes over the samples, each with fresh timesteps and noise. [passes]
        updates_per_epoch: optimiser steps in each pass. [optimiser steps]
    """

    def __init__(
        self,
        *,
        weighting: Literal["dense", "sparse"] = "sparse",
        scope: Literal["batch", "prompt"] = "prompt",
        temperature: float = 1.0,
        quantile: float = 0.8,
        streaming: int = 0,
        standardise: bool = True,
        inner_epochs: int = 16,
        updates_per_epoch: int = 2,
        kl_coeff: float = 0.0,
        statistics: PromptStatistics | None = None,
    ) -> None:
        one_of("weighting", weighting, ("dense", "sparse"))
        one_of("scope", scope, ("batch", "prompt"))
        if temperature <= 0 or not 0 <= quantile < 1:
            raise ValueError(
                f"algo.temperature={temperature} must be positive and algo.quantile={quantile} in [0, 1)"
            )
        if inner_epochs < 1 or updates_per_epoch < 1 or streaming < 0:
            raise ValueError(
                f"algo.inner_epochs={inner_epochs} and algo.updates_per_epoch={updates_per_epoch} must be at "
                f"least 1, algo.streaming={streaming} at least 0"
            )
        if streaming and (scope == "prompt" or standardise):
            raise ValueError(
                f"algo.streaming={streaming} compares raw rewards of several epochs and prompts; set "
                "algo.scope=batch and algo.standardise=false"
            )
        if kl_coeff:
            raise ValueError(
                f"kl_coeff={kl_coeff}: RWR has no KL term (its temperature bounds the step); leave kl_coeff "
                "at 0"
            )
        self.weighting, self.scope, self.temperature, self.quantile = weighting, scope, temperature, quantile
        self.standardise, self.inner_epochs, self.updates_per_epoch, self.kl_coeff = (
            standardise,
            inner_epochs,
            updates_per_epoch,
            0.0,
        )
        self.statistics = statistics or PromptStatistics(per_prompt=False)
        combine = self.statistics.combine
        if combine != "sum" and (streaming or (combine == "gdpo" and not standardise)):
            key = (
                f"algo.streaming={streaming} compares raw rewards of several epochs"
                if streaming
                else "algo.standardise=false"
            )
            raise ValueError(f"combine={combine} does not go with {key}; set combine=sum, or leave that out")
        self.recent: deque[float] = deque(maxlen=streaming or None)
        self.streaming = streaming
        self._epoch: dict[str, float] = {}

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        data = Rollout.cat(list(rollouts))
        prompts = sum(gathered(data.prompts), ())
        rewards = (
            self.statistics.advantages(prompts, data) if self.standardise else self.statistics.combined(data)
        )
        weights, n = self.weights(prompts, rewards), len(prompts)
        self._epoch = {
            "rwr/effective_sample_size": float(weights.sum() ** 2 / np.square(weights).sum()),
            "rwr/weight_max": float(weights.max()),
        }
        # A sparse weight of 0 costs no forward pass; a dense one that underflowed still counts in the mean.
        used = np.flatnonzero(weights) if self.weighting == "sparse" else np.arange(len(weights))
        scale, process = (
            torch.from_numpy(weights[own(n)]).float(),
            ForwardProcess.of(policy.family.scheduler).to(policy.device),
        )
        for draw in range(self.inner_epochs):
            for piece in split(rng.permutation(len(used)), min(self.updates_per_epoch, len(used))):
                rows = torch.from_numpy(used)[piece]
                batches = (
                    (
                        share,
                        Weighted(rollout=data, process=process, rows=part, weights=scale[part], draw=draw),
                    )
                    for share, part in own_shares(rows, n, micro_batch, even=policy.sharded)
                )
                yield Update(batches=batches)

    def weights(self, prompts: tuple[str, ...], rewards: np.ndarray) -> np.ndarray:
        """[B] float64. Dense weights have mean 1 over each group (the batch, or a prompt); sparse ones are 0
        or 1."""
        out = np.zeros_like(rewards)
        if self.streaming:
            self.recent.extend(rewards.tolist())
        groups = dict.fromkeys(prompts) if self.scope == "prompt" else [None]
        for group in groups:
            rows = np.array([group is None or p == group for p in prompts])
            values = rewards[rows]
            if self.weighting == "dense":
                z = np.exp((values - values.max()) / self.temperature)
                out[rows] = len(values) * z / z.sum()
            else:
                population = np.array(self.recent) if self.streaming else values
                out[rows] = values >= np.quantile(population, self.quantile)
        if not out.any():
            out[np.argmax(rewards)] = (
                1.0  # a streaming quantile that nothing reaches: the best sample stands for the epoch
            )
        return out

    def loss(self, policy: Policy, batch: Weighted) -> tuple[Tensor, Metrics]:
        record, process, rows = batch.rollout, batch.process, batch.rows
        x0 = record.latent(rows, torch.full_like(rows, len(record.sampler))).to(policy.device)
        t, noise = _corruption(record.noise[rows.tolist()], batch.draw, len(process), x0)
        e = error(policy, process, t, x0, noise, record.cond[rows], record.sampler.guidance_scale)
        return (batch.weights.to(e.device) * e).mean(), {"rwr/error": e.detach().mean()}

    def epoch_metrics(self) -> dict[str, float]:
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": self.statistics.state_dict(), "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state["statistics"])
        self.recent = deque(state["recent"], maxlen=self.streaming or None)


def _corruption(key: NoiseKey, draw: int, timesteps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A uniform timestep [M] and noise [M, C, h, w] for each sample, of a stream that the rollout does not
    use."""
    key = replace(key, stream=f"{key.stream}/rwr")
    return timestep_rows(key, timesteps, draw).to(like.device), key.normal(draw, like.shape[1:], like.device)

"""DDPO (Black et al. 2023, arXiv 2305.13301): the sampler is a Markov decision process, each step a Gaussian
action.

    sf   L = -A log p_theta(x_{i+1} | x_i)
         one update on the samples of the present policy
    is   L = max(-A rho, -A clip(rho, e^-c, e^c)),  rho = exp(log p_theta - log p_old)
         several updates an epoch

both averaged over (sample, step) pairs. log p is a mean over the D latent dimensions (as in the published
code), so E[grad L] = -grad E[r] / (N_s D) with raw rewards and N_s scored steps: published learning rates
carry over.

Differs from the paper: the clip is stated at D = 16384 and scaled to the latents at hand (c = clip * 16384 /
D), so that it bounds the same true log-ratio at every resolution; steps with s = 0 are left out; an optional
KL term (DPOK).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.distributed.ranks import gathered, own, own_shares
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import NothingToLearn, Rollout, replay
from alignlab.objectives import Batch, ImagesOf, Metrics, Objective, Update, images_of, one_of, shares, split
from alignlab.objectives.advantages import PromptStatistics

REFERENCE_DIMENSIONS = 16384  # of Stable Diffusion at 512 px, where the published clip of 1e-4 was chosen


@dataclass(frozen=True, kw_only=True)
class Pairs(Batch):
    """Stored (sample, step) pairs and their advantages."""

    rollout: Rollout
    rows: Tensor
    """[M] long"""
    steps: Tensor
    """[M] long"""
    advantages: Tensor
    """[B, N] float32"""

    def named(self) -> ImagesOf:
        return replace(images_of(self.rollout), rows=self.rows, steps=self.steps)


class DDPO(Objective):
    """Policy gradients through the sampler's log-probs.

    Args:
        estimator: "sf" (score function, exactly one update an epoch) or "is" (importance sampling with a
            clipped ratio).
        updates_per_epoch: minibatches of samples in each inner epoch (is only). [optimiser steps]
        inner_epochs: passes over the samples (is only). [passes]
        clip: bound of the log-ratio (mean over D) at D = 16384. [nats per latent dimension]
        clip_scaling: "1/D" bounds the same true log-ratio at every D, "1/sqrtD" the same change per pixel,
            "none" the mean itself.
        timestep_fraction: share of the scored steps trained on, a fresh random subset for each sample and
            inner epoch. [share of the steps]
        advantage_clip: bound of |A|. [standard deviations]
        kl_coeff: weight of the per-step KL to the reference (mean over D), 0 for none.
            [per nat and latent dimension]
        kl_gradient: "direct" differentiates each step's KL at fixed x_i; "exact" also lowers A_i by what
            later steps will pay.
        statistics: the advantages' buffers.
    """

    needs_noise = True

    def __init__(
        self,
        *,
        estimator: Literal["sf", "is"] = "is",
        updates_per_epoch: int = 4,
        inner_epochs: int = 1,
        clip: float = 1e-4,
        clip_scaling: Literal["1/D", "1/sqrtD", "none"] = "1/D",
        timestep_fraction: float = 1.0,
        advantage_clip: float = 5.0,
        kl_coeff: float = 0.0,
        kl_gradient: Literal["direct", "exact"] = "direct",
        statistics: PromptStatistics | None = None,
    ) -> None:
        one_of("estimator", estimator, ("sf", "is"))
        one_of("clip_scaling", clip_scaling, ("1/D", "1/sqrtD", "none"))
        one_of("kl_gradient", kl_gradient, ("direct", "exact"))
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"algo.timestep_fraction={timestep_fraction} is outside (0, 1]")
        if updates_per_epoch < 1 or inner_epochs < 1:
            raise ValueError(
                f"algo.updates_per_epoch={updates_per_epoch} and algo.inner_epochs={inner_epochs} must be at "
                "least 1"
            )
        if kl_coeff < 0:
            raise ValueError(f"kl_coeff={kl_coeff} must not be negative; 0 leaves the penalty out")
        if clip <= 0 or advantage_clip <= 0:
            raise ValueError(f"algo.clip={clip} and algo.advantage_clip={advantage_clip} must be positive")
        self.estimator, self.clip, self.clip_scaling = estimator, clip, clip_scaling
        self.updates_per_epoch = 1 if estimator == "sf" else updates_per_epoch
        self.inner_epochs = 1 if estimator == "sf" else inner_epochs
        self.timestep_fraction, self.advantage_clip = timestep_fraction, advantage_clip
        self.kl_coeff, self.kl_gradient = kl_coeff, kl_gradient
        self.statistics = statistics or PromptStatistics()
        self._epoch: dict[str, float] = {}

    def store(self, steps: int) -> Literal["all", "image"]:
        return "all"

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        data = Rollout.cat(list(rollouts))  # sampled whole before the first update, by one policy
        if self.estimator == "is" and policy.dtype != torch.float32:
            data = replace(data, log_probs=_anchor(policy, data, micro_batch))
        prompts = sum(gathered(data.prompts), ())
        advantages, n = self.statistics.advantages(prompts, data), len(prompts)
        self._epoch = {
            "ddpo/own_statistics": self.statistics.own_share(prompts),
            "ddpo/advantage_mean": float(advantages.mean()),
            "ddpo/advantage_std": float(advantages.std()),
        }
        clipped = torch.from_numpy(advantages).float().clamp(-self.advantage_clip, self.advantage_clip)
        per_step = clipped[own(n), None].repeat(1, len(data.sampler))
        if self.kl_coeff > 0 and self.kl_gradient == "exact":
            per_step -= self.kl_coeff * _later_kl(policy, data, micro_batch)
        scored = data.sampler.scored.cpu().nonzero()[:, 0].numpy()
        if len(scored) == 0:
            raise NothingToLearn(
                "no step of this sampler has a density (s = 0 everywhere), so there is nothing to learn "
                "from; raise sampler.steps"
            )
        chosen = max(1, round(self.timestep_fraction * len(scored)))
        for _ in range(self.inner_epochs):
            for rows in split(rng.permutation(n), min(self.updates_per_epoch, n)):
                steps = torch.from_numpy(
                    np.stack([rng.permutation(scored)[:chosen] for _ in rows])
                )  # [rows, chosen]
                pairs = torch.stack([rows.repeat_interleave(chosen), steps.flatten()], 1)
                batches = (
                    (share, Pairs(rollout=data, rows=part[:, 0], steps=part[:, 1], advantages=per_step))
                    for share, part in own_shares(pairs, n, micro_batch, even=policy.sharded)
                )
                yield Update(batches=batches)

    def loss(self, policy: Policy, batch: Pairs) -> tuple[Tensor, Metrics]:
        record, rows, steps = batch.rollout, batch.rows, batch.steps
        current = replay(policy, record, rows, steps)
        advantage = batch.advantages[rows, steps].to(current.log_prob.device)
        old = record.log_probs[rows.to(record.log_probs.device), steps.to(record.log_probs.device)]
        log_ratio = current.log_prob - old
        if self.estimator == "sf":
            loss = -(advantage * current.log_prob).mean()
        else:
            bound = self.clip_bound(current.x[0].numel())
            ratio = log_ratio.exp()  # 1 before the first update
            loss = torch.maximum(-advantage * ratio, -advantage * log_ratio.clamp(-bound, bound).exp()).mean()
        with torch.no_grad():
            gap = log_ratio.detach()
            metrics = {
                "ddpo/approx_kl": gap.square().mean() / 2,
                "ddpo/log_ratio_max": gap.abs().max(),
                "ddpo/true_log_ratio_max": gap.abs().max() * current.x[0].numel(),
            }
            if self.estimator == "is":
                outside = (gap.abs() > self.clip_bound(current.x[0].numel())).float()
                metrics["ddpo/clip_fraction"] = outside.mean()
                third = (3 * steps // len(record.sampler)).to(outside.device)
                for k, name in enumerate(("early", "middle", "late")):  # thirds of the trajectory
                    metrics[f"ddpo/clip_fraction_{name}"] = outside.masked_fill(third != k, torch.nan)
        if self.kl_coeff > 0:
            kl = _step_kl(policy, record, rows, steps, current.x, current.out).mean()
            loss = loss + self.kl_coeff * kl
            metrics["kl"] = kl.detach()
        return loss, metrics

    def clip_bound(self, dimensions: int) -> float:
        """c: the bound of |log rho| (mean over D) for latents of D = C h w dimensions."""
        ratio = REFERENCE_DIMENSIONS / dimensions
        return self.clip * {"1/D": ratio, "1/sqrtD": ratio**0.5, "none": 1.0}[self.clip_scaling]

    def epoch_metrics(self) -> dict[str, float]:
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state["statistics"])


def _step_kl(policy: Policy, record: Rollout, rows: Tensor, steps: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Computes each pair's KL of one step to the reference, [M], mean over D."""
    rows, steps = rows.to(x.device), steps.to(x.device)
    with policy.reference(), torch.no_grad():
        ref = policy.predict(
            x, record.sampler.timesteps[steps], record.cond[rows], record.sampler.guidance_scale
        )
    return record.sampler.kl(steps, out, ref)


def _all_pairs(record: Rollout, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every scored (sample, step) pair in slices of at most `size`: rows [M], steps [M]."""
    scored = record.sampler.scored.cpu().nonzero()[:, 0]
    for _, part in shares(torch.cartesian_prod(torch.arange(len(record)), scored), size):
        yield part[:, 0], part[:, 1]


@torch.no_grad()
def _anchor(policy: Policy, record: Rollout, micro_batch: int) -> Tensor:
    """Scores the log-probs [B, N] again in batches of the size that trains.

    A 16-bit matrix product depends on its batch size, so without this the first ratio would not be 1.
    """
    log_probs = record.log_probs.clone()
    for rows, steps in _all_pairs(record, micro_batch):
        log_probs[rows, steps] = replay(policy, record, rows, steps).log_prob
    return log_probs


@torch.no_grad()
def _later_kl(policy: Policy, record: Rollout, micro_batch: int) -> Tensor:
    """Sums the KL of all later steps, times D, [B, N].

    log p is a mean over D, so what a step adds to the return counts D times.
    """
    kl = torch.zeros(len(record), len(record.sampler))
    for rows, steps in _all_pairs(record, micro_batch):
        current = replay(policy, record, rows, steps)
        kl[rows, steps] = _step_kl(policy, record, rows, steps, current.x, current.out).to(kl)
    return record.latents[0, 0].numel() * (kl.flip(1).cumsum(1).flip(1) - kl)

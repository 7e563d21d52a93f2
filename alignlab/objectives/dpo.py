"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): images that people preferred, and those that they
did not.

    e(x) = mean_D (target - out(x_t, t, c))^2,   x_t = alpha_t x + sigma_t eps,
           t uniform over all training timesteps
    h    = -1/2 [(e_w - e_l)_theta - (e_w - e_l)_ref],   one t and one eps for winner and loser, both models

    sigmoid   L = -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h),   s: label smoothing, 0 in the paper
    hinge     L = max(0, 1 - beta h)
    ipo       L = (h - 1/(2 beta))^2

Offline: the pairs are given, and nothing is sampled or scored in training (dpo_online.py forms them of the
run's own samples). beta stands with the 1/2 and the mean over D = C h w of the published code (5000 at D =
16384); the paper's formula sums instead (`mse_reduction="sum"`), and the same strength is then beta / D.

Differs from the published code: latents are the mode of the VAE's posterior, not a draw, and so are encoded
once; the target is the model's own (eps, v, x0 or velocity), published: eps; no horizontal flips. The
prediction is without guidance, as published.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.data.preferences import preferences
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Rollout
from alignlab.objectives import Metrics, Objective, Update, one_of
from alignlab.objectives.own_data import Latents, Passes, dealt, refuse, with_dropout
from alignlab.objectives.regression import Examples, errors

HELD = "algo.beta holds it to the reference"


class ImagePairs(Examples):
    """Winners and losers of the same prompts: latents [2, M, C, h, w], winners first."""


class PairLoss:
    """How much pairs contradict the policy, against a reference: the arguments of DPO that say so."""

    def __init__(
        self,
        loss: Literal["sigmoid", "hinge", "ipo"],
        beta: float,
        mse_reduction: Literal["mean", "sum"],
        label_smoothing: float,
    ) -> None:
        one_of("loss", loss, ("sigmoid", "hinge", "ipo"))
        one_of("mse_reduction", mse_reduction, ("mean", "sum"))
        if beta <= 0:
            raise ValueError(f"algo.beta={beta} must be positive")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"algo.label_smoothing={label_smoothing} must be in [0, 0.5): it is the share of labels that "
                "are wrong"
            )
        if label_smoothing and loss != "sigmoid":
            raise ValueError(
                f"algo.label_smoothing={label_smoothing} belongs to algo.loss=sigmoid, not {loss}; leave it "
                "at 0"
            )
        self.kind, self.beta, self.mse_reduction, self.label_smoothing = (
            loss,
            beta,
            mse_reduction,
            label_smoothing,
        )

    def __call__(
        self, policy: Policy, batch: ImagePairs, reference: AbstractContextManager[None]
    ) -> tuple[Tensor, Metrics]:
        """The mean loss of the pairs, and what to log. Inside of `reference` the policy is the reference."""
        with reference, torch.no_grad():
            reference_errors = errors(policy, batch)
        policy_errors = errors(policy, batch)
        winner, loser = policy_errors - reference_errors
        h = -(winner - loser) / 2 * (batch.latents[0, 0].numel() if self.mse_reduction == "sum" else 1)
        if self.kind == "sigmoid":
            s = self.label_smoothing
            loss = -(1 - s) * F.logsigmoid(self.beta * h) - s * F.logsigmoid(-self.beta * h)
        elif self.kind == "hinge":
            loss = F.relu(1 - self.beta * h)
        else:
            loss = (h - 1 / (2 * self.beta)).square()
        h, (winner_error, loser_error) = h.detach(), policy_errors.detach()
        metrics = {
            "dpo/implicit_accuracy": ((h > 0) + (h == 0) / 2).mean(),
            "dpo/margin": self.beta * h.mean(),
            "dpo/winner_error": winner_error.mean(),
            "dpo/loser_error": loser_error.mean(),
            "dpo/winner_drift": winner.detach().mean(),
            "dpo/loser_drift": loser.detach().mean(),
        }
        return loss.mean(), metrics


class DPO(Objective):
    """Direct preference optimisation on a fixed set of pairs.

    Args:
        data: a .jsonl, .csv or .parquet file of pairs, or a folder with some (data/preferences.py).
        background: the colour behind pictures that are transparent in places (data/pictures.py); None is
            white.
        loss: "sigmoid", "hinge" or "ipo".
        beta: how strongly to hold on to the reference: large is near. [1 / mean squared error]
        mse_reduction: "mean" (published code) or "sum" (the paper's formula) over the D latent dimensions.
        label_smoothing: share of the pairs that are taken to be the wrong way round (sigmoid only).
            [share of the pairs]
        prompt_dropout: share of the pairs whose prompt is replaced by the empty one, so that guidance goes on
            working. [share of the pairs]
        pairs: pairs of each epoch, from shuffled passes over the data. [pairs]
        updates_per_epoch: optimiser steps among which they are divided. [optimiser steps]
    """

    learns_from = "preferred images"

    def __init__(
        self,
        *,
        data: str,
        background: str | None = None,
        loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
        beta: float = 5000.0,
        mse_reduction: Literal["mean", "sum"] = "mean",
        label_smoothing: float = 0.0,
        prompt_dropout: float = 0.0,
        pairs: int = 16,
        updates_per_epoch: int = 1,
        kl_coeff: float = 0.0,
    ) -> None:
        self.of_pairs = PairLoss(loss, beta, mse_reduction, label_smoothing)
        refuse("DPO", prompt_dropout, updates_per_epoch, kl_coeff, why=HELD, pairs=pairs)
        self.data = preferences(data, background)
        self.prompt_dropout, self.pairs, self.updates_per_epoch = prompt_dropout, pairs, updates_per_epoch
        self._passes, self._latents = Passes(self.data.examples(), "pairs"), Latents()

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        process = ForwardProcess.of(policy.family.scheduler).to(policy.device)
        chosen = self._passes.draw(self.pairs, rng)

        def batch(places: list[int], key: NoiseKey) -> ImagePairs:
            rows = [chosen[place] for place in places]
            latents = [self._latents(policy, k, partial(self.data.images, k)) for k in rows]
            prompts = with_dropout([self.data.prompts[k] for k in rows], key, self.prompt_dropout)
            return ImagePairs(process=process, latents=torch.stack(latents, 1), prompts=prompts, noise=key)

        names, updates = [str(k) for k in chosen], self.updates_per_epoch
        yield from dealt(
            policy, names, batch, stream="train/dpo", updates=updates, micro_batch=micro_batch, rng=rng
        )

    def loss(self, policy: Policy, batch: ImagePairs) -> tuple[Tensor, Metrics]:
        return self.of_pairs(policy, batch, policy.reference())

    def own_prompts(self) -> Sequence[str]:
        return self.data.prompts

    def epoch_metrics(self) -> dict[str, float]:
        return {"dpo/pairs": float(len(self.data)), "dpo/ties": float(self.data.ties)}

    def state_dict(self) -> dict[str, Any]:
        return self._passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._passes.load_state_dict(state)

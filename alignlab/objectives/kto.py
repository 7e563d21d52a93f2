"""Diffusion-KTO (Li et al. 2024, arXiv 2404.04465): single images that were approved of (y = 1), and those
that were not (y = -1).

    e(x) = mean_D (target - out(x_t, t, c))^2
           without guidance (regression.py)
    g    = e_ref(x) - e_theta(x)
           how much better than the reference the policy has become at this image
    L    = lambda_y (1 - sigmoid(y beta (g - z0)))
           lambda_d for desirable images, lambda_u for undesirable ones

z0 is what g is on average, a constant in the gradient: of two images that gained alike, one is not preferred.

    balanced   (mean of g over the desirable + mean over the undesirable) / 2; if one kind is not there, the
               mean of the other
    clamped    max(0, mean of g over all), as published

over all examples of an optimiser step, whatever the micro-batch and the number of processes. g of all must be
known before the first gradient, so a pass without gradient goes before it, which evaluates the reference too.

Differs from the published code: z0 is that of the whole update (published: of one micro-batch of each
process, 8 images of 2048), and balanced by default; latents are the mode of the VAE's posterior; the target
is the model's own; images come in shuffled passes over all of the data (published: drawn with a share of
desirable ones, 0.8); of the utilities only the sigmoid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.data.labelled import labelled
from alignlab.distributed.ranks import gathered
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Rollout
from alignlab.objectives import Metrics, Objective, Update, one_of
from alignlab.objectives.own_data import Latents, Passes, dealt, refuse, with_dropout
from alignlab.objectives.regression import Examples, errors


@dataclass(frozen=True, kw_only=True)
class Judged(Examples):
    """Images with their labels: latents [1, M, C, h, w]."""

    desirable: Tensor
    """[M] bool"""
    reference: Tensor
    """[M] float32, e of the reference; empty before the pass that measures it."""
    z0: float
    """Of the whole update."""


class KTO(Objective):
    """Kahneman-Tversky optimisation on labelled images.

    Args:
        data: a .jsonl, .csv or .parquet file of labelled images or of pairs, or a folder with some
            (data/labelled.py).
        background: the colour behind pictures that are transparent in places (data/pictures.py); None is
            white.
        beta: how strongly to hold on to the reference: large is near. It stands with the mean over D.
            [1 / mean squared error]
        lambda_d, lambda_u: weights of desirable and undesirable images. [factor]
        z0: "balanced" or "clamped".
        prompt_dropout: share of the images whose prompt is replaced by the empty one, so that guidance goes
            on working. [share of the images]
        images: images of each epoch, from shuffled passes over the data. [images]
        updates_per_epoch: optimiser steps among which they are divided. [optimiser steps]
    """

    learns_from = "labelled images"

    def __init__(
        self,
        *,
        data: str,
        background: str | None = None,
        beta: float = 1000.0,
        lambda_d: float = 1.0,
        lambda_u: float = 1.0,
        z0: Literal["balanced", "clamped"] = "balanced",
        prompt_dropout: float = 0.0,
        images: int = 16,
        updates_per_epoch: int = 1,
        kl_coeff: float = 0.0,
    ) -> None:
        one_of("z0", z0, ("balanced", "clamped"))
        if beta <= 0:
            raise ValueError(f"algo.beta={beta} must be positive")
        if min(lambda_d, lambda_u) < 0 or lambda_d == lambda_u == 0:
            raise ValueError(
                f"algo.lambda_d={lambda_d} and algo.lambda_u={lambda_u} must not be negative, nor both 0"
            )
        why = "algo.beta holds it to the reference"
        refuse("KTO", prompt_dropout, updates_per_epoch, kl_coeff, why=why, images=images)
        self.data, self.beta, self.lambda_d, self.lambda_u, self.z0 = (
            labelled(data, background),
            beta,
            lambda_d,
            lambda_u,
            z0,
        )
        self.prompt_dropout, self.images, self.updates_per_epoch = prompt_dropout, images, updates_per_epoch
        self._passes, self._latents = Passes(self.data.examples(), "images"), Latents()
        self._z0: list[float] = []

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        process = ForwardProcess.of(policy.family.scheduler).to(policy.device)
        chosen, data = self._passes.draw(self.images, rng), self.data
        self._z0 = []

        def batch(places: list[int], key: NoiseKey) -> Judged:
            rows = [chosen[place] for place in places]
            latents = [self._latents(policy, k, partial(data.image, k)) for k in rows]
            prompts = with_dropout([data.prompts[k] for k in rows], key, self.prompt_dropout)
            return Judged(
                process=process,
                latents=torch.stack(latents, 1),
                prompts=prompts,
                noise=key,
                desirable=torch.tensor([data.desirable[k] for k in rows]),
                reference=torch.empty(0),
                z0=0.0,
            )

        names, updates = [str(k) for k in chosen], self.updates_per_epoch
        for update in dealt(
            policy, names, batch, stream="train/kto", updates=updates, micro_batch=micro_batch, rng=rng
        ):
            yield Update(batches=self._measured(policy, list(update.batches)))

    @torch.no_grad()
    def _measured(self, policy: Policy, batches: list[tuple[float, Judged]]) -> list[tuple[float, Judged]]:
        """The micro-batches of one update, with what the reference makes of them, and their common z0."""
        measured, own_gains = [], list[tuple[float, bool]]()
        for share, batch in batches:
            with policy.reference():
                reference = errors(policy, batch)[0]
            g = reference - errors(policy, batch)[0]
            if share:  # a process of a split model that has fewer repeats one
                own_gains += zip(g.cpu().tolist(), batch.desirable.tolist(), strict=True)
            measured.append((share, replace(batch, reference=reference)))
        gains, desirable = zip(*(gain for part in gathered(own_gains) for gain in part), strict=True)
        z0 = self.z0_of(np.array(gains), np.array(desirable))
        self._z0.append(z0)
        return [(share, replace(batch, z0=z0)) for share, batch in measured]

    def z0_of(self, gains: np.ndarray, desirable: np.ndarray) -> float:
        """z0 from g [n] and labels [n] of a whole update. Sums are rounded once, so their order does not
        matter."""
        if self.z0 == "clamped":
            return max(0.0, _mean(gains))
        return _mean([_mean(part) for part in (gains[desirable], gains[~desirable]) if len(part)])

    def loss(self, policy: Policy, batch: Judged) -> tuple[Tensor, Metrics]:
        g = batch.reference - errors(policy, batch)[0]
        good = batch.desirable.to(g.device)
        y, weight = torch.where(good, 1.0, -1.0), torch.where(good, self.lambda_d, self.lambda_u)
        inside = y * self.beta * (g - batch.z0)
        loss = weight * (1 - torch.sigmoid(inside))
        g, inside = g.detach(), inside.detach()
        metrics = {
            "kto/implicit_accuracy": ((inside > 0) + (inside == 0) / 2).mean(),
            "kto/desirable_gain": g.masked_fill(~good, torch.nan),
            "kto/undesirable_gain": g.masked_fill(good, torch.nan),
            "kto/error": (batch.reference - g).mean(),
        }
        return loss.mean(), metrics

    def own_prompts(self) -> Sequence[str]:
        return self.data.prompts

    def epoch_metrics(self) -> dict[str, float]:
        counts = {
            "kto/images": len(self.data),
            "kto/desirable": sum(self.data.desirable),
            "kto/ties": self.data.ties,
        }
        return {name: float(count) for name, count in counts.items()} | (
            {"kto/z0": _mean(self._z0)} if self._z0 else {}
        )

    def state_dict(self) -> dict[str, Any]:
        return self._passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._passes.load_state_dict(state)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return math.fsum(values) / len(values)

"""Online Diffusion-DPO: the loss of dpo.py on pairs of the run's own samples, the better by its reward
against the worse.

    epoch 1, R + 1, 2 R + 1, ...    sample and score, pair the images of each prompt by their rewards
                                    (data/pairing.py)
    every epoch                     one shuffled pass over the pairs at hand, each with a fresh t and eps

R = `resample_every`. x_w and x_l are the latents that were sampled. The reference is the pretrained model,
or, with `ref_update_every` = N, the policy as it is at the beginning of epochs 1, N + 1, 2 N + 1, ...

As in flow_grpo's train_sd3_dpo.py (best against worst, reference updates) and FashionDPO (rounds). Differs
from them: a tie is no pair (flow_grpo trains on candidates 0 and 1 where all rewards are equal); the samples
are drawn with guidance, the loss is without, as DPO's.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.data.pairing import Paired, Pairing, Weighs
from alignlab.distributed.ranks import gathered, rank, whole
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import NothingToLearn, Rollout
from alignlab.objectives import Metrics, Objective, Update
from alignlab.objectives.dpo import HELD, ImagePairs, PairLoss
from alignlab.objectives.own_data import dealt, refuse, with_dropout
from alignlab.objectives.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The pairs at hand, in host memory, the same on every process."""

    latents: Tensor
    """[n, C, h, w] float32, of the images that are in a pair."""
    pairs: Tensor
    """[P, 2] long, rows of winner and loser."""
    prompts: tuple[str, ...]
    """[P]"""
    margin: float
    """Mean of the winners' scores minus the losers'."""


class OnlineDPO(Objective):
    """Direct preference optimisation on pairs of the policy's own samples.

    Args:
        pairing: which sample of a prompt beats which.
        resample_every: R, the epochs that one set of images serves. [epochs]
        ref_update_every: N, the epochs after which the policy becomes the reference; 0 keeps the pretrained
            model. [epochs]
        loss, beta, mse_reduction, label_smoothing, prompt_dropout: as those of `alignlab.objectives.dpo.DPO`.
        updates_per_epoch: optimiser steps among which the pairs are divided, as far as there are pairs.
            [optimiser steps]
    """

    least_per_prompt = 2

    def __init__(
        self,
        *,
        pairing: Pairing | None = None,
        resample_every: int = 1,
        ref_update_every: int = 0,
        loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
        beta: float = 5000.0,
        mse_reduction: Literal["mean", "sum"] = "mean",
        label_smoothing: float = 0.0,
        prompt_dropout: float = 0.0,
        updates_per_epoch: int = 1,
        kl_coeff: float = 0.0,
    ) -> None:
        if resample_every < 1:
            raise ValueError(f"algo.resample_every={resample_every} must be at least 1")
        if ref_update_every < 0:
            raise ValueError(
                f"algo.ref_update_every={ref_update_every} must not be negative; 0 keeps the pretrained model"
            )
        self.of_pairs = PairLoss(loss, beta, mse_reduction, label_smoothing)
        refuse("OnlineDPO", prompt_dropout, updates_per_epoch, kl_coeff, why=HELD)
        self.pairing, self.resample_every, self.ref_update_every = (
            pairing or Pairing(),
            resample_every,
            ref_update_every,
        )
        self.prompt_dropout, self.updates_per_epoch = prompt_dropout, updates_per_epoch
        self.reference, self.ties = Snapshot(), 0
        self.swaps_weights = ref_update_every > 0
        self.pool: Pool | None = None
        self.epochs = 0
        """Begun so far."""

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        if self.epochs % self.resample_every == 0:
            self._resample(Rollout.cat(list(rollouts)))
        if self.ref_update_every and self.epochs % self.ref_update_every == 0:
            self.reference.take(policy)
        self.epochs += 1
        process, pool = ForwardProcess.of(policy.family.scheduler).to(policy.device), self.pool
        assert pool is not None
        chosen = rng.permutation(len(pool.pairs)).tolist()

        def batch(places: list[int], key: NoiseKey) -> ImagePairs:
            rows = [chosen[place] for place in places]
            prompts = with_dropout([pool.prompts[k] for k in rows], key, self.prompt_dropout)
            return ImagePairs(
                process=process, latents=pool.latents[pool.pairs[rows].T], prompts=prompts, noise=key
            )

        names, updates = [str(k) for k in chosen], self.updates_per_epoch
        yield from dealt(
            policy, names, batch, stream="train/dpo", updates=updates, micro_batch=micro_batch, rng=rng
        )

    def loss(self, policy: Policy, batch: ImagePairs) -> tuple[Tensor, Metrics]:
        return self.of_pairs(policy, batch, self.reference.reference(policy))

    def paired(self, prompts: tuple[str, ...], data: Rollout) -> Paired:
        """The pairs of the samples of all processes, whose prompts these are; `data` are this process's.

        They are ranked by the reward that is maximised elsewhere, the weighted sum. Where each reward counts
        by itself (normalised by the pairing, weighted by it, or for dominance), they are ranked by the raw
        ones, with the rewards' weights where the pairing has no other.
        """
        assert data.reward is not None
        how = copy.copy(self.pairing)
        if isinstance(how, Pairing) and how.normalise == "none" and how.rule != "pareto" and not how.weights:
            return how(prompts, {"reward": whole(data.reward.double())})
        chosen = how.weights if isinstance(how, Weighs) else None  # a rule of the user's own may have none
        how.weights = {**data.weights, **(chosen or {})}
        return how(prompts, {name: whole(values.double()) for name, values in data.rewards.items()})

    def _resample(self, data: Rollout) -> None:
        """Pairs of the epoch's samples take the place of those at hand; if there are none, these stay."""
        prompts = sum(gathered(data.prompts), ())
        try:
            paired = self.paired(prompts, data)
        except ValueError as error:
            raise NothingToLearn(f"algo.pairing.{error}") from None
        self.ties = paired.ties
        if not paired.pairs:
            sentence = (
                f"{len(prompts)} images of {len(set(prompts))} prompts make no pair by algo.pairing "
                f"({paired.ties} ties)"
            )
            if self.pool is None:
                raise NothingToLearn(
                    f"{sentence}; lower algo.pairing.margin, raise prompts.per_prompt, or choose another "
                    "reward"
                )
            if rank() == 0:
                print(
                    f"warning: epoch {self.epochs + 1}: {sentence}; the pairs of before are trained on",
                    file=sys.stderr,
                )
            return
        rows = torch.arange(len(data))
        x0 = whole(data.latent(rows, torch.full_like(rows, len(data.sampler))))
        pairs = torch.tensor([(pair.winner, pair.loser) for pair in paired.pairs])
        used, places = pairs.unique(return_inverse=True)
        self.pool = Pool(
            latents=x0[used],
            pairs=places,
            prompts=tuple(prompts[pair.winner] for pair in paired.pairs),
            margin=float(np.mean([pair.margin for pair in paired.pairs])),
        )

    def epoch_metrics(self) -> dict[str, float]:
        if self.pool is None:
            return {}
        return {
            "dpo/pairs": float(len(self.pool.pairs)),
            "dpo/ties": float(self.ties),
            "dpo/score_margin": self.pool.margin,
            "dpo/age": float((self.epochs - 1) % self.resample_every),
        }

    def state_dict(self) -> dict[str, Any]:
        pool: dict[str, Any] = {} if self.pool is None else {**vars(self.pool)}
        return {
            "epochs": self.epochs,
            "ties": self.ties,
            "pool": pool,
            "reference": self.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.ties, pool = state["epochs"], state["ties"], state["pool"]
        self.pool = Pool(**pool) if pool else None
        self.reference.load_state_dict(state["reference"])

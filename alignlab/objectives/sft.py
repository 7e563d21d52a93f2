"""SFT, supervised fine-tuning: the model's own training loss on captioned images, as a first stage or a
baseline.

    L = w(t) mean_D (target - out(x_t, t, c))^2,   x_t = alpha_t x + sigma_t eps,
        t uniform over all training timesteps

with the model's own target (eps, v, x0 or velocity) and without guidance (regression.py). w = 1, or with
`min_snr` (Hang et al. 2023, arXiv 2303.09556) what makes of it min(SNR, gamma) times the error of x0, SNR =
alpha^2/sigma^2.

Its population minimiser is the exact denoiser of the images' distribution. Nothing holds it to the pretrained
model: the number of epochs and the learning rate do. Left out: offset noise, other laws of t, random crops
and flips, training of the text encoder.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.data.captioned import captioned
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import NothingToLearn, Rollout
from alignlab.objectives import Metrics, Objective, Update
from alignlab.objectives.own_data import Latents, dealt, refuse, with_dropout
from alignlab.objectives.regression import Examples, errors


class SFT(Objective):
    """Supervised fine-tuning on captioned images.

    Args:
        data: what the images are (data/captioned.py).
        split: of a dataset, or the folder's of that name.
        image_column, caption_column: of a table or dataset; None looks for the usual names.
        streaming: read shards or a dataset in order, instead of knowing all examples at once; then no latents
            are kept.
        shuffle_buffer: examples of a stream that are shuffled among themselves. [images]
        background: the colour behind pictures that are transparent in places (data/pictures.py); None is
            white.
        min_snr: gamma of the min-SNR weighting; None weighs all timesteps alike. [signal-to-noise ratio]
        prompt_dropout: share of the images whose caption is replaced by the empty one, so that guidance goes
            on working. [share of the images]
        images: images of each epoch, from shuffled passes over the data. [images]
        updates_per_epoch: optimiser steps among which they are divided. [optimiser steps]
    """

    learns_from = "captioned images"

    def __init__(
        self,
        *,
        data: str,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        background: str | None = None,
        min_snr: float | None = None,
        prompt_dropout: float = 0.0,
        images: int = 16,
        updates_per_epoch: int = 1,
        kl_coeff: float = 0.0,
    ) -> None:
        if min_snr is not None and min_snr <= 0:
            raise ValueError(f"algo.min_snr={min_snr} must be positive; null weighs all timesteps alike")
        why = "lr and steps bound how far it goes"
        refuse("SFT", prompt_dropout, updates_per_epoch, kl_coeff, why=why, images=images)
        which = {"split": split, "image_column": image_column, "caption_column": caption_column}
        how = {"streaming": streaming, "shuffle_buffer": shuffle_buffer, "background": background}
        self.data = captioned(data, **which, **how)
        self.min_snr, self.prompt_dropout = min_snr, prompt_dropout
        self.images, self.updates_per_epoch = images, updates_per_epoch
        self._latents = Latents(keep=self.data.size is not None)

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        process = ForwardProcess.of(policy.family.scheduler).to(policy.device)
        try:
            chosen = self.data.draw(self.images, int(rng.integers(2**63)))
        except ValueError as error:
            raise NothingToLearn(f"algo.{error}") from None

        def batch(places: list[int], key: NoiseKey) -> Examples:
            examples = [chosen[place] for place in places]
            latents = [self._latents(policy, example.key, example.image) for example in examples]
            prompts = with_dropout([example.caption for example in examples], key, self.prompt_dropout)
            return Examples(process=process, latents=torch.stack(latents, 1), prompts=prompts, noise=key)

        names, updates = [example.key for example in chosen], self.updates_per_epoch
        yield from dealt(
            policy, names, batch, stream="train/sft", updates=updates, micro_batch=micro_batch, rng=rng
        )

    def loss(self, policy: Policy, batch: Examples) -> tuple[Tensor, Metrics]:
        (e,) = errors(policy, batch)
        snr = self.min_snr
        loss = e if snr is None else batch.process.min_snr(batch.levels.to(e.device), snr) * e
        third = (3 * batch.levels // len(batch.process)).to(e.device)
        order = (
            reversed if batch.process.sigma[0] > batch.process.sigma[-1] else list
        )  # row 0 of a flow is pure noise
        metrics = {"sft/error": e.detach().mean()}
        for k, name in enumerate(order(("low_noise", "middle_noise", "high_noise"))):
            metrics[f"sft/error_{name}"] = e.detach().masked_fill(third != k, torch.nan)
        return loss.mean(), metrics

    def own_prompts(self) -> Sequence[str]:
        return self.data.prompts

    def epoch_metrics(self) -> dict[str, float]:
        return (
            {}
            if self.data.size is None
            else {"sft/images": float(self.data.size), "sft/ties": float(self.data.ties)}
        )

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.data.load_state_dict(state)
        except ValueError as error:
            raise NothingToLearn(f"algo.{error}") from None

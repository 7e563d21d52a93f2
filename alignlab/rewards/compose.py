"""Several rewards as one: a weighted sum of raw or normalised values."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignlab.rewards import Reward


class RewardError(ValueError):
    """A reward returned something that is no reward."""


class NonFinite(RewardError):
    """A reward is infinite or no number for some of a batch's images.

    Args:
        name: of the reward.
        values: [B] what it returned.
        rows: of the images, ascending.
    """

    def __init__(self, name: str, values: Tensor, prompts: Sequence[str], rows: Sequence[int]) -> None:
        self.name, self.value, self.rows = name, values[rows[0]].item(), tuple(rows)
        many = f"({len(rows)} of {len(prompts)} images)"
        super().__init__(f"reward {name} is {self.value} for image {rows[0]} of prompt {prompts[rows[0]]!r} {many}")


class WeightedSum:
    """sum_k weight_k r_k, where a normalised r_k is (r_k - mean_k)/std_k over the base model's evaluation images.

    The statistics are constants of the run: the sum stays differentiable and means the same in every epoch and run.

    Args:
        rewards, weights: by name.
        normalize: names of the rewards to be normalised; `calibrate` must be called before `combine`.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float], normalize: Collection[str] = ()) -> None:
        unknown = sorted((set(weights) | set(normalize)) ^ set(rewards))
        if unknown:
            raise ValueError(f"rewards and weights name different things: {', '.join(unknown)}")
        self.rewards, self.weights, self.normalize = dict(rewards), dict(weights), set(normalize)
        self.statistics: dict[str, tuple[float, float]] = {}
        self.queries = 0
        """Images scored so far."""

    @property
    def differentiable(self) -> bool:
        return all(r.differentiable for r in self.rewards.values())

    @property
    def unit(self) -> str:
        parts = [f"{self.weights[n]:g} x {n} ({'base sd' if n in self.normalize else r.unit})" for n, r in self.rewards.items()]
        alone = list(self.rewards.values())
        plain = len(alone) == 1 and set(self.weights.values()) == {1} and not self.normalize
        return alone[0].unit if plain else " + ".join(parts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total [B] and each reward [B] in its own unit."""
        raw = self.score(images, prompts)
        return self.combine(raw), raw

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward [B] in its own unit, checked."""
        self.queries += len(prompts)
        return {name: _checked(name, reward(images, prompts), prompts).to(images.device) for name, reward in self.rewards.items()}

    def combine(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of raw rewards."""
        total = torch.zeros_like(next(iter(raw.values())))
        for name, weight in self.weights.items():
            value = raw[name]
            if name in self.normalize:
                if name not in self.statistics:
                    raise RewardError(f"reward {name} is to be normalised, but calibrate() was not called")
                mean, std = self.statistics[name]
                value = (value - mean) / std
            total = total + weight * value
        return total

    def calibrate(self, raw: Mapping[str, Tensor]) -> None:
        """Fixes the statistics of the normalised rewards from raw values [n] of the base model."""
        for name in sorted(self.normalize):
            values = raw[name].double()
            if not len(values) or not values.isfinite().all():
                raise RewardError(
                    f"reward {name} is to be normalised, which needs finite values; it was given {values.tolist()[:4]} ..."
                )
            mean, std = values.mean().item(), values.std(correction=0).item()
            if std == 0:
                raise RewardError(
                    f"reward {name} is {mean:g} for all of the base model's images, so it cannot be normalised; set reward.{name}.normalize=false"
                )
            self.statistics[name] = (mean, std)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(pair) for name, pair in self.statistics.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics = {name: (pair[0], pair[1]) for name, pair in state.items()}


def _checked(name: str, values: Any, prompts: Sequence[str]) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(
            f"reward {name} returned {got} for {len(prompts)} images; it must return a tensor of shape ({len(prompts)},)"
        )
    values = values.float()
    bad = (~values.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise NonFinite(name, values, prompts, bad)
    return values

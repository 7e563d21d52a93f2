"""Advantages: rewards relative to what the same prompt earned before (Black et al. 2023, section 4).

    A = (r - mean_p) / (std_p + 1e-6)

Several rewards r_k with weights w_k are combined before this standardisation, or after it (gdpo). mean, std
and rank below are taken over the epoch's whole batch:

    sum      A = standardised R,  R = sum_k w_k r_k, where a r_k may be in standard deviations of the base
             model (rewards/compose.py)
    zscore   A = standardised R,  R = sum_k w_k (r_k - mean)/std
    rank     A = standardised R,  R = sum_k w_k rank(r_k), from 0, the lowest, to 1; equal rewards share the
             mean of their ranks
    gdpo     A = Z / (std(Z) + 1e-6) about its mean,  Z = sum_k w_k A_k, each A_k standardised by itself

In a sum the reward with the largest spread decides, and in a sum standardised once it still decides within a
prompt where it alone varies a lot. GDPO (group reward-decoupled normalisation, Liu et al. 2026, arXiv
2601.05242) gives each reward its own standard deviation within the prompt, so that weights are the only thing
that sets their influence.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignlab.data.ranks import ranks
from alignlab.distributed.ranks import whole
from alignlab.engine.rollout import Rollout

Values = NDArray[np.float64]
COMBINATIONS = ("sum", "zscore", "rank", "gdpo")


class PromptStatistics:
    """Keeps a buffer of recent rewards for each prompt, across epochs and in checkpoints.

    Args:
        buffer_size: rewards kept for each prompt. [rewards]
        min_count: below this many, the mean and standard deviation of the whole batch are used. [rewards]
        per_prompt: False uses the batch's always.
        combine: how several rewards become one. What is logged as the reward stays their weighted sum.
    """

    def __init__(
        self,
        *,
        buffer_size: int = 32,
        min_count: int = 16,
        per_prompt: bool = True,
        combine: Literal["sum", "zscore", "rank", "gdpo"] = "sum",
    ) -> None:
        if combine not in COMBINATIONS:
            raise ValueError(f"combine={combine} is not one of {', '.join(COMBINATIONS)}")
        if min_count > buffer_size:
            raise ValueError(
                f"min_count={min_count} exceeds buffer_size={buffer_size}, so no prompt would ever use its "
                "own statistics"
            )
        self.buffer_size, self.min_count, self.per_prompt = buffer_size, min_count, per_prompt
        self.combine = combine
        self.rewards: dict[str, deque[float]] = {}
        self.parts: dict[str, PromptStatistics] = {}
        """The buffers of each reward, for gdpo."""

    def advantages(self, prompts: Sequence[str], data: Rollout) -> Values:
        """Computes the advantages of the samples of all processes, [B] float64.

        Args:
            prompts: [B] of all processes, in their order.
            data: the samples of this process.
        """
        if self.combine != "gdpo" or len(data.rewards) == 1:
            return self.standardise(prompts, self.combined(data))
        return self.decoupled(prompts, _by_name(data), data.weights)

    def combined(self, data: Rollout) -> Values:
        """Combines several rewards into one by sum, zscore or rank, [B] float64."""
        assert data.reward is not None
        if self.combine in ("sum", "gdpo"):
            total: Values = whole(data.reward.double()).numpy()
            return total
        scale = ranks if self.combine == "rank" else _about_the_mean
        return weighted({name: scale(values) for name, values in _by_name(data).items()}, data.weights)

    def decoupled(
        self, prompts: Sequence[str], rewards: Mapping[str, Values], weights: Mapping[str, float]
    ) -> Values:
        """Computes GDPO's advantages [B] from rewards [B]: each is standardised by itself, then their sum."""
        for name in rewards:
            self.parts.setdefault(name, self._part())
        return _about_the_mean(
            weighted({name: self.parts[name].standardise(prompts, r) for name, r in rewards.items()}, weights)
        )

    def standardise(self, prompts: Sequence[str], rewards: Sequence[float] | np.ndarray) -> np.ndarray:
        """Standardises the rewards of the whole batch (never of a micro-batch), [B] float64.

        The rewards enter the buffers first, so a prompt's statistics include them.
        """
        values = np.asarray(rewards, dtype=np.float64)
        if not self.per_prompt:
            return _about_the_mean(values)
        for prompt, value in zip(prompts, values, strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(float(value))
        out = np.empty_like(values)
        for prompt in dict.fromkeys(prompts):
            rows = np.array([p == prompt for p in prompts])
            buffer = self.rewards[prompt]
            population = np.array(buffer) if len(buffer) >= self.min_count else values
            out[rows] = (values[rows] - population.mean()) / (population.std() + 1e-6)
        return out

    def _part(self) -> "PromptStatistics":
        return PromptStatistics(
            buffer_size=self.buffer_size, min_count=self.min_count, per_prompt=self.per_prompt
        )

    def own_share(self, prompts: Sequence[str]) -> float:
        """Computes the share of the prompts whose buffers are full enough to be used."""
        buffers = next(iter(self.parts.values()), self).rewards
        ready = [self.per_prompt and len(buffers.get(p, ())) >= self.min_count for p in prompts]
        return float(np.mean(ready))

    def state_dict(self) -> dict[str, Any]:
        if self.parts:
            return {name: part.state_dict() for name, part in self.parts.items()}
        return {prompt: list(values) for prompt, values in self.rewards.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if any(isinstance(values, dict) for values in state.values()):
            self.parts = {name: self._part() for name in state}
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        else:
            self.rewards = {
                prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()
            }


def weighted(values: Mapping[str, Values], weights: Mapping[str, float]) -> Values:
    """sum_k w_k v_k, [B]."""
    return np.sum([weights[name] * v for name, v in values.items()], 0)


def _about_the_mean(values: Values) -> Values:
    out: Values = (values - values.mean()) / (values.std() + 1e-6)
    return out


def _by_name(data: Rollout) -> dict[str, Values]:
    """Each reward [B] float64, over all processes."""
    return {name: whole(values.double()).numpy() for name, values in data.rewards.items()}

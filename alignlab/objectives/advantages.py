"""Rewards relative to what the same prompt earned before: (r - mean_p) / (std_p + 1e-6), Black et al. 2023, section 4."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np


class PromptStatistics:
    """A buffer of recent rewards for each prompt. Lives across epochs and in checkpoints.

    Args:
        buffer_size: rewards kept for each prompt.
        min_count: below this many, the mean and standard deviation of the whole batch are used.
        per_prompt: False uses the batch's always.
    """

    def __init__(self, *, buffer_size: int = 32, min_count: int = 16, per_prompt: bool = True) -> None:
        if min_count > buffer_size:
            raise ValueError(
                f"min_count={min_count} exceeds buffer_size={buffer_size}, so no prompt would ever use its own statistics"
            )
        self.buffer_size, self.min_count, self.per_prompt = buffer_size, min_count, per_prompt
        self.rewards: dict[str, deque[float]] = {}

    def standardise(self, prompts: Sequence[str], rewards: Sequence[float] | np.ndarray) -> np.ndarray:
        """[B] float64: standardised rewards of the whole batch (never of a micro-batch). The buffers take these rewards in first."""
        values = np.asarray(rewards, dtype=np.float64)
        if not self.per_prompt:
            return (values - values.mean()) / (values.std() + 1e-6)
        for prompt, value in zip(prompts, values, strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(float(value))
        out = np.empty_like(values)
        for prompt in dict.fromkeys(prompts):
            rows = np.array([p == prompt for p in prompts])
            buffer = self.rewards[prompt]
            known = np.array(buffer) if len(buffer) >= self.min_count else values
            out[rows] = (values[rows] - known.mean()) / (known.std() + 1e-6)
        return out

    def own_share(self, prompts: Sequence[str]) -> float:
        """Share of the prompts that use statistics of their own."""
        ready = [self.per_prompt and len(self.rewards.get(p, ())) >= self.min_count for p in prompts]
        return float(np.mean(ready))

    def state_dict(self) -> dict[str, Any]:
        return {prompt: list(values) for prompt, values in self.rewards.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}

"""What an objective is. One file a family; the train loop knows only this page.

An objective consumes a lazy stream of scored rollouts and yields optimiser updates. DRaFT turns each rollout into one
micro-batch and so holds one graph at a time; DDPO and RWR exhaust the stream, shuffle and slice; DPO, KTO and SFT have data of their
own (own_data.py) and leave the stream alone; online DPO does the one or the other. Nothing here knows a model family, a scheduler or a config.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Gradients, Rollout

Metrics = dict[str, Tensor]
"""Of one micro-batch: scalars, or [M] one value a pair with nan where it has none. They are averaged with the micro-batches'
weights; names ending in _max keep the largest."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimiser step: micro-batches, drawn lazily, each with its share of the loss (the shares sum to 1)."""

    batches: Iterable[tuple[float, Any]]


class Objective(Protocol):
    """An objective may also say `least_per_prompt`, the images of a prompt without which it has nothing to compare, `swaps_weights`,
    if it puts other weights in the policy's place, and `learns_from`, what its own data are (for a model card)."""

    needs_noise: bool
    """True if it needs log-probs, so a sampler with eta > 0."""
    needs_gradient: bool
    """True if it differentiates the reward."""
    kl_coeff: float

    def plan(self, steps: int, rng: np.random.Generator) -> Gradients | None:
        """Which of `steps` sampler steps keep their graph in the next rollout; None for none."""

    def store(self, steps: int) -> Literal["all", "image"]:
        """Which latents the rollouts must keep."""

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        """The updates of one epoch. `rollouts` runs the sampler as it is consumed; what trains on data of its own leaves it alone, and
        the epoch then has no reward."""

    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        """The mean loss of one micro-batch, and what to log. Backward, accumulation and clipping are the loop's."""

    def epoch_metrics(self) -> dict[str, float]:
        """What was measured once for the whole epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs. Its tensors do not change in place afterwards."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def shares(items: Sequence[Any] | Tensor, size: int) -> Iterator[tuple[float, Any]]:
    """Slices of at most `size` with their share of the whole."""
    for k in range(0, len(items), size):
        part = items[k : k + size]
        yield len(part) / len(items), part


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"algo.{key}={value} is not one of {', '.join(choices)}")


def split(order: np.ndarray, parts: int) -> list[Tensor]:
    """A permutation cut into `parts` nearly equal pieces."""
    return [torch.from_numpy(piece) for piece in np.array_split(order, parts)]

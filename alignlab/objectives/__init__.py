"""What an objective is. One file a family; the train loop knows only this page.

An objective consumes a lazy stream of scored rollouts and yields optimiser updates. DRaFT turns each rollout
into one micro-batch and so holds one graph at a time; DDPO and RWR exhaust the stream, shuffle and slice;
DPO, KTO and SFT have data of their own (own_data.py) and leave the stream alone; online DPO does the one or
the other. Nothing here knows a model family, a scheduler or a config.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Gradients, Rollout

Metrics = dict[str, Tensor]
"""Of one micro-batch: scalars, or [M] one value a pair with nan where it has none. They are averaged with the
micro-batches' weights; names ending in _max keep the largest."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimiser step: micro-batches, drawn lazily, each with its share of the loss (the shares sum to
    1)."""

    batches: Iterable[tuple[float, Any]]


@dataclass(frozen=True, kw_only=True)
class ImagesOf:
    """Which images a micro-batch is of, to name them in a message. It holds no graph."""

    prompts: tuple[str, ...] = ()
    replicas: tuple[int, ...] = ()
    """[B] which image of its prompt each one is."""
    rows: Tensor | None = None
    """[M] long: which of these images; None for all, once each."""
    steps: Tensor | None = None
    """[M] long: at which sampler step; None where that has no meaning."""


class Batch(ABC):
    """A micro-batch that can name its images. What an objective yields may be of any type; one that inherits
    from this is named in messages about a loss that is not finite."""

    @abstractmethod
    def named(self) -> ImagesOf:
        """Its images."""


def images_of(batch: Any) -> ImagesOf:
    """The images of a micro-batch: of a rollout, of a `Batch`, or none that are known."""
    if isinstance(batch, Rollout):
        return ImagesOf(prompts=batch.prompts, replicas=batch.noise.replicas)
    return batch.named() if isinstance(batch, Batch) else ImagesOf()


class Objective(ABC):
    """What the train loop asks of an algorithm. A new one writes `updates` and `loss`, or `loss` alone if it
    inherits from another; what is not said here no part of the package asks for."""

    needs_noise: bool = False
    """True if it needs log-probs, so a sampler with eta > 0."""
    needs_gradient: bool = False
    """True if it differentiates the reward."""
    kl_coeff: float = 0.0
    """Weight of its distance to the frozen model; 0 for an algorithm that has none.
    [per unit of the distance]"""
    least_per_prompt: int = 1
    """Images of a prompt without which it has nothing to compare."""
    swaps_weights: bool = False
    """True if it puts other weights in the policy's place, which a split model does not allow."""
    learns_from: str | None = None
    """What its own data are, for a model card; None if it learns from rollouts."""

    @abstractmethod
    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        """The updates of one epoch. `rollouts` runs the sampler as it is consumed; what trains on data of its
        own leaves it alone, and the epoch then has no reward."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        """The mean loss of one micro-batch, and what to log. Backward, accumulation and clipping are the
        loop's."""

    def plan(self, steps: int, rng: np.random.Generator) -> Gradients | None:
        """Which of `steps` sampler steps keep their graph in the next rollout; None for none.

        Raises:
            ValueError: if it cannot work with so many steps.
        """
        return None

    def store(self, steps: int) -> Literal["all", "image"]:
        """Which latents the rollouts must keep."""
        return "image"

    def own_prompts(self) -> Sequence[str]:
        """The prompts of its own data, to be told if the model's tokenizer cuts them."""
        return ()

    def epoch_metrics(self) -> dict[str, float]:
        """What was measured once for the whole epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs. Its tensors do not change in place afterwards."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  nothing to do where state_dict is empty
        """Goes on from what `state_dict` gave."""


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

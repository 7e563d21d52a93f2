"""The interface of an objective, which is all that the train loop knows of an algorithm.

An objective consumes a lazy stream of scored rollouts and yields optimiser updates. DRaFT turns each rollout
into one micro-batch and so holds one graph at a time. DDPO and RWR exhaust the stream, shuffle and slice.
DPO, KTO and SFT train on data of their own (own_data.py) and leave the stream alone. Online DPO exhausts the
stream in the epochs that sample new pairs. Nothing here knows a model family, a scheduler or a configuration.
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
"""What one micro-batch logs: scalars, or [M] one value a pair, with nan for a pair that has none. They are
averaged with the micro-batches' shares; of a name that ends in _max the largest is kept."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Describes one optimiser step."""

    batches: Iterable[tuple[float, Any]]
    """(share of the loss, micro-batch), drawn lazily; the shares of all processes sum to 1."""


@dataclass(frozen=True, kw_only=True)
class ImagesOf:
    """Names the images of a micro-batch for a message. It holds no graph."""

    prompts: tuple[str, ...] = ()
    replicas: tuple[int, ...] = ()
    """[B] which image of its prompt each one is."""
    rows: Tensor | None = None
    """[M] long: the index of each row's image; None if each image is there once."""
    steps: Tensor | None = None
    """[M] long: the sampler step of each row; None if rows have no step."""


class Batch(ABC):
    """A micro-batch that can name its images in a message about a loss that is not finite.

    An objective may yield micro-batches of any other type too; their images are then not named.
    """

    @abstractmethod
    def named(self) -> ImagesOf:
        """Names the images of the micro-batch."""


def images_of(batch: Any) -> ImagesOf:
    """Names the images of a micro-batch if it is a `Rollout` or a `Batch`; of others none are known."""
    if isinstance(batch, Rollout):
        return ImagesOf(prompts=batch.prompts, replicas=batch.noise.replicas)
    return batch.named() if isinstance(batch, Batch) else ImagesOf()


class Objective(ABC):
    """An algorithm, as the train loop sees it.

    A new algorithm writes `updates` and `loss`, or `loss` alone if it inherits from another algorithm. The
    package uses no other members than these.
    """

    needs_noise: bool = False
    """True if the algorithm needs log-probs, and so a sampler with eta > 0."""
    needs_gradient: bool = False
    """True if the algorithm differentiates the reward."""
    kl_coeff: float = 0.0
    """Weight of the penalty on the distance to the frozen model; 0 for an algorithm that has none.
    [per unit of the distance]"""
    least_per_prompt: int = 1
    """The fewest images of one prompt that the algorithm can compare."""
    swaps_weights: bool = False
    """True if the algorithm puts other weights into the policy, which policy.shard does not allow."""
    learns_from: str | None = None
    """Names the algorithm's own data in the model card; None if it learns from rollouts."""

    @abstractmethod
    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        """Yields the updates of one epoch, one optimiser step each.

        Args:
            rollouts: samples and scores as it is consumed. An algorithm with data of its own does not consume
                it, and the epoch then logs no reward.
            micro_batch: the most samples or pairs in one micro-batch.
            rng: the epoch's generator; every random choice must come from it, so that a resume repeats it.
        """

    @abstractmethod
    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        """Computes the mean loss of one micro-batch [], and what to log.

        The train loop does the rest: shares, backward pass, accumulation and clipping.
        """

    def plan(self, steps: int, rng: np.random.Generator) -> Gradients | None:
        """Chooses which of `steps` sampler steps keep their graph in the next rollout; None for none.

        Raises:
            ValueError: if the algorithm cannot work with that number of steps.
        """
        return None

    def store(self, steps: int) -> Literal["all", "image"]:
        """Says which latents the rollouts must keep: those of all steps, or the image's alone."""
        return "image"

    def own_prompts(self) -> Sequence[str]:
        """Lists the prompts of the algorithm's own data, to warn if the tokenizer cuts them."""
        return ()

    def epoch_metrics(self) -> dict[str, float]:
        """Returns what is logged once for the whole epoch, beside the metrics of `loss`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a bit-exact resume needs. Its tensors must not be changed in place afterwards."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  nothing to do where state_dict is empty
        """Restores what `state_dict` returned."""


def shares(items: Sequence[Any] | Tensor, size: int) -> Iterator[tuple[float, Any]]:
    """Cuts items into slices of at most `size`, each with its share of the whole."""
    for k in range(0, len(items), size):
        part = items[k : k + size]
        yield len(part) / len(items), part


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"algo.{key}={value} is not one of {', '.join(choices)}")


def split(order: np.ndarray, parts: int) -> list[Tensor]:
    """Cuts a permutation into `parts` pieces of nearly equal length."""
    return [torch.from_numpy(piece) for piece in np.array_split(order, parts)]

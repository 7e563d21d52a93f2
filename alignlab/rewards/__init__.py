"""What a reward is. One file a reward; torch and libraries only."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """A score of images, larger is better."""

    differentiable: bool
    """Whether gradients reach the images."""
    unit: str
    typical_range: tuple[float, float]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 from images [B, 3, H, W] float32 in [0, 1] and their prompts."""

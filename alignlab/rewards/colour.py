"""How red, green or blue an image is."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

CHANNELS = ("red", "green", "blue")


class Colour:
    """One channel's mean minus the mean of the other two, in [-1, 1]. Differentiable.

    Args:
        channel: which of the three.
    """

    differentiable = True
    unit = "channel difference"
    needs_prompt = False
    typical_range = (-0.5, 0.5)
    input_size = None
    licence = "none needed"

    def __init__(self, channel: Literal["red", "green", "blue"] = "red") -> None:
        if channel not in CHANNELS:
            raise ValueError(f"channel={channel!r} is not one of {', '.join(CHANNELS)}")
        self.channel = CHANNELS.index(channel)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        means = images.float().mean((2, 3))
        chosen = means[:, self.channel]
        return chosen - (means.sum(1) - chosen) / 2

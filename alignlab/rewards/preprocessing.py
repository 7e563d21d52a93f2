"""What a scorer's published preprocessing does to a PIL picture, done to tensors, so that gradients pass.

PIL resizes across first and then down, and brings each of the two results back to the pixels' range: bicubic
interpolation overshoots at an edge. The same two steps are made here. What PIL also does is to round to 8
bits, which has no gradient and is left out, so a pixel differs from PIL's by that rounding alone: by less
than 0.005 of the range. (From version 13 on Pillow begins with the height where that shrinks much more than
the width. The published scorers are older.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, which most CLIPs kept."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, cut to the middle or pad, normalise. Differentiable."""

    size: tuple[int, int]
    """Height and width that the scorer sees."""
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    resize: str = "shortest"
    """shortest: the shorter side fits and the rest of the longer is cut; longest: the longer side fits and
    the rest is padded; squash: both sides fit."""
    interpolation: str = "bicubic"
    floor: bool = False
    """Of an odd margin the smaller part is cut before the middle, as transformers does; torchvision rounds to
    even."""
    fill: float = 0.0
    """What pads, in [0, 1]."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, *size] normalised, from [B, 3, H, W] in [0, 1]."""
        cut = self.cut(self.resized(images))
        mean, std = (cut.new_tensor(list(values)).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (cut - mean) / std

    def resized(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        tall, wide = self.size
        if self.resize == "squash":
            new = self.size
        elif self.resize == "shortest" and tall == wide:  # torchvision's and PIL's integers
            new = (tall, wide * width // height) if height <= width else (tall * height // width, wide)
        else:
            ratio = (max if self.resize == "longest" else min)(height / tall, width / wide)
            new = (round(height / ratio), round(width / ratio))
        across = self._interpolated(images, (height, new[1]))
        return self._interpolated(across, new)

    def _interpolated(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode=self.interpolation, antialias=True).clamp(0, 1)

    def cut(self, images: Tensor) -> Tensor:
        """From the middle, or padded around it, to `size`."""
        for dim, want in ((-2, self.size[0]), (-1, self.size[1])):
            margin = images.shape[dim] - want
            if margin > 0:
                images = images.narrow(dim, margin // 2 if self.floor else round(margin / 2), want)
            elif margin < 0:
                pad = (-margin // 2, (1 - margin) // 2)
                images = F.pad(images, pad if dim == -1 else (0, 0, *pad), value=self.fill)
        return images

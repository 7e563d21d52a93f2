"""Cheap statistics of images that drift when a reward is being hacked: pictures that turn dark, flat, busy or
garish."""

import torch
from torch import Tensor

LEVELS = 4
"""Colour entropy counts LEVELS^3 colours."""
NAMES = ("dark_fraction", "edge_density", "colour_entropy", "saturation")


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """[B] by name, of images [B, 3, H, W] in [0, 1].

    dark_fraction   share of pixels with luma (ITU-R BT.601) below 0.1; in [0, 1]
    edge_density    share of pixels whose luma differs by more than 0.1 from the one to the right or below; in
                    [0, 1]
    colour_entropy  of the histogram of colours, each channel in 4 levels, in bits; in [0, 6]
    saturation      mean of HSV's, (max - min)/max; in [0, 1]
    """
    images = images.float()
    luma = torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))
    right = (luma[:, :-1, 1:] - luma[:, :-1, :-1]).abs()
    below = (luma[:, 1:, :-1] - luma[:, :-1, :-1]).abs()
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)
    colour = (level[:, 0] * LEVELS**2 + level[:, 1] * LEVELS + level[:, 2]).flatten(1)
    counts = torch.zeros(len(images), LEVELS**3, device=images.device).scatter_add_(
        1, colour, torch.ones_like(colour, dtype=torch.float32)
    )
    share = counts / colour.shape[1]
    most, least = images.amax(1), images.amin(1)
    values = (
        (luma < 0.1).float().mean((1, 2)),
        (torch.maximum(right, below) > 0.1).float().mean((1, 2)),
        torch.special.entr(share).sum(1) / torch.log(torch.tensor(2.0)),
        ((most - least) / most.clamp(min=1e-6)).mean((1, 2)),
    )
    return dict(zip(NAMES, values, strict=True))

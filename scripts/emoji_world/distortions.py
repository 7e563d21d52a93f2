"""Graded distortions of scenes: a perceptual distance should put the stronger one farther from the
original."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def blur(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Gaussian, sigma = 0.5 to 3 pixels."""
    sigma = 0.5 + 2.5 * strength
    line = torch.arange(-8, 9).float()
    kernel = torch.exp(-line.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).repeat(3, 1, 1, 1)
    images = F.conv2d(F.pad(images, (8, 8, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(images, (0, 0, 8, 8), mode="replicate"), kernel.transpose(2, 3), groups=3)


def grain(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Gaussian noise of standard deviation up to 0.3; the same noise at every strength."""
    return (images + 0.3 * strength * noise).clamp(0, 1)


def shift(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Moved to the right by up to 10 pixels."""
    pixels = round(1 + 9 * strength)
    return F.pad(images, (pixels, 0, 0, 0), mode="replicate")[..., : images.shape[-1]]


def tint(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Mixed with magenta by up to 60 %."""
    return torch.lerp(
        images, images.new_tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand_as(images), 0.6 * strength
    )


def fade(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Contrast lowered by up to 90 %."""
    return torch.lerp(images, images.mean((1, 2, 3), keepdim=True).expand_as(images), 0.9 * strength)


def patch(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """A grey square of up to 30 pixels in the middle."""
    half, middle = round(2 + 13 * strength), images.shape[-1] // 2
    out = images.clone()
    out[..., middle - half : middle + half, middle - half : middle + half] = 0.5
    return out


DISTORTIONS: tuple[Callable[[Tensor, float, Tensor], Tensor], ...] = (blur, grain, shift, tint, fade, patch)


@torch.no_grad()
def monotone_share(
    distance: Callable[[Tensor, Tensor], Tensor], images: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Share of triplets (scene, weaker, stronger) that are ordered, by kind of distortion.

    Args:
        distance: of scenes and distorted scenes, [n, 3, 48, 48] each, [n].
    """
    noise = torch.randn(images.shape, generator=generator)
    strengths = [torch.rand(2, generator=generator).sort().values for _ in images]
    shares = {}
    for distort in DISTORTIONS:
        weak, strong = (
            torch.cat(
                [distort(images[k : k + 1], float(s[i]), noise[k : k + 1]) for k, s in enumerate(strengths)]
            )
            for i in (0, 1)
        )
        clear = torch.tensor(
            [float(s[1] - s[0]) > 0.1 for s in strengths]
        )  # else rounding makes the two the same picture
        shares[distort.__name__] = (
            (distance(images, weak) < distance(images, strong))[clear].float().mean().item()
        )
    return shares

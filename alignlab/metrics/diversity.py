"""Diversity: the mean perceptual distance between images of one prompt.

The distance has the form of LPIPS (Zhang et al. 2018, arXiv 1801.03924): features of several depths, unit-normalised
along channels, squared difference, mean over space and depths: between 0 and 2. The backbone here is the embedded world's judge
with uniform weights ("lpips-emoji"): its values are not comparable with AlexNet's.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.metrics.judge import load_judge


class PerceptualDistance:
    """Distances between images.

    Args:
        features: images [n, 3, 48, 48] in [0, 1] to feature maps [n, C_l, h_l, w_l]; None loads the shipped judge.
        weights: [C_l] >= 0 for each depth, LPIPS's linear layers; None weighs all channels alike, with 1.
        name: how results call this distance.
    """

    def __init__(
        self,
        features: Callable[[Tensor], list[Tensor]] | None = None,
        *,
        weights: Sequence[Tensor] | None = None,
        name: str = "lpips-emoji",
    ) -> None:
        self.features, self.weights, self.name = features or load_judge()[0].features, weights, name

    @torch.no_grad()
    def pairwise(self, images: Tensor) -> Tensor:
        """[n, n] float32, zero on the diagonal. n forward passes: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, one product a depth."""
        images = images.float().cpu()
        if images.shape[-2:] != (48, 48):
            images = F.interpolate(images, (48, 48), mode="bilinear", antialias=True)
        total = torch.zeros(len(images), len(images), dtype=torch.float64)
        depths = self.features(images)
        for k, depth in enumerate(depths):
            unit = depth.double() / (depth.double().square().sum(1, keepdim=True).sqrt() + 1e-10)
            if self.weights is not None:
                unit = unit * self.weights[k].double().sqrt().view(1, -1, 1, 1)
            flat = unit.flatten(1)
            gram = flat @ flat.T
            norms = gram.diagonal()
            total += (norms[:, None] + norms[None, :] - 2 * gram) / depth[0, 0].numel()
        return (total / len(depths)).clamp(min=0).fill_diagonal_(0).float()

    def mean_pairwise(self, images: Tensor) -> float:
        """Mean over the pairs i < j of images [n >= 2, 3, H, W]."""
        n = len(images)
        if n < 2:
            raise ValueError(f"diversity is a mean over pairs, but got {n} image(s); two at least are needed")
        return self.pairwise(images).sum().item() / (n * (n - 1))

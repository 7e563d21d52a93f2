"""Diversity: the mean perceptual distance between images of one prompt.

LPIPS's form (Zhang et al. 2018, arXiv 1801.03924): features of several depths, unit-normalised along
channels,

    d(a, b) = sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2

    lpips-emoji   the backbone is the embedded world's judge, w = 1 / (number of depths): between 0 and 2.
                  Ships with alignlab.
    lpips-alex    LPIPS 0.1 itself, with AlexNet and its learned w; needs torchvision's AlexNet weights on the
                  disk.

Values of the two are not comparable; every number says which one it is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.models.emoji_judge import load_judge

ALEXNET = "alexnet-owt-7be5be79.pth"


class PerceptualDistance:
    """Distances between images.

    Args:
        features: images [n, 3, h, w] in [0, 1] to feature maps [n, C_l, h_l, w_l].
        weights: [C_l] >= 0 for each depth; None weighs all channels alike, with 1 / depths.
        name: how results call this distance.
        size: (h, w) that `features` needs; None for any.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Sequence[Tensor]],
        *,
        weights: Sequence[Tensor] | None = None,
        name: str,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.features, self.weights, self.name, self.size = features, weights, name, size

    @torch.no_grad()
    def pairwise(self, images: Tensor) -> Tensor:
        """[n, n] float32 on the host, zero on the diagonal.

        n forward passes: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, one product a depth.
        """
        total = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
        for depth in self._weighed(images):
            gram = torch.zeros_like(total)
            for piece in depth.flatten(1).split(2**16, 1):
                gram += piece.double() @ piece.double().T
            norms = gram.diagonal()
            total += (norms[:, None] + norms[None, :] - 2 * gram) / depth[0, 0].numel()
        return total.clamp(min=0).fill_diagonal_(0).float().cpu()

    @torch.no_grad()
    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """[n] float32 on the host: each image of `a` from the one in its place in `b`."""
        depths = zip(self._weighed(a), self._weighed(b), strict=True)
        return torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in depths]).sum(0).cpu()

    def _weighed(self, images: Tensor) -> list[Tensor]:
        """sqrt(w_l) times the unit features, [n, C_l, h_l, w_l] for each depth."""
        images = images.float()
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        parts = [self.features(batch) for batch in images.split(64)]
        out = []
        for k in range(len(parts[0])):
            depth = torch.cat([part[k] for part in parts])
            weight = (
                torch.tensor(1 / len(parts[0])) if self.weights is None else self.weights[k].view(1, -1, 1, 1)
            )
            out.append(weight.sqrt().to(depth) * depth / (depth.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    def mean_pairwise(self, images: Tensor) -> float:
        """Mean over the pairs i < j of images [n >= 2, 3, H, W]."""
        n = len(images)
        if n < 2:
            raise ValueError(f"diversity is a mean over pairs, but got {n} image(s); two at least are needed")
        return self.pairwise(images).double().sum().item() / (n * (n - 1))


class EmojiDistance(PerceptualDistance):
    """lpips-emoji."""

    def __init__(self) -> None:
        judge = load_judge()[0]
        super().__init__(lambda x: judge.to(x.device).features(x), name="lpips-emoji", size=(48, 48))


class AlexDistance(PerceptualDistance):
    """lpips-alex: the `lpips` package's network and learned weights.

    Args:
        weights: torchvision's AlexNet checkpoint (alexnet-owt-7be5be79.pth); null looks in torch's hub
            folder.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is another file.
    """

    @staticmethod
    def check(weights: str | None = None, **_: Any) -> None:
        _alexnet(weights)

    def __init__(self, weights: str | None = None) -> None:
        import lpips  # brings torchvision

        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        state = _checkpoint(_alexnet(weights))
        for part in (net.net.slice1, net.net.slice2, net.net.slice3, net.net.slice4, net.net.slice5):
            for number, layer in part.named_children():  # the layers kept torchvision's numbers
                if list(layer.parameters()):
                    layer.load_state_dict({k: state[f"features.{number}.{k}"] for k in ("weight", "bias")})

        def features(images: Tensor) -> Sequence[Tensor]:
            net.to(images.device)
            return net.net(net.scaling_layer(images * 2 - 1))

        super().__init__(
            features, weights=[lin.model[-1].weight.flatten() for lin in net.lins], name="lpips-alex"
        )


def _checkpoint(path: Path) -> dict[str, Tensor]:
    """Its tensors; a pickle of anything else is not read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(
            isinstance(state[f"features.{k}.{name}"], Tensor)
            for k in (0, 3, 6, 8, 10)
            for name in ("weight", "bias")
        ):
            raise TypeError
    except Exception:  # of many kinds: a zip's, a pickle's, a table's
        raise ValueError(
            f"weights={path} is not torchvision's {ALEXNET}; fetch it again, or set diversity=emoji"
        ) from None
    return dict(state)


def _alexnet(weights: str | None) -> Path:
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={weights}: there is no {path}; put torchvision's {ALEXNET} there, or set "
            "diversity=emoji (the shipped backbone)"
        )
    return path

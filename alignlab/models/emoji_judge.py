"""A small classifier of the embedded world: which glyph, on which background.

It is trained on renderings only, and no weights were chosen by it, so it can judge generated images. Its
convolutional features are also the backbone of the offline perceptual distance (diversity.py).
"""

import importlib.resources
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

WIDTHS = (32, 64, 96, 128)


class Block(nn.Module):
    """Halves the resolution, then one residual unit."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.residual = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return torch.relu(x + self.residual(x))


class Judge(nn.Module):
    """Args: names, colours: the numbers of classes."""

    def __init__(self, names: int, colours: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, o, 2) for i, o in zip((3, *WIDTHS), WIDTHS, strict=False))
        self.name = nn.Linear(WIDTHS[-1], names)
        self.colour = nn.Linear(WIDTHS[-1], colours)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16 of the resolution, from images [B, 3, 48, 48] in [0, 1]."""
        x, maps = images * 2 - 1, []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, names] and [B, colours]."""
        pooled = self.features(images)[-1].mean((2, 3))
        return self.name(pooled), self.colour(pooled)


def load_judge() -> tuple[Judge, tuple[str, ...], tuple[str, ...]]:
    """The shipped judge, frozen, with the names of its classes."""
    path = Path(str(importlib.resources.files("alignlab") / "assets" / "emoji_judge.safetensors"))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; reinstall alignlab, or rebuild the embedded world with `make emoji-world`"
        )
    with safe_open(path, "pt") as file:
        names, colours = (tuple(file.metadata()[k].split("|")) for k in ("names", "colours"))
        state = {k: file.get_tensor(k) for k in file.keys()}
    judge = Judge(len(names), len(colours))
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return judge.eval().requires_grad_(False), names, colours

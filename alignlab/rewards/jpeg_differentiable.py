"""A differentiable stand-in for the size as JPEG: the steps of the encoder up to its entropy coder, whose
length is estimated.

Kept libraries of differentiable JPEG (kornia, diff-jpeg) give the decoded picture; a size needs the quantised
coefficients, so the steps are here. They are those of the IJG's encoder that PIL calls (ITU-T T.81; JFIF for
the colours): the picture, padded by its last row and column, to YCbCr, chroma averaged over 2x2, blocks of
8x8 through the DCT, divided by the quality's table. Then PIL rounds, and writes Huffman codes; here a
coefficient of q steps costs log2(1 + (4 q)^2) / 2, a smooth form of the about log2|q| bits that it takes, and
little for what would be rounded away.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.rewards.jpeg import check

LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101
    72 92 95 98 112 100 103 99"""
CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
"""T.81's example tables, annex K.1, which quality 50 uses as they are; row by row."""
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class JpegRate:
    """sign times the estimated bits a pixel. Differentiable. It ranks images of one size as their JPEG files'
    sizes do (docs/rewards.md has the rank correlations); it is an estimate without unit of its own, not kB.

    Args:
        sign: -1 rewards small files (compressibility), 1 large ones. [-1 or 1]
        quality: of the encoder, 1..95. [JPEG quality]
    """

    differentiable = True
    needs_prompt = False
    unit = "proxy bits a pixel"
    typical_range = (-6.0, 6.0)
    input_size = None
    licence = "none needed"

    def __init__(self, sign: int = -1, quality: int = 95) -> None:
        check(sign, quality)
        self.sign = sign
        self.tables = [table(words, quality) for words in (LUMA, CHROMA, CHROMA)]
        k = torch.arange(8.0)
        self.dct = torch.cos(math.pi / 8 * (k + 0.5) * k[:, None]) / 2
        self.dct[0] /= math.sqrt(2)
        self.ycbcr = torch.tensor(YCBCR)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        bits = torch.stack([cost(q).sum((1, 2, 3, 4)) for q in self.coefficients(images)]).sum(0)
        return self.sign * bits / (images.shape[-2] * images.shape[-1])

    def coefficients(self, images: Tensor) -> list[Tensor]:
        """Of Y, Cb and Cr, in quantisation steps and not rounded: [B, rows, columns, 8, 8] each, in
        blocks."""
        height, width = images.shape[-2:]
        pixels = F.pad(images * 255, (0, -width % 16, 0, -height % 16), mode="replicate")
        y, cb, cr = torch.einsum("yc,bchw->ybhw", self.ycbcr.to(images), pixels)
        planes = [y - 128, F.avg_pool2d(cb, 2), F.avg_pool2d(cr, 2)]
        dct = self.dct.to(images)
        blocks = (plane.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).transpose(2, 3) for plane in planes)
        return [
            dct @ block @ dct.T / steps.to(images) for block, steps in zip(blocks, self.tables, strict=True)
        ]


def table(words: str, quality: int) -> Tensor:
    """[8, 8] quantisation steps at a quality, as the IJG scales them."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return (
        ((torch.tensor([int(word) for word in words.split()]) * scale + 50) // 100)
        .clamp(1, 255)
        .view(8, 8)
        .float()
    )


def cost(q: Tensor) -> Tensor:
    """Of each coefficient [B, rows, columns, 8, 8]. A block's first (its mean) is coded as the difference
    from the last block's."""
    mean = q[..., 0, 0]
    mean = torch.cat([mean[..., :1], mean.diff(dim=-1)], -1)
    rest = q.flatten(-2)[..., 1:]
    values = torch.cat([mean[..., None], rest], -1).unflatten(-1, (8, 8))
    return torch.log2(1 + (4 * values) ** 2) / 2

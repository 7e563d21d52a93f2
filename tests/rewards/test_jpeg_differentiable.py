"""The estimated size: the encoder's own tables and transform, the ranks of PIL's files, and a gradient."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from scipy.fft import dctn
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import alignlab
from alignlab.rewards.jpeg import JpegSize
from alignlab.rewards.jpeg_differentiable import CHROMA, LUMA, JpegRate, table
from tests.rewards.published import pictures, slopes_agree


def textured(n: int, height: int, width: int) -> Tensor:
    """[n, 3, height, width]: noise on scales from the whole picture to single pixels, in random shares and
    contrasts."""
    draw, images = torch.Generator().manual_seed(0), []
    for _ in range(n):
        image = torch.zeros(1, 3, height, width)
        for cells in (2, 4, 8, 16, 32, height):
            noise = torch.randn(1, 3, cells, cells, generator=draw)
            image += torch.rand((), generator=draw) ** 2 * F.interpolate(
                noise, (height, width), mode="bicubic"
            )
        images.append(
            image / image.std() * 0.3 * torch.rand((), generator=draw) + torch.rand((), generator=draw)
        )
    return torch.cat(images).clamp(0, 1)


def generated(n: int) -> Tensor:
    """[n, 3, 48, 48] of the embedded world's model."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        Path(alignlab.__file__).parent / "assets" / "emoji", safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    names = ["cat", "dog", "horse", "monkey", "rabbit", "tiger", "spider", "bird"]
    images = pipeline(
        [f"a {name}" for name in names] * (n // len(names)),
        num_inference_steps=6,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        height=48,
        width=48,
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def correlation(images: Tensor, quality: int) -> float:
    estimated, written = (reward(1, quality)(images, [""] * len(images)) for reward in (JpegRate, JpegSize))
    return float(spearmanr(estimated, written).statistic)


def test_it_ranks_as_pil_does() -> None:
    """Spearman's correlation with PIL's file sizes on random textures, 64 px and a size that is no multiple
    of 16, and on pictures of the embedded world. `pytest -s` prints the numbers of docs/rewards.md."""
    kinds = {
        "textures": textured(60, 64, 64),
        "odd sizes": textured(40, 129, 117),
        "embedded world": generated(32),
    }
    for quality in (95, 75, 50):
        found = {kind: correlation(images, quality) for kind, images in kinds.items()}
        print(quality, {kind: round(value, 3) for kind, value in found.items()})
        assert min(found.values()) >= 0.95


def test_the_encoders_steps() -> None:
    """PIL's quantisation tables, at any quality, and the coefficients of scipy's DCT; the larger quality
    costs more."""
    images = pictures(16, n=1)
    for quality in (10, 50, 75, 95):
        buffer = io.BytesIO()
        to_pil_image(images[0]).save(buffer, "JPEG", quality=quality)
        theirs = Image.open(io.BytesIO(buffer.getvalue())).quantization
        assert [table(words, quality).flatten().tolist() for words in (LUMA, CHROMA)] == [
            theirs[0],
            theirs[1],
        ]
    luma = 255 * (images[0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0) - 128
    by_hand = dctn(luma[8:, :8].numpy(), norm="ortho") / table(LUMA, 95).numpy()
    np.testing.assert_allclose(JpegRate().coefficients(images)[0][0, 1, 0], by_hand, atol=1e-3)
    assert JpegRate(1, 95)(images, [""]) > JpegRate(1, 50)(images, [""]) > 0 > JpegRate(-1, 95)(images, [""])


def test_a_flat_picture_costs_almost_nothing() -> None:
    """Next to nothing but its mean; and the images do not touch one another."""
    images = torch.cat([torch.full((1, 3, 32, 32), 0.3), torch.rand(1, 3, 32, 32)])
    flat, noise = JpegRate(1)(images, ["", ""])
    assert flat < 0.05 and noise > 3
    torch.testing.assert_close(JpegRate(1)(images[:1], [""])[0], flat)


@pytest.mark.parametrize("size", [(32, 32), (37, 45)], ids=str)
def test_gradient_is_the_finite_difference(size: tuple[int, int]) -> None:
    slopes_agree(JpegRate(), pictures(*size))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"sign=2 must be -1 or 1, and quality=95 within 1..95"):
        JpegRate(2)

"""Each reward against the library that defines it, and its gradient against finite differences."""

import io
from collections.abc import Callable

import open_clip
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from alignlab.rewards.brightness import Brightness
from alignlab.rewards.clip import ClipScore, locate
from alignlab.rewards.colour import Colour
from alignlab.rewards.jpeg import JpegSize

PROMPTS = ["a lion on a blue background", "two fish", "a red bird"]


@pytest.fixture(scope="module")
def clip() -> ClipScore:
    return ClipScore("emoji_clip")


def pictures(size: int, n: int = 3) -> Tensor:
    """[n, 3, size, size], smooth and in 8 bits exactly."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def test_jpeg_is_the_size_that_pil_writes() -> None:
    """kB of 1,000 bytes at the given quality; the sign chooses between compressibility and its opposite."""
    images = pictures(48)
    for quality in (95, 50):
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            to_pil_image(image).save(buffer, "JPEG", quality=quality)
            sizes.append(len(buffer.getvalue()) / 1000)
        assert JpegSize(1, quality)(images, PROMPTS).tolist() == pytest.approx(sizes)
        assert JpegSize(-1, quality)(images, PROMPTS).tolist() == pytest.approx([-s for s in sizes])
    noise, flat = torch.rand(1, 3, 48, 48), torch.full((1, 3, 48, 48), 0.5)
    assert JpegSize()(flat, [""]) > JpegSize()(noise, [""])


@pytest.mark.parametrize("channel", ["red", "green", "blue"])
def test_colour(channel: str) -> None:
    """A pure colour earns 1 under its own name, -1/2 under the others, and grey earns 0."""
    images = torch.zeros(4, 3, 8, 8)
    for k in range(3):
        images[k, k] = 1
    images[3] = 0.4
    expected = [1.0 if name == channel else -0.5 for name in ("red", "green", "blue")] + [0.0]
    assert Colour(channel)(images, [""] * 4).tolist() == pytest.approx(expected, abs=1e-6)


def test_brightness() -> None:
    """The mean pixel of each image."""
    assert Brightness()(
        torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.25)]), ["", ""]
    ).tolist() == [0.0, 0.25]


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (Brightness, 16),
        (Colour, 16),
        (lambda: ClipScore("emoji_clip"), 48),
        (lambda: ClipScore("emoji_clip"), 80),
    ],
)
def test_gradient_is_the_finite_difference(
    make: Callable[[], Brightness | Colour | ClipScore], size: int
) -> None:
    """Along a random direction, for each image by itself (CLIP also through its own resizing)."""
    reward, images = make(), (0.2 + 0.6 * pictures(size)).requires_grad_()
    direction = pictures(size).flip(0) - 0.5
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    slope = (gradient * direction).sum((1, 2, 3))
    h = 5e-3
    with torch.no_grad():
        difference = (reward(images + h * direction, PROMPTS) - reward(images - h * direction, PROMPTS)) / (
            2 * h
        )
    torch.testing.assert_close(slope, difference, rtol=2e-2, atol=2e-3)
    if isinstance(reward, ClipScore):
        assert not any(p.requires_grad for p in reward.clip.model.parameters())


@pytest.mark.parametrize("size", [48, 64, 128])
def test_clip_sees_what_open_clip_sees(clip: ClipScore, size: int) -> None:
    """The tensor preprocessing is open_clip's PIL preprocessing within 1e-2, and the score is 100 x its
    cosine."""
    images = pictures(size)
    model, _, theirs = open_clip.create_model_and_transforms(locate("emoji_clip"))
    reference = torch.stack([theirs(to_pil_image(image)) for image in images])
    assert (clip.clip.preprocess(images) - reference).abs().max() <= 1e-2
    tokens = open_clip.get_tokenizer(locate("emoji_clip"))(PROMPTS)
    with torch.no_grad():
        a, b = model.eval().encode_image(reference), model.encode_text(tokens)
        cosine = torch.nn.functional.cosine_similarity(a, b)
        torch.testing.assert_close(clip(images, PROMPTS), 100 * cosine, rtol=0, atol=0.2)


def test_clip_scores_do_not_depend_on_the_batch(clip: ClipScore) -> None:
    """An image's score is the same alone; the template surrounds the prompt."""
    images = pictures(48)
    with torch.no_grad():
        whole = clip(images, PROMPTS)
        alone = torch.cat(
            [clip(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)]
        )
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-4)
        filled = ClipScore("emoji_clip", template="a {} on a blue background")(images[:1], ["lion"])
        torch.testing.assert_close(filled, whole[:1], rtol=0, atol=1e-4)

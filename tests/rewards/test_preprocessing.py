"""Tensors are resized, cut and padded as the published pipelines do it to PIL pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPImageProcessor

from alignlab.engine.noise import noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.models.sd import StableDiffusion
from alignlab.rewards import Reward
from alignlab.rewards.aesthetic import Aesthetic
from alignlab.rewards.clip import ClipScore
from alignlab.rewards.clip_choice import preprocessing_of
from alignlab.rewards.preference import Preference
from alignlab.rewards.preprocessing import CLIP_STD, Preprocessing
from tests.rewards.published import CLIPImageProcessorPil, hard_edges, pictures

pytestmark = pytest.mark.fault("preprocessing")

SIZES = [(512, 512), (512, 768), (301, 233), (333, 512), (224, 227), (224, 224), (60, 97), (48, 48)]
STD = torch.tensor(CLIP_STD).view(3, 1, 1)
ROUNDING = 5e-3
"""PIL rounds to 8 bits after each pass, by half a level at most; bicubic weights raise the first rounding by
up to 1.4."""
PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def by_pil(images: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Images of 8 bits as PIL resizes them: across, then down. (From version 13 on Pillow begins with the
    height where that shrinks much more than the width; the published scorers are older, so both steps are
    asked for.)"""
    kind = PIL[interpolation]
    shrunk = [
        picture.resize((size[1], picture.height), kind).resize(size[::-1], kind)
        for picture in map(to_pil_image, images)
    ]
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in shrunk])


def both(height: int, width: int) -> Tensor:
    """Smooth pictures and hard edges."""
    return torch.cat([pictures(height, width, n=1), hard_edges(height, width)])


@pytest.mark.parametrize("interpolation", PIL)
@pytest.mark.parametrize("size", [*SIZES, (3, 700), (37, 224), (1024, 64)], ids=str)
def test_pil_resizes_alike(size: tuple[int, int], interpolation: str) -> None:
    """Up and down, square or not, on black-and-white edges too. One pass, clamped at its end, would be off by
    up to 0.12."""
    images = both(*size)
    ours = Preprocessing(size=(224, 160), resize="squash", interpolation=interpolation)
    assert (ours.resized(images) - by_pil(images, (224, 160), interpolation)).abs().max() <= ROUNDING


def test_one_pass_would_not_do() -> None:
    """What is not clamped between the passes differs from PIL by more than its rounding, also at the embedded
    world's size."""
    for side in (48, 512):
        images = hard_edges(side)
        at_once = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        assert (at_once - by_pil(images, (224, 224))).abs().max() > 0.03


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_open_clips_pil_pipeline(resize: str, size: tuple[int, int]) -> None:
    """Padding included. ImageReward's is shortest (torchvision's Resize and CenterCrop)."""
    if resize == "squash" and size[0] > size[1]:
        size = size[::-1]  # by_pil says why
    images = both(*size)
    look = image_transform_v2(PreprocessCfg(resize_mode=resize), is_train=False)
    theirs = torch.stack([look(to_pil_image(image)) for image in images])
    ours = Preprocessing(size=(224, 224), resize=resize)(images)
    assert ((ours - theirs) * STD).abs().max() <= ROUNDING


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transformers_pil_pipeline(size: tuple[int, int]) -> None:
    """The same of PickScore's and SciScore's processors, which cut an odd margin elsewhere."""
    images = both(*size)
    theirs = CLIPImageProcessorPil()([to_pil_image(image) for image in images], return_tensors="np")[
        "pixel_values"
    ]
    ours = preprocessing_of(CLIPImageProcessor())(images)
    assert ((ours - torch.from_numpy(np.asarray(theirs))) * STD).abs().max() <= ROUNDING


@pytest.mark.parametrize("interpolation", PIL)
@pytest.mark.parametrize("size", [(30, 47), (9, 14)], ids=str)
def test_the_gradient_is_the_finite_difference(size: tuple[int, int], interpolation: str) -> None:
    """Down and up, in float64, where some of the resized pixels are clamped and most are not."""
    draw = torch.Generator().manual_seed(0)
    images = (hard_edges(*size, cell=4).double() * 0.98 + 0.01).requires_grad_()
    look = Preprocessing(size=(16, 16), interpolation=interpolation)
    weights, direction = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3, 3, 16, 16), images.shape)
    )

    def score(x: Tensor) -> Tensor:
        return (look(x) * weights).sum()

    (gradient,) = torch.autograd.grad(score(images), images)
    h = 1e-7
    with torch.no_grad():
        slope = (score(images + h * direction) - score(images - h * direction)) / (2 * h)
        resized = look.resized(images)
    assert interpolation == "bilinear" or ((resized == 0) | (resized == 1)).float().mean() > 0.02
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-5)


def test_another_processor_is_refused() -> None:
    """One that squashes, or leaves an edge that is not cut, would need another preprocessing."""
    with pytest.raises(
        ValueError,
        match=r"an image processor of size .* is not CLIP's; give the processor that was published",
    ):
        preprocessing_of(CLIPImageProcessor(size={"height": 224, "width": 224}))


def old(self: Preprocessing, images: Tensor) -> Tensor:
    """How images were resized when the embedded world's heads were fitted."""
    if images.shape[-2:] == self.size:
        return images
    return F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def test_the_embedded_worlds_scores_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images have the size that its CLIP sees, so nothing is resized and no score moves by a bit.
    Enlarged, they move by less than a hundredth of their spread. (-s prints the table of
    alignlab/assets/README.md.)"""
    family = StableDiffusion("emoji")
    prompts = [f"a {animal}" for animal in ("lion", "cat", "zebra", "fish", "bee", "snake")]
    key = noise_key(prompts, seed=0, stream="eval")
    sampler = ddim(family.scheduler, steps=10, eta=0.0, guidance_scale=3.0)
    drawn = rollout(Policy(family), sampler, key, store="image").images
    rewards: dict[str, Reward] = {
        "clip": ClipScore("emoji_clip"),
        "emoji_preference": Preference("emoji_preference"),
        "emoji_aesthetic": Aesthetic("emoji_aesthetic"),
    }
    for side in (48, 64, 96, 224):
        images = F.interpolate(drawn, (side, side), mode="nearest")
        for name, reward in rewards.items():
            now = reward(images, prompts)
            with monkeypatch.context() as before:
                before.setattr(Preprocessing, "resized", old)
                then = reward(images, prompts)
            moved, spread = (now - then).abs().max().item(), then.std().item()
            print(f"| {side} px | {name} | {then.mean():.3f} | {spread:.3f} | {moved:.2g} |")
            assert moved == 0 if side == 48 else moved < 0.01 * spread

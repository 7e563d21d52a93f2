"""Tensors are resized, cut and padded as the published pipelines do it to PIL pictures."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPImageProcessor

from alignlab.rewards.clip_choice import preprocessing_of
from alignlab.rewards.preprocessing import CLIP_STD, Preprocessing
from tests.rewards.published import pictures

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:  # before version 5 the one there was used PIL
    CLIPImageProcessorPil = CLIPImageProcessor
SIZES = [(512, 512), (512, 768), (301, 233), (333, 512), (224, 227), (224, 224), (60, 97)]
STD = torch.tensor(CLIP_STD).view(3, 1, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_open_clips_pil_pipeline(resize: str, size: tuple[int, int]) -> None:
    """Within 1e-2 of the pixels' range, padding included. ImageReward's is shortest (torchvision's Resize and CenterCrop), HPS's longest."""
    images = pictures(*size, n=1)
    theirs = image_transform_v2(PreprocessCfg(resize_mode=resize), is_train=False)(to_pil_image(images[0]))
    ours = Preprocessing(size=(224, 224), resize=resize)(images)[0]
    assert ((ours - theirs) * STD).abs().max() <= 1e-2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transformers_pil_pipeline(size: tuple[int, int]) -> None:
    """The same of PickScore's and SciScore's processors, which cut an odd margin elsewhere."""
    images = pictures(*size, n=1)
    theirs = CLIPImageProcessorPil()(to_pil_image(images[0]), return_tensors="np")["pixel_values"][0]
    ours = preprocessing_of(CLIPImageProcessor())(images)[0]
    assert ((ours - torch.from_numpy(np.asarray(theirs))) * STD).abs().max() <= 1e-2


def test_another_processor_is_refused() -> None:
    """One that squashes, or leaves an edge that is not cut, would need another preprocessing."""
    with pytest.raises(ValueError, match=r"an image processor of size .* is not CLIP's; give the processor that was published"):
        preprocessing_of(CLIPImageProcessor(size={"height": 224, "width": 224}))

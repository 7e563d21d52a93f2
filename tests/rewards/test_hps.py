"""HPSv2 from a file as it is published, against open_clip's own model and the transform of hpsv2's code,
which pads."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, pad, resize, to_pil_image, to_tensor

from alignlab.rewards.hps import FloatPreprocessing, HPSv2
from alignlab.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.rewards.published import PROMPTS, hard_edges, hps, open_clip_architecture, pictures, slopes_agree

FILE = "HPS_v2.1_compressed.pt"


def published(picture: Image.Image, side: int) -> Tensor:
    """The steps of hpsv2's evaluation transform: a float tensor, its longer side brought to `side` by
    torchvision, zeros around it."""
    image = to_tensor(picture)
    scale = side / float(max(image.shape[1:]))
    if scale != 1.0:
        new = [round(length * scale) for length in image.shape[1:]]
        image = resize(image, new, InterpolationMode.BICUBIC)
        down, across = side - new[0], side - new[1]
        image = pad(image, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0)
    return normalize(image, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    "size", [(512, 512), (420, 768), (768, 512), (48, 71), (100, 224), (224, 224)], ids=str
)
def test_the_published_transform(size: tuple[int, int]) -> None:
    """To single precision, on hard edges too, where the resized tensor leaves [0, 1] and is not brought
    back."""
    images = torch.cat([pictures(*size, n=1), hard_edges(*size)])
    ours = FloatPreprocessing(size=(224, 224))
    if max(size) != 224 or size == (224, 224):  # theirs leaves (100, 224) as it is, and the model fails
        theirs = torch.stack([published(to_pil_image(image), 224) for image in images])
        torch.testing.assert_close(ours(images), theirs, rtol=0, atol=2e-5)
    assert ours(images).shape == (4, 3, 224, 224)
    assert (ours.resized(images).amax() > 1.02) == (max(size) != 224)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 71)])
def test_open_clips_cosine(height: int, width: int, tmp_path: Path) -> None:
    """Of images prepared as hpsv2 does it, to single precision."""
    file, name = hps(tmp_path / "tiny_hps")
    model = open_clip.create_model(name, pretrained=file)
    images = hard_edges(height, width, cell=3)
    with torch.no_grad():
        seen = model.eval().encode_image(
            torch.stack([published(to_pil_image(image), 32) for image in images])
        )
        theirs = F.cosine_similarity(seen, model.encode_text(open_clip.get_tokenizer(name)(PROMPTS)))
        ours = HPSv2(file, file=FILE, architecture=name)(images, PROMPTS)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gradient_is_the_finite_difference(tmp_path: Path) -> None:
    """Through the padding too. A folder serves as well as the file."""
    _, name = hps(tmp_path / "tiny_hps")
    reward = HPSv2(str(tmp_path / "tiny_hps"), file=FILE, architecture=name)
    slopes_agree(reward, pictures(48, 71), [reward.clip.model])


def test_other_files_are_refused(tmp_path: Path) -> None:
    """No file, a file of another architecture, a file that is no state dict: one sentence each."""
    file, name = hps(tmp_path / "tiny_hps")
    with pytest.raises(
        FileNotFoundError, match=rf"^path={tmp_path}: {tmp_path} has no {FILE}; give a file or folder with"
    ):
        HPSv2.check(str(tmp_path), file=FILE)
    wider = open_clip_architecture(tmp_path / "tiny_wider", width=24)
    with pytest.raises(
        ValueError, match=r"path=\S+: HPS_v2.1_compressed.pt is no state dict of open_clip's tiny_wider \("
    ):
        HPSv2(file, file=FILE, architecture=wider)
    Path(file).write_bytes(b"not weights")
    with pytest.raises(
        ValueError, match=r"path=\S+: HPS_v2.1_compressed.pt is no state dict of open_clip's tiny_hps \("
    ):
        HPSv2(file, file=FILE, architecture=name)

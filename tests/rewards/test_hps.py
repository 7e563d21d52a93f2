"""HPSv2 from a file as it is published, against open_clip's own model and transform, which pads."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from alignlab.rewards.hps import HPSv2
from tests.rewards.published import PROMPTS, hps, open_clip_architecture, pictures, slopes_agree

FILE = "HPS_v2.1_compressed.pt"


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 71)])
def test_open_clips_cosine(height: int, width: int, tmp_path: Path) -> None:
    """With its longest-side transform on PIL pictures. At the CLIP's own size, where nothing is resized, to single precision."""
    file, name = hps(tmp_path / "tiny_hps")
    model, _, look = open_clip.create_model_and_transforms(name, pretrained=file, image_resize_mode="longest")
    images = pictures(height, width)
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([look(to_pil_image(image)) for image in images]))
        theirs = F.cosine_similarity(seen, model.encode_text(open_clip.get_tokenizer(name)(PROMPTS)))
        ours = HPSv2(file, file=FILE, architecture=name)(images, PROMPTS)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if height == 32 else 3e-3)


def test_gradient_is_the_finite_difference(tmp_path: Path) -> None:
    """Through the padding too. A folder serves as well as the file."""
    _, name = hps(tmp_path / "tiny_hps")
    reward = HPSv2(str(tmp_path / "tiny_hps"), file=FILE, architecture=name)
    slopes_agree(reward, pictures(48, 71), [reward.clip.model])


def test_other_files_are_refused(tmp_path: Path) -> None:
    """No file, a file of another architecture, a file that is no state dict: one sentence each."""
    file, name = hps(tmp_path / "tiny_hps")
    with pytest.raises(FileNotFoundError, match=rf"^path={tmp_path}: {tmp_path} has no {FILE}; give a file or folder with"):
        HPSv2.check(str(tmp_path), file=FILE)
    wider = open_clip_architecture(tmp_path / "tiny_wider", width=24)
    with pytest.raises(ValueError, match=r"path=\S+: HPS_v2.1_compressed.pt is no state dict of open_clip's tiny_wider \("):
        HPSv2(file, file=FILE, architecture=wider)
    Path(file).write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"path=\S+: HPS_v2.1_compressed.pt is no state dict of open_clip's tiny_hps \("):
        HPSv2(file, file=FILE, architecture=name)

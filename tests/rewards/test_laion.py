"""LAION's heads as they are published; v2's own file, where it is at hand."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from alignlab.rewards.clip import Clip
from alignlab.rewards.laion import LaionAesthetic, LaionAestheticV1
from tests.rewards.published import (
    hard_edges,
    laion_head,
    open_clip_architecture,
    open_clip_weights,
    pictures,
    slopes_agree,
)

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"
SHA256 = "21dd590f"


def test_v2_is_the_published_layers(tmp_path: Path) -> None:
    """Five linear layers, dropout off, no activation between them, on the embedding of length 1."""
    layers = laion_head(tmp_path / "head.pth")
    images = pictures(48)
    reward = LaionAesthetic(str(tmp_path), file="head.pth", clip="emoji_clip")
    with torch.no_grad():
        torch.testing.assert_close(reward(images, [""] * 3), layers(Clip("emoji_clip").images(images))[:, 0])


def test_v1_is_a_bare_layer(tmp_path: Path) -> None:
    layer = nn.Linear(96, 1)
    torch.save(layer.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    reward = LaionAestheticV1(str(tmp_path), file="sa_0_4_vit_l_14_linear.pth", clip="emoji_clip")
    images = pictures(48)
    with torch.no_grad():
        torch.testing.assert_close(reward(images, [""] * 3), layer(Clip("emoji_clip").images(images))[:, 0])


def relu_head(file: Path, *, dropout: bool = True) -> nn.Sequential:
    """The layers of the published reluMSE file, with its numbers (0, 3, 6, 9, 11), or without the dropouts
    (0, 2, 4, 6, 8)."""
    parts: list[nn.Module] = []
    for into, out in ((96, 9), (9, 7), (7, 5), (5, 4)):
        parts += [nn.Linear(into, out), nn.ReLU(), *([nn.Dropout(0.2)] if dropout and out > 4 else [])]
    layers = nn.Sequential(*parts, nn.Linear(4, 1)).eval()
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, file)
    return layers


@pytest.mark.parametrize("dropout", [True, False])
def test_a_head_with_relu_is_asked_about(dropout: bool, tmp_path: Path) -> None:
    """Its weights would fit an affine map. Nothing is loaded before it is said; then the score is its own."""
    file = tmp_path / "head.pth"
    layers = relu_head(file, dropout=dropout)
    numbers = "0, 3, 6, 9, 11" if dropout else "0, 2, 4, 6, 8"
    said = (
        rf"^path={file}: head.pth does not say whether ReLU .*numbers are {numbers};.*set relu=true, .* or "
        r"relu=false"
    )
    for ask in (LaionAesthetic.check, LaionAesthetic):
        with pytest.raises(ValueError, match=said):
            ask(str(file), file="head.pth", clip="emoji_clip")
    images = pictures(48)
    with torch.no_grad():
        embeddings = Clip("emoji_clip").images(images)
        mine, affine_map = (
            LaionAesthetic(str(file), file="head.pth", clip="emoji_clip", relu=relu)(images, [""] * 3)
            for relu in (True, False)
        )
        torch.testing.assert_close(mine, layers(embeddings)[:, 0])
    assert (mine - affine_map).abs().max() > 1e-3


def test_a_name_that_says_relu_is_asked_about(tmp_path: Path) -> None:
    """Even where the layers are numbered as those of the published head without it. What is said is not asked
    again."""
    file = tmp_path / "my-reluMSE.pth"
    layers = laion_head(file)
    with pytest.raises(
        ValueError, match=r"my-reluMSE\.pth does not say whether ReLU stands between its layers"
    ):
        LaionAesthetic.check(str(file), file=file.name, clip="emoji_clip")
    images = pictures(48)
    with torch.no_grad():
        score = LaionAesthetic(str(file), file=file.name, clip="emoji_clip", relu=False)(images, [""] * 3)
        torch.testing.assert_close(score, layers(Clip("emoji_clip").images(images))[:, 0])


def test_interpolation_is_a_choice(tmp_path: Path) -> None:
    """Bicubic as published, or bilinear as AlignProp's own code has it: torchvision's resize of a float
    tensor."""
    layers, images = laion_head(tmp_path / "head.pth"), hard_edges(96, 120)
    options = {"file": "head.pth", "clip": "emoji_clip"}
    published = LaionAesthetic(str(tmp_path), **options)
    alignprop = LaionAesthetic(str(tmp_path), **options, interpolation="bilinear")
    seen = {
        one: reward.clip.preprocess.resized(images)
        for one, reward in (("bicubic", published), ("bilinear", alignprop))
    }
    theirs = resize(images, [48, 48], InterpolationMode.BILINEAR)
    torch.testing.assert_close(seen["bilinear"], theirs, rtol=0, atol=1e-5)
    assert (seen["bicubic"] - theirs).abs().max() > 0.02
    with torch.no_grad():
        score = layers(Clip("emoji_clip").images(theirs))[:, 0]
        torch.testing.assert_close(alignprop(images, [""] * 3), score, rtol=0, atol=1e-5)


def test_gradient_is_the_finite_difference(tmp_path: Path) -> None:
    laion_head(tmp_path / "head.pth")
    reward = LaionAesthetic(str(tmp_path / "head.pth"), file="head.pth", clip="emoji_clip")
    slopes_agree(reward, pictures(60, 75), [reward.clip.model, reward.head])


def affine(head: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """w and b of a head that is w.e + b."""
    e = torch.zeros(1, width, requires_grad=True)
    value = head(e)
    return torch.autograd.grad(value.sum(), e)[0][0], value[0].detach()


def test_the_published_file(tmp_path: Path) -> None:
    """It loads as it is, and is the affine map it is known to be: a norm of 17.996 and an offset of 5.237."""
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED.name} is not beside the checkout")
    assert hashlib.sha256(PUBLISHED.read_bytes()).hexdigest().startswith(SHA256)
    name, folder = open_clip_architecture(tmp_path / "tiny_768", width=768), tmp_path / "clip"
    folder.mkdir()
    config = json.loads((tmp_path / "tiny_768" / "tiny_768.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip_weights(name), folder / "open_clip_model.safetensors")
    reward = LaionAesthetic(str(PUBLISHED), file=PUBLISHED.name, clip=str(folder))
    w, b = affine(reward.head, 768)
    assert w.norm().item() == pytest.approx(17.996, abs=1e-3) and b.item() == pytest.approx(5.237, abs=1e-3)
    images = pictures(32)
    with torch.no_grad():
        torch.testing.assert_close(
            reward(images, [""] * 3), reward.clip.images(images) @ w + b, rtol=0, atol=1e-4
        )


def test_other_files_are_refused(tmp_path: Path) -> None:
    """No file, no CLIP, a head of another width, a file that is no head, a pickle that would run code: one
    sentence each."""
    path = tmp_path / "head.pth"
    with pytest.raises(
        FileNotFoundError,
        match=rf"^path={path}: there is no such file or folder; give a file or folder with head.pth, or",
    ):
        LaionAesthetic.check(str(path), file="head.pth")
    laion_head(path, width=12)
    with pytest.raises(
        FileNotFoundError, match=r"^clip=nowhere: there is no such folder and no such shipped model; give"
    ):
        LaionAesthetic.check(str(path), file="head.pth", clip="nowhere")
    (tmp_path / "clip").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / "clip" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"^clip=.*open_clip_config.json is no configuration of open_clip's"):
        LaionAesthetic.check(str(path), file="head.pth", clip=str(tmp_path / "clip"))
    with pytest.raises(ValueError, match=r"^clip=.*open_clip_config.json is no configuration of open_clip's"):
        Clip(str(tmp_path / "clip"), key="clip")
    with pytest.raises(
        ValueError, match=r"head.pth rates embeddings of length 12, and those of clip=emoji_clip have 96"
    ):
        LaionAesthetic(str(path), file="head.pth", clip="emoji_clip")
    torch.save({"layers.0.weight": torch.ones(3, 4)}, path)
    with pytest.raises(
        ValueError, match=r"this is no head of linear layers that end in one number: it has layers.0.weight"
    ):
        LaionAesthetic(str(path), file="head.pth", clip="emoji_clip")
    torch.save(Path("harm"), path)
    with pytest.raises(ValueError, match=r"head.pth is no file of weights \(.*\); fetch it again"):
        LaionAesthetic(str(path), file="head.pth", clip="emoji_clip")

"""ImageReward from files as they are published, against BLIP's forward pass written out."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image

from alignlab.rewards.image_reward import ImageReward
from alignlab.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.rewards.published import PROMPTS, image_reward, pictures, slopes_agree

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Two heads."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    score = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None].bool(), -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


def blip(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The published forward pass: a pre-norm ViT, a post-norm BERT with attention to it in each layer, the
    head on its first token."""
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    x = (
        F.conv2d(
            pixels, state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=16
        )
        .flatten(2)
        .mT
    )
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{eye}.pos_embed"]
    for k in range(2):
        block = f"{eye}.blocks.{k}"
        q, key, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attend(q, key, v))
        inner = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", inner)
    x = norm(state, f"{eye}.norm", x, 1e-6)
    words, places = (state[f"{reader}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    y = norm(state, f"{reader}.embeddings.LayerNorm", words[ids] + places[: ids.shape[1]], 1e-12)
    for k in range(2):
        layer = f"{reader}.encoder.layer.{k}"
        for kind, source, which in (("attention", None, mask), ("crossattention", x, None)):
            of = y if source is None else source
            q, key, v = (
                linear(state, f"{layer}.{kind}.self.{n}", t)
                for n, t in (("query", y), ("key", of), ("value", of))
            )
            y = norm(
                state,
                f"{layer}.{kind}.output.LayerNorm",
                y + linear(state, f"{layer}.{kind}.output.dense", attend(q, key, v, which)),
                1e-12,
            )
        inner = F.gelu(linear(state, f"{layer}.intermediate.dense", y))
        y = norm(state, f"{layer}.output.LayerNorm", y + linear(state, f"{layer}.output.dense", inner), 1e-12)
    z = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        z = linear(state, f"mlp.layers.{number}", z)
    return z[:, 0]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 71)])
def test_blip_written_out(height: int, width: int, tmp_path: Path) -> None:
    """(r - 0.1672)/1.0333 with the authors' PIL transforms, 35 tokens at most. At its own size, where nothing
    is resized, to single precision."""
    path = image_reward(tmp_path / "model")
    images, prompts = pictures(height, width), [PROMPTS[0], "two fish " * 30, ""]
    look = Compose(
        [
            Resize(32, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(32),
            ToTensor(),
            Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    words = (tmp_path / "model" / "vocab.txt").read_text().split()
    read = [
        ["[CLS]", *([*prompt.split(), "[SEP]"] if len(prompt) < 100 else [*prompt.split()[:33], "[SEP]"])]
        for prompt in prompts
    ]
    ids = torch.tensor([[words.index(w) for w in line] + [0] * (35 - len(line)) for line in read])
    mask = torch.tensor([[1] * len(line) + [0] * (35 - len(line)) for line in read])
    state = torch.load(tmp_path / "model" / "ImageReward.pt", weights_only=True)
    theirs = (blip(state, torch.stack([look(to_pil_image(i)) for i in images]), ids, mask) - 0.1672) / 1.0333
    with torch.no_grad():
        ours = ImageReward(path, tokenizer=path)(images, prompts)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 if height == 32 else 2e-2)


def test_gradient_is_the_finite_difference(tmp_path: Path) -> None:
    path = image_reward(tmp_path / "model")
    reward = ImageReward(path, tokenizer=path)
    slopes_agree(reward, pictures(48, 71), [reward.image, reward.text, reward.head])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = image_reward(tmp_path / "model")
    for name, key in {"vocab.txt": "tokenizer", "med_config.json": "path", "ImageReward.pt": "path"}.items():
        (tmp_path / "model" / name).unlink()
        with pytest.raises(
            FileNotFoundError,
            match=rf"^{key}={path}: {path} has no {name}; give a file or folder with {name}",
        ):
            ImageReward(path, tokenizer=path)


@pytest.mark.parametrize(
    "lost",
    [
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "mlp.layers.7.weight",
    ],
)
def test_other_weights_are_refused(lost: str, tmp_path: Path) -> None:
    """A state dict that lacks a tensor of any part."""
    path = image_reward(tmp_path / "model")
    file = tmp_path / "model" / "ImageReward.pt"
    torch.save({k: v for k, v in torch.load(file, weights_only=True).items() if k != lost}, file)
    with pytest.raises(
        ValueError, match=rf"^path={path}: ImageReward.pt and med_config.json are not ImageReward's \("
    ):
        ImageReward(path, tokenizer=path)


def test_a_head_with_relu_is_refused(tmp_path: Path) -> None:
    """Its layers would have other numbers, and its weights would fit all the same."""
    path = image_reward(tmp_path / "model")
    file = tmp_path / "model" / "ImageReward.pt"
    number = {"0": "0", "2": "3", "4": "6", "6": "9", "7": "11"}
    state = torch.load(file, weights_only=True)
    renamed = {
        ".".join(number.get(w, w) if k.startswith("mlp.") else w for w in k.split(".")): v
        for k, v in state.items()
    }
    torch.save(renamed, file)
    with pytest.raises(
        ValueError, match=r"its head numbers its layers \(0, 3, 6, 9, 11\), not .* so ReLU may stand between"
    ):
        ImageReward(path, tokenizer=path)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    path = image_reward(tmp_path / "model")
    (tmp_path / "model" / "med_config.json").write_text(json.dumps({"hidden_size": 32}))
    with pytest.raises(ValueError, match=r"are not ImageReward's \('vocab_size'\); fetch them again"):
        ImageReward(path, tokenizer=path)

"""Tiny random weights in the formats that rewards are published in, and what tests of rewards share."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from alignlab.rewards import Reward
from alignlab.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.conftest import byte_tokenizer

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:  # before version 5 the one there was used PIL
    CLIPImageProcessorPil = CLIPImageProcessor

PROMPTS = ["a lion on a blue background", "two fish", "a red bird"]


def pictures(height: int, width: int | None = None, n: int = 3) -> Tensor:
    """[n, 3, height, width], smooth with some texture, in 8 bits exactly and away from black and white."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((n, 3, 1, 1), 0.5)
    for cells, size in ((5, 0.8), (24, 0.3)):
        noise = torch.rand(n, 3, cells, cells, generator=generator) - 0.5
        images = images + size * F.interpolate(noise, (height, width or height), mode="bicubic")
    return (images.clamp(0.02, 0.98) * 255).round() / 255


def hard_edges(height: int, width: int | None = None, *, cell: int = 7) -> Tensor:
    """[3, 3, height, width], black and white only: a chessboard, stripes and noise. Bicubic interpolation
    overshoots at each edge."""
    width = width or height
    down, across = torch.meshgrid(torch.arange(height) // cell, torch.arange(width) // cell, indexing="ij")
    board, stripes = ((down + across) % 2).float(), (across % 2).float()
    noise = (torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    return torch.stack(
        [torch.stack([board, 1 - board, board]), torch.stack([stripes, stripes, 1 - stripes]), noise]
    )


def slopes_agree(reward: Reward, images: Tensor, modules: Sequence[nn.Module] = ()) -> None:
    """The gradient along a random direction is the central difference, for each image by itself, in float64;
    weights take none."""
    for module in modules:
        module.double()
        assert not any(p.requires_grad for p in module.parameters()) and not module.training
    images = images.double().requires_grad_()
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[: len(images)]).sum(), images)
    slope, h = (gradient * direction).sum((1, 2, 3)), 1e-5
    with torch.no_grad():
        ahead, behind = (reward(images + step * direction, PROMPTS[: len(images)]) for step in (h, -h))
    assert reward.differentiable and slope.abs().min() > 1e-6
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-6)


def transformers_clip(
    folder: Path, *, side: int = 32, eos: int | None = None, processor: Path | None = None
) -> str:
    """A CLIPModel as save_pretrained writes it, and the files of its processor, beside it or in a folder of
    their own."""
    tokenizer, words = byte_tokenizer(_new(folder.with_name(f"{folder.name}_words")))
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {
        "vocab_size": words,
        "max_position_embeddings": 12,
        "bos_token_id": words - 2,
        "eos_token_id": eos or words - 1,
    }
    config = CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": side, "patch_size": 8},
        projection_dim=16,
    )
    model = _random(CLIPModel(config))
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    home = processor or folder
    shutil.copytree(tokenizer.name_or_path, home, dirs_exist_ok=True)
    look = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    (home / "preprocessor_config.json").write_text(json.dumps(look))
    return str(folder)


def open_clip_architecture(folder: Path, *, width: int = 16, side: int = 32) -> str:
    """Makes a small architecture known to open_clip by its name, which is the folder's."""
    config = {
        "embed_dim": width,
        "vision_cfg": {"image_size": side, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (_new(folder) / f"{folder.name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return folder.name


def open_clip_weights(architecture: str, **options: Any) -> dict[str, Tensor]:
    """A random state dict of one of open_clip's architectures."""
    return _random(open_clip.create_model(architecture, **options)).state_dict()


def hps(folder: Path) -> tuple[str, str]:
    """A file as HPS_v2.1_compressed.pt is, and the name of its architecture."""
    architecture = open_clip_architecture(folder)
    torch.save(
        {"epoch": 3, "name": "tiny", "state_dict": open_clip_weights(architecture)},
        folder / "HPS_v2.1_compressed.pt",
    )
    return str(folder / "HPS_v2.1_compressed.pt"), architecture


def laion_head(file: Path, width: int = 96) -> nn.Sequential:
    """v2's layers, as the file keeps them (dropouts counted); the module that they are."""
    layers = nn.Sequential(
        nn.Linear(width, 9),
        nn.Dropout(0.2),
        nn.Linear(9, 7),
        nn.Dropout(0.2),
        nn.Linear(7, 5),
        nn.Dropout(0.1),
        nn.Linear(5, 4),
        nn.Linear(4, 1),
    ).eval()
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, file)
    return layers


def image_reward(
    folder: Path, *, side: int = 32, patch: int = 16, width: int = 128, hidden: int = 32, layers: int = 2
) -> str:
    """A folder with ImageReward.pt, med_config.json and vocab.txt: the published names, two heads in each
    tower."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "lion",
        "on",
        "blue",
        "background",
        "two",
        "fish",
        "red",
        "##s",
        ".",
    ]
    (_new(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
    med = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 40,
        "model_type": "bert",
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(words) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
        "add_type_embeddings": False,
    }
    (folder / "med_config.json").write_text(json.dumps(med))
    state: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.randn(out, into) / into**0.5,
            0.1 * torch.randn(out),
        )

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(size), 0.1 * torch.randn(size)

    eye = "blip.visual_encoder"
    state[f"{eye}.cls_token"] = torch.randn(1, 1, width)
    state[f"{eye}.pos_embed"] = torch.randn(1, 1 + (side // patch) ** 2, width)
    state[f"{eye}.patch_embed.proj.weight"] = torch.randn(width, 3, patch, patch) / patch
    state[f"{eye}.patch_embed.proj.bias"] = torch.randn(width)
    for k in range(layers):
        block = f"{eye}.blocks.{k}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 160, width)
        linear(f"{block}.mlp.fc2", width, 160)
    norm(f"{eye}.norm", width)
    reader = "blip.text_encoder"
    state[f"{reader}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{reader}.embeddings.word_embeddings.weight"] = torch.randn(len(words) + 2, hidden)
    state[f"{reader}.embeddings.position_embeddings.weight"] = torch.randn(40, hidden)
    norm(f"{reader}.embeddings.LayerNorm", hidden)
    for k in range(layers):
        layer = f"{reader}.encoder.layer.{k}"
        for kind, into in {"attention": hidden, "crossattention": width}.items():
            linear(f"{layer}.{kind}.self.query", hidden, hidden)
            linear(f"{layer}.{kind}.self.key", hidden, into)
            linear(f"{layer}.{kind}.self.value", hidden, into)
            linear(f"{layer}.{kind}.output.dense", hidden, hidden)
            norm(f"{layer}.{kind}.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", 48, hidden)
        linear(f"{layer}.output.dense", hidden, 48)
        norm(f"{layer}.output.LayerNorm", hidden)
    linear("blip.vision_proj", 8, width)
    linear("blip.text_proj", 8, hidden)
    sizes = [hidden, 9, 7, 5, 4, 1]
    for number, out, into in zip((0, 2, 4, 6, 7), sizes[1:], sizes[:-1], strict=True):
        linear(f"mlp.layers.{number}", out, into)
    torch.save(state, folder / "ImageReward.pt")
    return str(folder)


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _random(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()

"""Strict numerics for every test, and the tiny Stable Diffusion pipeline that stands in for a real one."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from alignlab.engine.noise import NoiseKey, noise_key
from alignlab.engine.policy import Policy
from alignlab.models.lora import LoRA
from alignlab.models.sd import StableDiffusion

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = (
    "1"  # of the processes that tests start: they may not have every core for themselves
)

SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
"""Stable Diffusion 1.x, with no step-dependent option set."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one at the end."""
    longest = ("test_notebooks", "test_a_quick_figure", "test_ranks", "test_sweeps")
    items.sort(key=lambda item: not any(name in item.nodeid for name in longest))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random pipeline of real diffusers classes: 8x8 latents, 16x16 images, attention at the
    lower of two levels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_sd")
    tokenizer, words = byte_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    with torch.no_grad():  # norms of a trained model are not 1 and 0, which 16 bits hold exactly
        for norm in (
            m
            for net in (unet, vae)
            for m in net.modules()
            if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))
        ):
            norm.weight.add_(0.1 * torch.randn_like(norm.weight))
            norm.bias.add_(0.1 * torch.randn_like(norm.bias))
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        scheduler=DDIMScheduler(
            **SD_SCHEDULE, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


def byte_tokenizer(folder: Path) -> tuple[CLIPTokenizer, int]:
    """A byte-level CLIP tokenizer without merges, and its number of entries."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    home = folder / "tokenizer"
    home.mkdir()
    (home / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (home / "merges.txt").write_text("#version: 0.2\n")
    (home / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"})
    )
    return CLIPTokenizer.from_pretrained(str(home)), len(tokens)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


PROMPTS = ("a cat", "a dog", "a cat", "a red bird", "a dog", "a cat", "", "two fish")


def tiny_policy(
    path: str, *, size: float = 0.75, rank: int = 4, alpha: float = 4.0, scheduler: Any = None, **options: Any
) -> Policy:
    """A policy on the tiny U-Net whose LoRA is random: `size` moves images by >= 0.04; 0 is the freshly
    initialised policy."""
    family: Any = StableDiffusion(path)
    family.scheduler = scheduler or family.scheduler
    torch.manual_seed(1)
    policy = Policy(family, lora=LoRA(rank=rank, alpha=alpha), **options)
    if size and not policy.full:
        with torch.no_grad():  # small in q and k: a saturated softmax amplifies round-off
            for name, parameter in policy.family.denoiser.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, size / 4 if ".to_q." in name or ".to_k." in name else size)
    return policy


def key(n: int = 8, seed: int = 0) -> NoiseKey:
    return noise_key(PROMPTS[:n], seed=seed, stream="test")

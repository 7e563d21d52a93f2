"""The real architectures from their published configurations, with random weights: speed and memory do not
depend on what was learned.

Numbers of parameters (tests/test_gpu_check.py): U-Net 859.5 M (Stable Diffusion 1.5), 2567.5 M (XL); VAE 83.7
M; text encoders 123.1 M and 694.7 M. `tiny` is a small XL whose every part is there, for a try on a CPU.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging

from alignlab.fast.shared_prefix import SharedStart

Config = Mapping[str, Any]
LENGTH = 77
"""Tokens of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline by its parts' configurations, and the sizes at which it is measured."""

    model: str
    """The option of conf/model that loads it."""
    unet: Config
    vae: Config
    texts: tuple[Config, ...]
    """One text encoder, or XL's two."""
    steps: int
    """N of the sampler."""
    images: int
    """Of an epoch, and of a rollout."""
    micro_batch: int
    decoded: int
    """Micro-batch where gradients pass through the decoder, which runs in float32."""
    kept: tuple[int, ...]
    """K of DRaFT-K whose memory is measured."""


CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
CLIP_TINY = {
    "vocab_size": 1100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
ARCHITECTURES = {
    "tiny": Architecture(
        model="sdxl",
        unet={
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
            "use_linear_projection": True,
        },
        vae={
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "sample_size": 16,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
        },
        texts=(CLIP_TINY, CLIP_TINY),
        steps=4,
        images=4,
        micro_batch=2,
        decoded=2,
        kept=(1, 4),
    ),
    "sd15": Architecture(
        model="sd15",
        # the rest are diffusers' defaults
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae={**VAE, "sample_size": 512, "scaling_factor": 0.18215},
        texts=(CLIP_L,),
        steps=50,
        images=8,
        micro_batch=4,
        decoded=2,
        kept=(1, 5, 10, 50),
    ),
    "sdxl": Architecture(
        model="sdxl",
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        texts=(CLIP_L, CLIP_G),
        steps=50,
        images=4,
        micro_batch=2,
        decoded=1,
        kept=(1, 5, 10, 50),
    ),
}


def unet_of(architecture: Architecture) -> UNet2DConditionModel:
    """On the default device."""
    return UNet2DConditionModel(in_channels=4, out_channels=4, **architecture.unet)


def parts_of(architecture: Architecture, tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    """U-Net, VAE and text encoders, on the default device."""
    ends: Config = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    texts = [CLIPTextConfig(**text, max_position_embeddings=LENGTH, **ends) for text in architecture.texts]
    parts = {
        "unet": unet_of(architecture),
        "vae": AutoencoderKL(**architecture.vae),
        "text_encoder": CLIPTextModel(texts[0]),
    }
    return parts | ({"text_encoder_2": CLIPTextModelWithProjection(texts[1])} if len(texts) == 2 else {})


def pipeline_folder(name: str, home: Path, device: torch.device) -> Path:
    """A diffusers pipeline folder in half precision under `home`, made unless it is there. Needs no
    network."""
    folder, architecture = home / name, ARCHITECTURES[name]
    if (folder / "model_index.json").is_file():
        return folder
    tokenizer = CLIPTokenizer.from_pretrained(
        str(files("alignlab") / "assets" / "emoji" / "tokenizer"), model_max_length=LENGTH
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        parts: dict[str, Any] = {
            part: network.half() for part, network in parts_of(architecture, tokenizer).items()
        }
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    if len(architecture.texts) == 2:
        pipe: Any = StableDiffusionXLPipeline(
            **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    aside = home / f".{name}"  # a folder that counts is whole
    shutil.rmtree(aside, ignore_errors=True)
    pipe.save_pretrained(aside)
    aside.rename(folder)
    return folder


def inputs(architecture: Architecture, rows: int) -> dict[str, Any]:
    """Of one pass of so many latents through the U-Net, on the default device."""
    side, added = architecture.unet["sample_size"], {}
    if len(architecture.texts) == 2:
        added = {
            "added_cond_kwargs": {
                "text_embeds": torch.zeros(rows, architecture.texts[1]["projection_dim"]),
                "time_ids": torch.zeros(rows, 6),
            }
        }
    text = torch.zeros(rows, LENGTH, architecture.unet["cross_attention_dim"])
    return {
        "sample": torch.zeros(rows, 4, side, side),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": text,
        **added,
    }


def unet_flops(
    architecture: Architecture, unet: Any, targets: Sequence[str], rank: int
) -> dict[bool, dict[str, float]]:
    """Floating-point operations (a multiply-add is two) of one latent's forward pass, and of its backward
    pass when only a LoRA is trained: alone (False), and as one of guidance's two branches (True), which share
    their start. Attention is spelled out as matrix products; nothing is calculated.

    Args:
        unet: its own, on the meta device; it gets the adapter.
    """
    found = {}
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        unet.requires_grad_(False).add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
        )
        start = SharedStart(unet)
        for guided, rows in ((False, 1), (True, 2)):
            with FlopCounterMode(display=False) as forward, start.shared(rows * guided):
                out: Tensor = unet(**inputs(architecture, rows), return_dict=False)[0]
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            found[guided] = {
                "forward": forward.get_total_flops() / rows,
                "backward": backward.get_total_flops() / rows,
            }
    return found

"""Random pipelines of the classes people use, small enough for seconds: 8x8 latents, 16x16 images."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.conftest import SD_SCHEDULE, byte_tokenizer


def vae(channels: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    )


def clip(folder: Path, *, projection: bool, width: int = 16) -> tuple[Any, Any]:
    """A tokenizer and its text encoder."""
    folder.mkdir()
    tokenizer, words = byte_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=12,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width: int = 16) -> tuple[Any, Any]:
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((chr(97 + k), -2.0) for k in range(26)),
    ]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer) + 4, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def sdxl(folder: Path) -> Path:
    """Two text encoders (of different widths, by which a single file's are told apart), added conditions, v
    prediction."""
    torch.manual_seed(0)
    tokenizer, one = clip(folder / "one", projection=False)
    tokenizer_2, two = clip(folder / "two", projection=True, width=24)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=40,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        use_linear_projection=True,
    )
    scheduler = DDIMScheduler(
        **SD_SCHEDULE, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def sd3(folder: Path) -> Path:
    """Two CLIPs (the first one's projection is the identity that a single file stands for) and T5; static
    shift."""
    torch.manual_seed(0)
    tokenizer, one = clip(folder / "one", projection=True)
    torch.nn.init.eye_(one.text_projection.weight)
    tokenizer_2, two = clip(folder / "two", projection=True, width=24)
    tokenizer_3, three = t5(48)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        text_encoder_3=three,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def flux(folder: Path) -> Path:
    """CLIP and T5; guidance embedding; dynamic shift."""
    torch.manual_seed(0)
    tokenizer, one = clip(folder / "one", projection=False, width=32)
    tokenizer_2, two = t5(32)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


MAKERS = {"sdxl": "sdxl", "sd35": "sd3", "flux": "flux"}
"""By `model=`, the function that writes its folder."""

"""Stable Diffusion XL: two text encoders, and the image's size and crop as added conditions."""

from collections.abc import Iterator

import torch
from torch import Tensor

from alignlab.models import kohya, unfit
from alignlab.models.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """UNet, two text encoders, VAE. The size told to the network is that of the images, uncropped."""

    pipeline = "StableDiffusionXLPipeline"
    others = ("text_encoder", "text_encoder_2", "vae")
    required = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    @classmethod
    def pipeline_problems(cls, index: unfit.Config) -> Iterator[str]:
        if index.get("requires_aesthetics_score"):
            yield "this is XL's refiner, which is told an aesthetic score; give the base model"

    @classmethod
    def network_problems(cls, configs: unfit.Configs) -> Iterator[str]:
        unet, clip_l, clip_g = (configs.get(part, {}) for part in ("unet", "text_encoder", "text_encoder_2"))
        yield from unfit.size_problems("unet", unet, square=False)
        width = unfit.total(clip_l.get("hidden_size"), clip_g.get("hidden_size"))
        yield from unfit.unet_problems(unet, width, added="text_time")
        numbers, pooled = unet.get("addition_time_embed_dim"), clip_g.get("projection_dim")
        if unfit.is_count(numbers):
            told = unfit.total(6 * numbers, pooled)  # six numbers tell size and crop
            key = "projection_class_embeddings_input_dim"
            yield from unfit.width_problems("unet", key, unet.get(key), told)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": [B, length, width], "text_embeds": [B, width], "time_ids": [B, 6]}. The empty
        prompt is all zeros where the pipeline's config says so (force_zeros_for_empty_prompt), because that
        is its unconditional branch."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            written = torch.tensor([prompt != "" for prompt in prompts], device=self.device)
            embeds, pooled = embeds * written[:, None, None], pooled * written[:, None]
        height, width = map(float, self.image_size)
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(
            len(prompts), -1
        )
        return {"prompt_embeds": embeds.float(), "text_embeds": pooled.float(), "time_ids": ids}

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The UNet's output [M, C, h, w]."""
        added = {"text_embeds": text["text_embeds"], "time_ids": text["time_ids"]}
        return self.denoiser(x, t, text["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def kohya_layer(self, module: str) -> kohya.Layer | None:
        return kohya.ldm(module, self.denoiser.config)

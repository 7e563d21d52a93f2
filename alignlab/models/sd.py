"""Stable Diffusion 1.x/2.x, and every pipeline of that form: the embedded emoji model is one.

Loads a diffusers pipeline folder or a hub id; epsilon, v and sample prediction come from the scheduler's config.
"""

from typing import Any

from torch import Tensor

from alignlab.models.pipeline import DiffusersPipeline


class StableDiffusion(DiffusersPipeline):
    """UNet, one text encoder, VAE."""

    def scheduler_of(self, scheduler: Any) -> Any:
        """DDIM's: another scheduler's config does not speak of clip_sample; one that says true is refused by ddim()."""
        from diffusers import DDIMScheduler

        config = scheduler.config
        return DDIMScheduler.from_config({**config, "clip_sample": config.get("clip_sample", False)})

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": [B, length, width]}; prompts beyond the tokenizer's length are cut, as the pipeline does."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return {"prompt_embeds": self.pipe.text_encoder(ids.to(self.pipe.text_encoder.device))[0].float()}

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The UNet's output [M, C, h, w]."""
        return self.denoiser(x, t, text["prompt_embeds"], return_dict=False)[0]

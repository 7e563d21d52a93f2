"""Stable Diffusion 1.x/2.x, and every pipeline of that form: the embedded emoji model is one.

Loads a diffusers pipeline folder or a hub id; epsilon, v and sample prediction come from the scheduler's
config.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from alignlab.models import unfit
from alignlab.models.pipeline import DiffusersPipeline

PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
"""What a scheduler's config says of the noise that the model was trained with."""


class StableDiffusion(DiffusersPipeline):
    """UNet, one text encoder, VAE."""

    @classmethod
    def network_problems(cls, configs: unfit.Configs) -> Iterator[str]:
        unet, text = configs.get("unet", {}), configs.get("text_encoder", {})
        yield from unfit.size_problems("unet", unet, square=False)
        yield from unfit.unet_problems(unet, text.get("hidden_size"), added=None)
        if str(text.get("_class_name")).endswith("WithProjection"):
            yield (
                f"text_encoder is a {text['_class_name']}, which gives one embedding a prompt; give a "
                "CLIPTextModel"
            )
        if text.get("use_attention_mask"):
            yield (
                "text_encoder has use_attention_mask=true, and this family masks no word; give a model "
                "without it"
            )

    def scheduler_of(self, scheduler: Any) -> Any:
        """The pipeline's own scheduler if it is DDIM's, else DDIM's with the same noise.

        Another scheduler's config does not speak of clip_sample; one that says true is refused by ddim().
        What a folder's file leaves out has the default of the file's class where it tells of the noise, and
        DDIM's elsewhere.
        """
        from diffusers import DDIMScheduler

        if type(scheduler) is DDIMScheduler:
            return scheduler
        config = dict(scheduler.config)
        left_out = {*config.pop("_use_default_values", ())} - {*PROCESS}
        config = {key: value for key, value in config.items() if key not in left_out}
        return DDIMScheduler.from_config({**config, "clip_sample": config.get("clip_sample", False)})

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": [B, length, width]}; prompts beyond the tokenizer's length are cut, as the
        pipeline does."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"prompt_embeds": self.pipe.text_encoder(ids.to(self.pipe.text_encoder.device))[0].float()}

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The UNet's output [M, C, h, w]."""
        return self.denoiser(x, t, text["prompt_embeds"], return_dict=False)[0]

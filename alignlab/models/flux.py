"""FLUX.1: a transformer over packed 2x2 patches that predicts the flow's velocity; CLIP and T5; guidance as
an input of the network."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alignlab.models import kohya, unfit
from alignlab.models.flow import at_resolution
from alignlab.models.pipeline import DiffusersPipeline


class Flux(DiffusersPipeline):
    """Transformer, two text encoders, VAE. Sample with sampler=flow and guidance_scale=1: the guidance is
    distilled into the network.

    Args:
        embedded_guidance: what the network is told (FLUX.1-dev; schnell has no such input).
            [factor]
        max_sequence_length: tokens of T5. [tokens]
        size: side of the images in pixels; the shift of the schedule depends on it. The others are those of
            `DiffusersPipeline`. [pixels]
    """

    pipeline, network, rectified_flow = "FluxPipeline", "transformer", True
    others = ("text_encoder", "text_encoder_2", "vae")
    required = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    @classmethod
    def latent_channels(cls, network: unfit.Config) -> int | None:
        channels = network.get("in_channels")
        return channels // 4 if unfit.is_count(channels) else None  # of packed 2x2 patches

    @classmethod
    def network_problems(cls, configs: unfit.Configs) -> Iterator[str]:
        network, clip, t5 = (
            configs.get(part, {}) for part in ("transformer", "text_encoder", "text_encoder_2")
        )
        yield from unfit.channel_problems("transformer", network)
        widths = {"pooled_projection_dim": clip.get("hidden_size"), "joint_attention_dim": t5.get("d_model")}
        for key, width in widths.items():
            yield from unfit.width_problems("transformer", key, network.get(key), width)

    def __init__(
        self,
        path_or_id: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        embedded_guidance: float = 3.5,
        max_sequence_length: int = 512,
        size: int = 1024,
    ) -> None:
        self.size = size
        super().__init__(
            path_or_id, revision=revision, variant=variant, config=config, lora_targets=lora_targets
        )
        self.embedded_guidance, self.max_sequence_length = embedded_guidance, max_sequence_length
        if size % (2 * self.pipe.vae_scale_factor):
            raise ValueError(f"model.size={size} is not a multiple of {2 * self.pipe.vae_scale_factor}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config: Any = self.denoiser.config
        side = self.size // self.pipe.vae_scale_factor
        return (config.in_channels // 4, side, side)

    def scheduler_of(self, scheduler: Any) -> Any:
        return at_resolution(scheduler, (self.latent_shape[-1] // 2) ** 2)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": [B, length, width], "pooled": [B, width]}."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds.float(), "pooled": pooled.float()}

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The velocity [M, C, h, w]."""
        m, c, h, w = x.shape
        config: Any = self.denoiser.config
        packed = x.view(m, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(m, h * w // 4, 4 * c)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x)
        out = self.denoiser(
            hidden_states=packed,
            timestep=t / 1000,
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled"],
            guidance=torch.full((m,), self.embedded_guidance, device=x.device)
            if config.guidance_embeds
            else None,
            txt_ids=torch.zeros(text["prompt_embeds"].shape[1], 3, device=x.device),
            img_ids=places,
            return_dict=False,
        )[0]
        return out.view(m, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(m, c, h, w)

    def kohya_layer(self, module: str) -> kohya.Layer | None:
        return kohya.in_blocks(module, kohya.FLUX)

"""Stable Diffusion 3 and 3.5: a transformer that predicts the flow's velocity; two CLIPs, and T5 where the
folder has it."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from alignlab.models import kohya, unfit
from alignlab.models.flow import at_resolution
from alignlab.models.pipeline import DiffusersPipeline


class StableDiffusion3(DiffusersPipeline):
    """Transformer, three text encoders (the third may be missing), VAE. Sample with sampler=flow.

    Args:
        max_sequence_length: tokens of T5; the others are those of `DiffusersPipeline`. [tokens]
    """

    pipeline, network, rectified_flow = "StableDiffusion3Pipeline", "transformer", True
    others = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    required = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def __init__(
        self,
        path_or_id: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        max_sequence_length: int = 256,
    ) -> None:
        super().__init__(
            path_or_id, revision=revision, variant=variant, config=config, lora_targets=lora_targets
        )
        self.max_sequence_length = max_sequence_length

    @classmethod
    def network_problems(cls, configs: unfit.Configs) -> Iterator[str]:
        parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        network, clip_l, clip_g, t5 = (configs.get(part, {}) for part in parts)
        yield from unfit.channel_problems("transformer", network)
        if "sample_size" in network:
            yield from unfit.size_problems("transformer", network, square=True)
        pooled = unfit.total(clip_l.get("projection_dim"), clip_g.get("projection_dim"))
        for key, width in {"pooled_projection_dim": pooled, "joint_attention_dim": t5.get("d_model")}.items():
            yield from unfit.width_problems("transformer", key, network.get(key), width)

    def scheduler_of(self, scheduler: Any) -> Any:
        config: Any = self.denoiser.config
        return at_resolution(scheduler, (config.sample_size // config.patch_size) ** 2)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": [B, length, width], "pooled": [B, width]}."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds.float(), "pooled": pooled.float()}

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The velocity [M, C, h, w]."""
        return self.denoiser(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]

    def kohya_layer(self, module: str) -> kohya.Layer | None:
        return kohya.in_blocks(module, kohya.SD3)

"""Stable Diffusion 1.x/2.x, and every pipeline of that form: the embedded emoji model is one.

Loads a diffusers pipeline folder or a hub id; epsilon, v and sample prediction come from the scheduler's config.
"""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class StableDiffusion:
    """A `policy.Family`.

    Args:
        path_or_id: a pipeline folder, the name of a model shipped in alignlab/assets ("emoji"), or a hub id.
        revision: of a hub id.
        variant: weight file variant of a hub id ("fp16").
        lora_targets: which modules of the UNet LoRA adapts unless policy.lora.targets says otherwise.

    Raises:
        FileNotFoundError: if a folder-like path holds no pipeline.
    """

    @staticmethod
    def check(path_or_id: str, **_: Any) -> None:
        """Raises before anything is loaded."""
        locate(path_or_id)

    def __init__(
        self,
        path_or_id: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    ) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # slow to import, and the check of a configuration is quick
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for library in (diffusers_logging, transformers_logging):  # a run has a progress bar of its own
            library.set_verbosity_error()
            library.disable_progress_bar()
        source = locate(path_or_id)
        try:
            pipe: Any = StableDiffusionPipeline.from_pretrained(
                source, revision=revision, variant=variant, safety_checker=None, requires_safety_checker=False
            )
        except OSError as error:
            reason = str(error).strip().splitlines()[0].partition(" (")[0]
            raise OSError(
                f"model.path_or_id={path_or_id} cannot be loaded ({reason}); fetch it where there is a network, or give a folder"
            ) from error
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):  # weights may be stored in half precision
            module.float()
        self.pipe, self.lora_targets = pipe, tuple(lora_targets)
        # Another scheduler's config does not speak of clip_sample; one that says true is refused by ddim().
        config = pipe.scheduler.config
        self.scheduler = DDIMScheduler.from_config({**config, "clip_sample": config.get("clip_sample", False)})
        self.denoiser: nn.Module = pipe.unet
        self.frozen: tuple[nn.Module, ...] = (pipe.text_encoder, pipe.vae)
        size = pipe.unet.config.sample_size
        self.latent_shape = (pipe.unet.config.in_channels, size, size)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": [B, length, width]}; prompts beyond the tokenizer's length are cut, as the pipeline does."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return {"prompt_embeds": self.pipe.text_encoder(ids.to(self.pipe.text_encoder.device))[0].float()}

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        return self.denoiser(x, t, text["prompt_embeds"], return_dict=False)[0]

    def decode(self, x0: Tensor) -> Tensor:
        image = self.pipe.vae.decode(x0 / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        return (image / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path, lora: dict[str, Tensor] | None, config: Any) -> None:
        if lora is None:
            self.pipe.save_pretrained(folder)
        else:  # with the adapter's metadata, without which a reload takes alpha = rank
            self.pipe.save_lora_weights(folder, unet_lora_layers=lora, unet_lora_adapter_metadata=config.to_dict())

    def read_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights of a LoRA that `save` wrote, and its rank, alpha and targets."""
        try:
            state, _, about = self.pipe.lora_state_dict(str(folder), return_lora_metadata=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no LoRA that diffusers can read: {str(error).splitlines()[0]}") from None
        about = {k.removeprefix("unet."): v for k, v in (about or {}).items()}
        if not {"r", "lora_alpha", "target_modules"} <= about.keys():
            raise ValueError(f"the LoRA in {folder} says nothing of its rank and alpha; save it with diffusers 0.36 or later")
        state = {k.removeprefix("unet."): v.float() for k, v in state.items() if k.startswith("unet.")}
        return state, {"rank": about["r"], "alpha": about["lora_alpha"], "targets": tuple(about["target_modules"])}


def locate(path_or_id: str) -> str:
    """A folder as it is, a shipped model by name, else a hub id."""
    shipped = importlib.resources.files("alignlab") / "assets" / path_or_id
    for folder in (Path(path_or_id), Path(str(shipped))):
        if folder.is_dir():
            lacks = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
            for part in ("unet", "vae", "text_encoder"):
                if not any(file.suffix in (".safetensors", ".bin") for file in (folder / part).glob("*")):
                    lacks.append(f"weights in {part}/")
            if lacks:
                raise FileNotFoundError(
                    f"path_or_id={path_or_id}: {folder} has no {', no '.join(lacks)}; give a diffusers pipeline folder"
                )
            return str(folder)
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"path_or_id={path_or_id}: there is no such folder and no such shipped model; "
            "give a diffusers pipeline folder, a hub id like owner/name, or emoji"
        )
    return path_or_id

"""How each family of models is made and sampled, here and in diffusers."""

from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from alignlab.engine.noise import noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.samplers import Sampler, ddim, flow
from alignlab.models.flux import Flux
from alignlab.models.sd import StableDiffusion
from alignlab.models.sd3 import StableDiffusion3
from alignlab.models.sdxl import StableDiffusionXL

PROMPTS = ("a cat", "a dog", "a cat", "two birds")


FAMILIES = {
    "sdxl": (StableDiffusionXL, {}),
    "sd35": (StableDiffusion3, {"max_sequence_length": 8}),
    "flux": (Flux, {"max_sequence_length": 8, "size": 16}),
}


SAMPLERS: dict[str, list[str]] = {
    "sdxl": ["model=sdxl", "model.variant=null"],
    "sd35": ["model=sd35", "sampler=flow", "eval_sampler=flow", "model.max_sequence_length=8"],
    "flux": [
        "model=flux",
        "sampler=flow",
        "eval_sampler=flow",
        "model.max_sequence_length=8",
        "model.size=16",
        "sampler.guidance_scale=1",
        "eval_sampler.guidance_scale=1",
    ],
}


def sampler_of(policy: Policy, name: str, *, eta: float = 0.0, steps: int = 4) -> Sampler:
    guidance = 1.0 if name == "flux" else 3.0
    return (ddim if name in ("sd", "sdxl") else flow)(
        policy.family.scheduler, steps=steps, eta=eta, guidance_scale=guidance
    )


def key(seed: int = 0) -> Any:
    return noise_key(PROMPTS, seed=seed, stream="test")


def images_of_diffusers(pipe: Any, name: str, first: Tensor) -> Tensor:
    """The pipeline's own sampling from the same first latents."""
    if name == "flux":
        m, c, h, w = first.shape
        packed = pipe._pack_latents(first, m, c, h, w)
        return pipe(
            list(PROMPTS),
            latents=packed,
            height=16,
            width=16,
            num_inference_steps=4,
            guidance_scale=3.5,
            max_sequence_length=8,
            output_type="pt",
        ).images
    more = {"max_sequence_length": 8} if name == "sd35" else {}
    return pipe(
        list(PROMPTS),
        latents=first,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
        **more,
    ).images


EVERY: dict[str, tuple[Any, dict[str, Any]]] = {"sd": (StableDiffusion, {}), **FAMILIES}


def pipe_of(name: str, folder: Path) -> Any:
    pipe = getattr(diffusers, EVERY[name][0].pipeline).from_pretrained(
        folder, **({"safety_checker": None} if name == "sd" else {})
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

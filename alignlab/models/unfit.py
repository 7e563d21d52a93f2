"""What makes a pipeline another model than its family takes it for, read from the configurations of the
parts.

A folder that loads is not yet a model that a family can train: an inpainting network, a distilled one,
another noise process or another autoencoder would draw wrong images without a word. Every function yields
sentences that begin with the part's name. A key that a configuration lacks is judged once the part is loaded,
when it has its class's default.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

Config = Mapping[str, Any]
Configs = Mapping[str, Config]
"""By the name of the part ("unet", "vae", "scheduler", "text_encoder" ...); "pipeline" is
model_index.json."""

DISCRETE = {
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "UniPCMultistep",
    )
}
"""Schedulers of diffusers whose noise process is DDPM's table of betas, which is all that is taken from
them."""
OTHERS = {
    "EDM": "its noise levels are EDM's, and not a table of betas",
    "LCM": "it belongs to a latent consistency model, which is distilled for a few steps",
    "TCD": "it belongs to a consistency model, which is distilled for a few steps",
    "CMStochastic": "it belongs to a consistency model, which is distilled for a few steps",
    "FlowMatch": "it belongs to a rectified flow",
    "DPMSolverSDE": "diffusers needs the package torchsde for it",
}
"""Why a scheduler whose name begins so is refused."""
FLOW = "FlowMatchEulerDiscreteScheduler"
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
MODELS = {
    "StableDiffusionPipeline": "model=sd15 (or sd14, sd21)",
    "StableDiffusionXLPipeline": "model=sdxl",
    "StableDiffusion3Pipeline": "model=sd35",
    "FluxPipeline": "model=flux",
}
"""The `model=` that loads a pipeline's class."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def scheduler_problems(config: Config, *, rectified_flow: bool, clips: bool) -> Iterator[str]:
    """Whether the noise process is one that the family's sampler and regression can take.

    Args:
        clips: whether the pipeline leaves `clip_sample` on; Stable Diffusion's own turns it off.
    """
    name = config.get("_class_name")
    if rectified_flow:
        if name not in (None, FLOW):
            yield (
                f"scheduler is a {name}, and this family's rectified flow has a {FLOW}; give the model's own "
                "folder"
            )
        elif config.get("invert_sigmas"):
            yield "scheduler has invert_sigmas=true, which runs the flow backwards; set it to false"
        return
    reasons = (why for start, why in OTHERS.items() if str(name).startswith(start))
    why = next(reasons, "its noise is not DDPM's table of betas")
    if name is not None and name not in DISCRETE:
        yield (
            f"scheduler is a {name}, and {why}; give a model that was trained with DDPM's noise, "
            "or put the model's first scheduler back if only the sampler was exchanged"
        )
        return
    yield from _process_problems(config)
    clipping = [key for key in ("thresholding", *(("clip_sample",) if clips else ())) if config.get(key)]
    if clipping and str(name).startswith("DD"):
        yield (
            f"scheduler has {clipping[0]}=true, which makes the step non-linear; set it to false in "
            "scheduler_config.json"
        )


def _process_problems(config: Config) -> Iterator[str]:
    """The numbers of the betas, and what the network predicts."""
    prediction = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas") or prediction == "flow_prediction":
        yield (
            "scheduler has use_flow_sigmas or prediction_type=flow_prediction, those of a rectified flow; "
            "choose model=sd35 or flux"
        )
    elif prediction not in PREDICTIONS:
        yield (
            f"scheduler has prediction_type={prediction}, which is not one of {', '.join(PREDICTIONS)}; "
            "write the model's"
        )
    steps = config.get("num_train_timesteps", 1000)
    if not is_count(steps) or steps > 10**6:
        yield (
            f"scheduler has num_train_timesteps={steps}, which must be a whole number; write the model's "
            "(1000 as a rule)"
        )
        return
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, Sequence) or len(trained) != steps or not all(map(_is_beta, trained)):
            yield (
                f"scheduler has trained_betas that are not {steps} numbers between 0 and 1; write "
                "num_train_timesteps of them"
            )
        return
    if config.get("beta_schedule", SCHEDULES[0]) not in SCHEDULES:
        yield (
            f"scheduler has beta_schedule={config['beta_schedule']}, which is not one of "
            f"{', '.join(SCHEDULES)}; write trained_betas"
        )
    for key in ("beta_start", "beta_end"):
        if key in config and not _is_beta(config[key]):
            yield (
                f"scheduler has {key}={config[key]}, which must be a number between 0 and 1; write the "
                "model's"
            )


def _is_beta(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


def vae_problems(vae: Config, latent_channels: int | None) -> Iterator[str]:
    """Whether the autoencoder is AutoencoderKL, and scales its latents by numbers.

    Args:
        latent_channels: of the network; None if its configuration does not say.
    """
    kind = vae.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        yield (
            f"vae is a {kind}, and only an AutoencoderKL is taken; give the folder with the model's own "
            "autoencoder"
        )
        return
    for key in ("in_channels", "out_channels"):
        if vae.get(key, 3) != 3:
            yield (
                f"vae has {key}={vae[key]}, and images have 3 channels; give the autoencoder of a "
                "text-to-image model"
            )
    scale, shift = vae.get("scaling_factor", 1.0), vae.get("shift_factor")
    if not is_number(scale) or scale <= 0:
        yield f"vae has scaling_factor={scale}, which must be a positive number; write the model's"
    if shift is not None and not is_number(shift):
        yield f"vae has shift_factor={shift}, which must be a number or null; write the model's"
    channels = vae.get("latent_channels")
    if channels is not None and latent_channels is not None and channels != latent_channels:
        yield (
            f"vae has latent_channels={channels}, and the network draws {latent_channels}; "
            "give the autoencoder that it was trained with"
        )
    yield from _statistics_problems(vae)


def _statistics_problems(vae: Config) -> Iterator[str]:
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if mean is None and std is None:
        return
    count = vae.get("latent_channels", len(mean) if isinstance(mean, Sequence) else None)
    for key, values in {"latents_mean": mean, "latents_std": std}.items():
        fits = isinstance(values, Sequence) and len(values) == count and all(map(is_number, values))
        if not fits or (key == "latents_std" and not all(value > 0 for value in values or ())):
            yield (
                f"vae has {key}={values}, which must be {count} numbers, one a channel, beside the other; "
                "write both, or null for both"
            )
            return
    if vae.get("shift_factor"):
        yield (
            "vae has both latents_mean and shift_factor, which no pipeline applies together; set one of them "
            "to null"
        )


def channel_problems(part: str, network: Config) -> Iterator[str]:
    """Whether the network draws from text alone: it takes as many channels as it gives."""
    into, out = network.get("in_channels"), network.get("out_channels")
    if into is None or out is None or (into == out and is_count(into)):
        return
    if not (is_count(into) and is_count(out)):
        yield (
            f"{part} has in_channels={into} and out_channels={out}, which must be whole numbers; write the "
            "model's"
        )
        return
    if out == 2 * into:
        why = "it predicts a variance too"
    else:
        tasks = {9: "inpainting", 8: "editing (InstructPix2Pix)", 7: "upscaling", 5: "depth"}
        task = tasks.get(into, "inpainting or editing")
        why = f"it looks at an image beside the noise, as models for {task} do"
    yield (
        f"{part} has in_channels={into} and out_channels={out}: {why}; give a model that draws from text "
        "alone"
    )


def size_problems(part: str, network: Config, *, square: bool) -> Iterator[str]:
    """Whether `sample_size` says the side of the latents, or [height, width] where `square` is false."""
    size = network.get("sample_size")
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) == 2 and all(map(is_count, sides)) and (not square or is_count(size)):
        return
    form = "a whole number" if square else "a whole number or [height, width]"
    yield (
        f"{part} has sample_size={size}, and it must say the side of the latents, {form}; "
        "write 64 in its config.json for 512 pixels"
    )


def unet_problems(unet: Config, text_width: int | None, *, added: str | None) -> Iterator[str]:
    """Whether the UNet is told what the family tells it.

    Args:
        text_width: of the prompt's embeddings, if known.
        added: the `addition_embed_type` of the family.
    """
    yield from channel_problems("unet", unet)
    if unet.get("time_cond_proj_dim") is not None:
        yield (
            "unet has time_cond_proj_dim, so guidance is distilled into it, as in a latent consistency "
            "model; give the model before that"
        )
    for key in ("class_embed_type", "num_class_embeds"):
        if unet.get(key) is not None:
            yield (
                f"unet has {key}={unet[key]}, so it waits for a class that no prompt names; "
                "give a model that draws from text alone"
            )
    if unet.get("addition_embed_type", added) != added:
        yield (
            f"unet has addition_embed_type={unet['addition_embed_type']}, and this family's has "
            f"{added or 'none'}; choose its model="
        )
    if unet.get("encoder_hid_dim_type") not in (None, "text_proj"):
        yield (
            f"unet has encoder_hid_dim_type={unet['encoder_hid_dim_type']}, so it waits for an image; "
            "give a model that draws from text alone"
        )
    if unet.get("attention_type", "default") != "default":
        yield (
            f"unet has attention_type={unet['attention_type']}, as GLIGEN has; give a model that draws from "
            "text alone"
        )
    width = unet.get("encoder_hid_dim" if unet.get("encoder_hid_dim_type") else "cross_attention_dim")
    yield from width_problems("unet", "cross_attention_dim", width, text_width)


def width_problems(part: str, key: str, width: Any, text_width: int | None) -> Iterator[str]:
    """Whether the network reads embeddings as wide as the text encoders write them."""
    widths = width if isinstance(width, list | tuple) else [width]
    if text_width is None or all(read in (None, text_width) for read in widths):
        return
    yield (
        f"{part} has {key}={width}, and the text encoders give {text_width}; give the text encoders that it "
        "was trained with"
    )


def total(*widths: Any) -> int | None:
    """The widths together; None if one is not known."""
    return sum(widths) if all(map(is_count, widths)) else None


def quantised_problems(configs: Configs) -> Iterator[str]:
    """Parts whose stored weights are codes, which float32 does not bring back."""
    for part, config in configs.items():
        quantization = config.get("quantization_config")
        if quantization:
            kind = (
                quantization.get("quant_method", "some method")
                if isinstance(quantization, Mapping)
                else quantization
            )
            yield f"{part} is quantised ({kind}); give the model whose weights are not"

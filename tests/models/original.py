"""Tiny pipelines as the single files that people share: diffusers' names mapped back to those of the original
implementations."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignlab.models import kohya

State = dict[str, Tensor]


def single_file(pipe: Any, name: str, file: Path) -> Path:
    """The whole pipeline as one .safetensors file."""
    parts: dict[str, State] = {"first_stage_model.": vae(pipe.vae.state_dict())}
    if name == "sd35":
        parts["model.diffusion_model."] = sd3_transformer(pipe.transformer.state_dict())
        for place, encoder in {
            "clip_l": pipe.text_encoder,
            "clip_g": pipe.text_encoder_2,
            "t5xxl": pipe.text_encoder_3,
        }.items():
            parts[f"text_encoders.{place}.transformer."] = encoder.state_dict()
        del parts["text_encoders.clip_l.transformer."]["text_projection.weight"]
    else:
        parts["model.diffusion_model."] = unet(pipe.unet.state_dict(), pipe.unet.config)
        first = {
            f"text_model.{k.removeprefix('text_model.')}": v
            for k, v in pipe.text_encoder.state_dict().items()
        }
        parts["cond_stage_model.transformer." if name == "sd" else "conditioner.embedders.0.transformer."] = (
            first
        )
        if name == "sdxl":
            parts["conditioner.embedders.1.model."] = open_clip(pipe.text_encoder_2.state_dict())
    save_file(
        {place + k: v.contiguous().clone() for place, part in parts.items() for k, v in part.items()}, file
    )
    return file


def unet(state: State, config: Any) -> State:
    """A UNet in the LDM's names."""
    norms = {"conv1": "norm1", "conv2": "norm2"}  # stand before them
    out = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module == "conv_norm_out":
            out[f"out.0.{kind}"] = value
            continue
        found = re.fullmatch(r"(.*resnets\.\d+\.)(norm[12])", module)
        conv = next((c for c, n in norms.items() if found and n == found[2]), None)
        layer = kohya.ldm(found[1] + conv if found and conv else module, config)
        assert layer, module
        name = re.sub(r"(in_layers|out_layers)\.[23]$", r"\1.0", layer.name) if conv else layer.name
        out[f"{name}.{kind}"] = value
    return out


def vae(state: State) -> State:
    """An AutoencoderKL in the LDM's names; its attention's projections are convolutions there."""
    ups = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks."))
    rules = [
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{ups - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_([qkv])", r"\1"),
    ]
    out = {}
    for key, value in state.items():
        attention = "attentions" in key and value.dim() == 2
        for old, new in rules:
            key = re.sub(old, new, key)
        out[key] = value[:, :, None, None] if attention else value
    return out


def open_clip(state: State) -> State:
    """A CLIP text encoder with projection in open_clip's names: q, k and v are one."""
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inside = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    out = {new: state[old].T if new == "text_projection" else state[old] for old, new in names.items()}
    for key, value in state.items():
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if found and found[2] == "self_attn.q_proj":
            pieces = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            out[f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}"] = torch.cat(pieces)
        elif found and found[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            name = next(found[2].replace(old, new) for old, new in inside.items() if old in found[2])
            out[f"transformer.resblocks.{found[1]}.{name}.{found[3]}"] = value
    return out


def sd3_transformer(state: State) -> State:
    """An SD3 transformer in the names of the MMDiT: q, k and v are one layer, and the last layers have shift
    before scale."""
    last = max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks."))
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    inside = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    joined = {"attn.to_{}": "x_block.attn.qkv", "attn.add_{}_proj": "context_block.attn.qkv"}
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    out: State = {}
    for i in range(last + 1):
        names |= {f"transformer_blocks.{i}.{k}": f"joint_blocks.{i}.{v}" for k, v in inside.items()}
        for parts, whole in joined.items():
            for kind in ("weight", "bias"):
                pieces = [state[f"transformer_blocks.{i}.{parts.format(p)}.{kind}"] for p in "qkv"]
                out[f"joint_blocks.{i}.{whole}.{kind}"] = torch.cat(pieces)
    for old, new in names.items():
        for kind in ("", ".weight", ".bias"):
            if old + kind in state:
                value = state[old + kind]
                out[new + kind] = torch.cat(value.chunk(2)[::-1]) if old in swapped else value.clone()
    return out

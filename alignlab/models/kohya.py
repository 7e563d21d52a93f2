"""The LoRA file of kohya's sd-scripts, which ComfyUI and other interfaces read: one .safetensors, layers
named as in the original implementations, each with its alpha.

Names: kohya-ss/sd-scripts, networks/lora.py (Stable Diffusion 1.x and 2.x keep diffusers' names, XL has those
of the LDM), lora_sd3.py, lora_flux.py. A layer that diffusers splits (q, k, v) is one there: its LoRA has the
ranks of its parts together, up is block-diagonal, and alpha grows with the rank, so that alpha/rank is that
of the parts (networks/convert_flux_lora.py does the same). Such files are read by lora_files.py.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor


class Layer(NamedTuple):
    """A layer of the original implementation."""

    name: str
    """Dotted, as there."""
    parts: tuple[str, ...]
    """The modules of diffusers whose outputs, one after the other, are its output."""


Naming = Callable[[str], Layer | None]
"""The layer that a module of diffusers is, or is part of; None if the format has no place for it."""


def same(module: str) -> Layer:
    """Stable Diffusion 1.x and 2.x."""
    return Layer(module, (module,))


def ldm(module: str, config: Any) -> Layer | None:
    """A UNet in the LDM's names (XL). `config` is diffusers' of the UNet."""
    deep, place = (
        config.layers_per_block + 1,
        re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", module),
    )
    if place is None:
        return Layer(_LDM[module], (module,)) if module in _LDM else None
    side, kind, inside = place[1], place[3], place[5]
    block, k = int(place[2] or 0), int(place[4])
    if side == "mid":
        at = f"middle_block.{2 * k if kind == 'resnets' else 1}"
    elif kind == "downsamplers":
        at, inside = f"input_blocks.{deep * (block + 1)}.0", "op"
    elif kind == "upsamplers":
        part = 2 if "CrossAttn" in config.up_block_types[block] else 1
        at = f"output_blocks.{deep * (block + 1) - 1}.{part}"
    else:
        number = (
            f"input_blocks.{deep * block + k + 1}" if side == "down" else f"output_blocks.{deep * block + k}"
        )
        at = f"{number}.{0 if kind == 'resnets' else 1}"
    return Layer(f"{at}.{_RESNET.get(inside, inside) if kind == 'resnets' else inside}", (module,))


_LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

Blocks = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By list of blocks in diffusers: the original layers, with the block's number as {}, and their parts inside
the block."""


def in_blocks(module: str, blocks: Blocks) -> Layer | None:
    """A transformer in the names of its table."""
    room, _, rest = module.partition(".")
    number, _, inside = rest.partition(".")
    for name, parts in blocks.get(room, {}).items():
        if inside in parts:
            return Layer(name.format(number), tuple(f"{room}.{number}.{part}" for part in parts))
    return None


SD3: Blocks = {
    "transformer_blocks": {
        "joint_blocks.{}.x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "joint_blocks.{}.x_block.attn.proj": ("attn.to_out.0",),
        "joint_blocks.{}.x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks.{}.x_block.attn2.proj": ("attn2.to_out.0",),
        "joint_blocks.{}.x_block.mlp.fc1": ("ff.net.0.proj",),
        "joint_blocks.{}.x_block.mlp.fc2": ("ff.net.2",),
        "joint_blocks.{}.context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "joint_blocks.{}.context_block.attn.proj": ("attn.to_add_out",),
        "joint_blocks.{}.context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "joint_blocks.{}.context_block.mlp.fc2": ("ff_context.net.2",),
    }
}
FLUX: Blocks = {
    "transformer_blocks": {
        "double_blocks.{}.img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.{}.img_attn.proj": ("attn.to_out.0",),
        "double_blocks.{}.img_mlp.0": ("ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("ff.net.2",),
        "double_blocks.{}.img_mod.lin": ("norm1.linear",),
        "double_blocks.{}.txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "double_blocks.{}.txt_attn.proj": ("attn.to_add_out",),
        "double_blocks.{}.txt_mlp.0": ("ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("ff_context.net.2",),
        "double_blocks.{}.txt_mod.lin": ("norm1_context.linear",),
    },
    "single_transformer_blocks": {
        "single_blocks.{}.linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.{}.linear2": ("proj_out",),
        "single_blocks.{}.modulation.lin": ("norm.linear",),
    },
}


def write(
    file: Path, lora: Mapping[str, Tensor], alpha: float, widths: Mapping[str, int], naming: Naming
) -> None:
    """One file, float32.

    Args:
        lora: MODULE.lora_A.weight [r, in, ...] and MODULE.lora_B.weight [out, r, ...] of every adapted module
            of the network.
        alpha: the update is alpha/r B A.
        widths: the outputs of every module of the network.

    Raises:
        ValueError: if the format has no place for a module.
    """
    layers: dict[str, tuple[str, ...]] = {}
    for module in dict.fromkeys(key.partition(".lora_")[0] for key in lora):
        layer = naming(module)
        if layer is None:
            raise ValueError(
                f"kohya's format has no place for a LoRA of {module}; use to=diffusers or to=pipeline"
            )
        layers[layer.name] = layer.parts
    out: dict[str, Tensor] = {}
    ranks = set()
    for name, parts in layers.items():
        a, b = ([lora.get(f"{part}.lora_{side}.weight") for part in parts] for side in "AB")
        like = next(tensor for tensor in a if tensor is not None)
        if len(parts) == 1:
            down, up = like, b[0]
        else:  # a part without LoRA is zero
            down = torch.cat([torch.zeros_like(like) if tensor is None else tensor for tensor in a])
            blocks = zip(parts, b, strict=True)
            up = torch.block_diag(
                *(like.new_zeros(widths[p], len(like)) if tensor is None else tensor for p, tensor in blocks)
            )
        assert up is not None
        key = f"lora_unet_{name.replace('.', '_')}"
        out |= {f"{key}.lora_down.weight": down.contiguous(), f"{key}.lora_up.weight": up.contiguous()}
        out[f"{key}.alpha"] = torch.tensor(float(alpha * len(parts)))
        ranks.add(len(like))
    about = {"format": "pt", "ss_network_dim": str(max(ranks)), "ss_network_alpha": str(alpha)}
    save_file({key: value.float().cpu() for key, value in out.items()}, file, metadata=about)

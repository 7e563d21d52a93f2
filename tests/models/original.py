"""Tiny pipelines as the single files that people share: diffusers' names mapped back to those of the original implementations."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


def sd3_transformer(state: State) -> State:
    """An SD3 transformer in the names of the MMDiT: q, k and v are one layer, and the last layers have shift before scale."""
    last = max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks."))
    names = {
        "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
    }  # fmt: skip
    inside = {
        "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj", "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    }  # fmt: skip
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

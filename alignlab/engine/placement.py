"""How a model family is made ready to be tuned: what is frozen and what is trained, where its weights lie, in
which layout, compiled or split over processes.

The three functions are called in this order, by `Policy`, before the first prediction.
"""

import copy
from typing import Any

import torch
from torch import nn

from alignlab.distributed import sharding
from alignlab.fast import freeze
from alignlab.models import Family
from alignlab.models.lora import LoRA, adapt


def place(family: Family, device: torch.device, *, full: bool, text_on_host: bool, sharded: bool) -> None:
    """Freezes every module and moves it to the device, but for what comes there later: text encoders that
    stay in host memory between new prompts, and a denoiser that is split block by block."""
    for module in (*family.frozen, family.denoiser):
        tuned = module is family.denoiser
        freeze(module, layers=not (full and tuned))  # the reference must round as the trained copy does
        waits = text_on_host and any(module is encoder for encoder in family.text_encoders)
        if not waits and not (sharded and tuned):
            module.to(device)


def make_trainable(
    family: Family, *, lora: LoRA | None, full: bool, dtype: torch.dtype
) -> tuple[nn.Module | None, Any]:
    """Makes every weight of the denoiser trainable, or adds LoRA adapters to it.

    Returns:
        The frozen copy that full fine-tuning is compared with, and peft's LoraConfig; one of them is None.
    """
    if full:
        reference = copy.deepcopy(family.denoiser)  # float32, as what is trained: else KL would start above 0
        family.denoiser.requires_grad_(True)
        return reference, None
    nn.Module.to(family.denoiser, dtype)  # diffusers' own `to` warns for no reason
    return None, adapt(family.denoiser, lora or LoRA(), family.lora_targets)


def lay_out(
    family: Family,
    networks: list[nn.Module],
    device: torch.device,
    *,
    channels_last: bool,
    compile: bool,
    sharded: bool,
) -> None:
    """Lays out, compiles and splits the networks (the denoiser, and its frozen copy if there is one)."""
    for module in networks:
        if channels_last:
            for part in (*family.frozen, module):
                nn.Module.to(part, memory_format=torch.channels_last)
        if compile:
            module.compile()
        if sharded:  # last: what is split has its final layout
            sharding.shard(module, device)

"""Guidance's two branches are one until the network first reads the prompt: what comes before is computed for
one and copied.

In U-Nets like Stable Diffusion 1.x's and 2.x's these are the first convolution, the residual blocks before
the first cross-attention and the self-attention beside it: 6 % of the arithmetic of a guided pass of the
embedded model, 2.6 % of Stable Diffusion 1.5's. SDXL's U-Net reads the prompt together with the timestep, so
that nothing is shared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SharedStart:
    """Hooks on the modules of these networks that run before the prompt is read; they act inside `shared`
    alone."""

    def __init__(self, *networks: nn.Module) -> None:
        self._rows, self._halved = 0, False
        for network in networks:
            for module in before_prompt(network):
                module.register_forward_pre_hook(self._first_half, with_kwargs=True)
                module.register_forward_hook(self._for_both)

    @contextmanager
    def shared(self, rows: int) -> Iterator[None]:
        """Inside, inputs of a network that have 2M = `rows` rows hold each latent and timestep twice: rows m
        and M + m differ in their prompt only. Inputs of any other number, as of a family that calls its
        network on a few rows at a time, are left whole."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def _first_half(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._halved = len(args[0]) == self._rows
        if not self._halved:
            return None
        return tuple(_half(value) for value in args), {key: _half(value) for key, value in kwargs.items()}

    def _for_both(self, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor | None:
        return torch.cat([out, out]) if self._halved else None


def _half(value: Any) -> Any:
    return value[: len(value) // 2] if isinstance(value, Tensor) else value


def before_prompt(network: Any) -> Iterator[nn.Module]:
    """The costly modules of a diffusers U-Net, in their order, that see latents and timesteps but no prompt;
    none of another network."""
    if type(network).__name__ != "UNet2DConditionModel":
        return
    if network.config.addition_embed_type or network.config.dual_cross_attention:
        return
    yield network.conv_in
    for block in network.down_blocks:
        if type(block).__name__ == "DownBlock2D":
            yield from (*block.resnets, *(block.downsamplers or ()))
            continue
        if type(block).__name__ == "CrossAttnDownBlock2D":
            beside = block.attentions[0].transformer_blocks[0]
            yield from (block.resnets[0], block.attentions[0].proj_in)
            yield from () if beside.only_cross_attention else (beside.attn1, beside.attn2.to_q)
        return

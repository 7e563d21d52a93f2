"""AdamW with its state in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), from bitsandbytes."""

from collections.abc import Iterable, Sequence

import torch


def adamw8bit(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    betas: Sequence[float],
    weight_decay: float,
    eps: float,
) -> torch.optim.Optimizer:
    """The optimiser of conf/optimizer/adamw8bit.yaml. Tensors below 4,096 numbers keep a 32-bit state, as
    bitsandbytes does."""
    from bitsandbytes.optim import AdamW8bit  # an extra: alignlab[bnb]

    optimizer: torch.optim.Optimizer = AdamW8bit(
        params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps
    )
    return optimizer

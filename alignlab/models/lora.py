"""Low-rank adapters on a denoiser (Hu et al. 2021, arXiv 2106.09685), through peft."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """W + (alpha/rank) B A, B = 0 at the start."""

    rank: int = 8
    """Rows of A: how many directions each adapted layer can learn. [directions]"""
    alpha: float = 8
    """The adapters are scaled by alpha / rank. [directions]"""
    targets: tuple[str, ...] | None = None
    """Module name endings; None takes the family's attention projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(
                f"policy.lora.rank={self.rank} must be at least 1; for no LoRA set policy.full=true"
            )
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(
                f"policy.lora.alpha={self.alpha} must be a number other than 0, which the LoRA is scaled by "
                "over its rank"
            )


def adapt(denoiser: nn.Module, lora: LoRA, targets: Sequence[str]) -> Any:
    """Adds float32 adapters to a frozen diffusers model, the only weights that train; returns peft's
    LoraConfig."""
    from peft import LoraConfig  # slow to import: the check of a configuration does without

    from alignlab.fast import as_one_product

    alpha: Any = lora.alpha  # peft says int, and takes any number
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=list(lora.targets or targets),
        init_lora_weights="gaussian",
    )
    model: Any = denoiser
    model.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    as_one_product(adapters(denoiser))
    return config


def adapters(denoiser: nn.Module) -> list[Any]:
    """The adapted layers; none for a model without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def switch(layers: Sequence[Any], *, off: bool) -> None:
    """Leaves the adapters out, or not. peft's own disable_adapters() would also flip requires_grad of the
    trained weights."""
    for layer in layers:
        layer._disable_adapters = off


def lora_state(denoiser: nn.Module) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    return {
        key: value.contiguous() for key, value in get_peft_model_state_dict(denoiser).items()
    }  # not so in channels_last


def load_lora_state(denoiser: nn.Module, state: dict[str, Tensor]) -> None:
    from peft.utils import set_peft_model_state_dict

    set_peft_model_state_dict(denoiser, state)

"""Your own function of images and prompts as a reward: `+reward.mine.function=my_module.score`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Function:
    """f(images [B, 3, H, W] float32 in [0, 1], prompts) -> a tensor, list or array of B numbers, larger is better.

    Args:
        function: its dotted name, in a module that `allow_targets` allows.
        differentiable: whether gradients reach the images; nothing but torch in between. A run that needs them and gets none stops.
        unit: what the numbers count.
        needs_prompt, typical_range, input_size, licence, groupwise: as in alignlab/rewards/__init__.py.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        differentiable: bool,
        unit: str,
        needs_prompt: bool = True,
        typical_range: list[float] | None = None,
        input_size: int | None = None,
        licence: str = "unstated",
        groupwise: bool = False,
    ) -> None:
        self.function, self.differentiable, self.unit, self.needs_prompt = function, differentiable, unit, needs_prompt
        self.typical_range, self.input_size, self.licence, self.groupwise = typical_range, input_size, licence, groupwise

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = self.function(images, list(prompts))
        if isinstance(values, Tensor):
            return values
        if isinstance(values, (list, tuple)) and any(isinstance(v, Tensor) for v in values):
            return torch.stack([torch.as_tensor(v, device=images.device) for v in values])
        try:
            return torch.as_tensor(values, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError):
            return values  # no numbers: compose.py says what it is

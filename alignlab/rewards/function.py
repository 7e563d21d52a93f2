"""Your own function of images and prompts as a reward: `+reward.mine.function=my_module.score`."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Function:
    """f(images [B, 3, H, W] float32 in [0, 1], prompts) -> B numbers as a tensor, list or array, larger is
    better; or (numbers, metadata).

    Args:
        function: its dotted name, in a module that `allow_targets` allows.
        differentiable: whether gradients reach the images; nothing but torch in between. A run that needs
            them and gets none stops.
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
        _takes_two(function)
        self.function, self.differentiable, self.unit, self.needs_prompt = (
            function,
            differentiable,
            unit,
            needs_prompt,
        )
        self.typical_range, self.input_size, self.licence, self.groupwise = (
            typical_range,
            input_size,
            licence,
            groupwise,
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        return self.function(images, list(prompts))  # answers.py reads what comes


def _takes_two(function: Callable[..., Any]) -> None:
    """Raises a ValueError for a function that cannot be called with images and prompts alone, as the scorers
    of TRL cannot."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin, which has none
        return
    try:
        signature.bind([], [])
    except TypeError as error:
        name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        raise ValueError(
            f"function={name} takes {signature} and cannot be called as function(images, prompts): {error}; "
            "write a function of these two that calls it"
        ) from None

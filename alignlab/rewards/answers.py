"""What a reward of the user's own is given, and what it may return.

It may return a tensor, a list or an array of B numbers, alone or as (values, metadata): the scorers of TRL
and ddpo-pytorch do that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.rewards.function import Function

REAL = "biuf"
"""numpy's letters for the kinds of real numbers: bool, int, unsigned int, float."""


class NoNumbers(TypeError):
    """A reward returned something else than real numbers; says what, in a few words."""


def is_own(reward: Any) -> bool:
    """Whether a reward is alignlab's, which changes nothing that it is given."""
    return type(reward).__module__.startswith("alignlab.rewards.") and not isinstance(reward, Function)


def given(reward: Any, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Sequence[str]]:
    """The images and prompts that a reward is called with: a copy of its own, unless it is alignlab's.

    A change in place would else be seen by all that come after it, and a copy costs little: the bytes of the
    images, for as long as the reward needs them. Gradients pass through it. A reward that is not
    differentiable gets images without a graph.
    """
    if is_own(reward):
        return images, prompts
    seen = images if reward.differentiable else images.detach()
    return seen.clone(), prompts if isinstance(prompts, tuple) else list(prompts)


def numbers(values: Any) -> Tensor:
    """A reward's answer as a tensor of real numbers, of whatever shape.

    Raises:
        NoNumbers: if it is none.
    """
    if _has_metadata(values):
        values = values[0]
    kind = type(values).__name__
    try:
        if isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values):
            device = next(value.device for value in values if isinstance(value, Tensor))
            scores = torch.stack([torch.as_tensor(value, device=device) for value in values])
        elif isinstance(values, Tensor):
            scores = values.to_dense() if values.layout is not torch.strided else values
        else:
            scores = torch.from_numpy(_array(values))
    except NoNumbers:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise NoNumbers(
            f"a {kind} that is no row of numbers ({' '.join(str(error).split())[:200]})"
        ) from None
    if scores.is_complex():
        raise NoNumbers("complex numbers, which have no order")
    return scores


def _has_metadata(values: Any) -> bool:
    """Whether it is (values, metadata): a row of values, and a dictionary, a row of dictionaries, or None."""
    if not (isinstance(values, tuple) and len(values) == 2):
        return False
    first, second = values
    is_row = first.dim() > 0 if isinstance(first, Tensor) else isinstance(first, list | tuple | np.ndarray)
    rows = isinstance(second, list | tuple) and all(isinstance(item, Mapping) for item in second)
    return is_row and (second is None or isinstance(second, Mapping) or rows)


def _array(values: Any) -> Any:
    """float64 from a list, an array, or what numpy makes one of."""
    kind = type(values).__name__
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(np.float64), np.nan)
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise NoNumbers("complex numbers, which have no order")
    if array.dtype.kind in REAL:
        return np.array(array, dtype=np.float64)
    odd = next(
        (
            type(item).__name__.rstrip("_")
            for item in array.flat
            if not isinstance(item, int | float | np.number)
        ),
        "",
    )
    raise NoNumbers(f"{kind} that holds {odd}" if array.ndim and odd else kind)

"""Mean brightness: the simplest differentiable reward."""

from collections.abc import Sequence

from torch import Tensor


class Brightness:
    """The mean pixel value, in [0, 1]. Differentiable."""

    differentiable = True
    unit = "mean pixel value"
    needs_prompt = False
    typical_range = (0.0, 1.0)
    input_size = None
    licence = "none needed"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.float().mean((1, 2, 3))

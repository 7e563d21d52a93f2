"""How unlike the other images of its prompt an image is: a reward of a whole group, against collapse onto one
picture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignlab.rewards.clip import Clip, locate, to_fetch


class ClipDiversity:
    """r_i = 1/(n - 1) sum_{j != i} (1 - cos(e_i, e_j)) over the n images of one prompt, e a CLIP's image
    embeddings. Differentiable, through the others too: the gradient of the group's mean pushes every pair
    apart. Not the distance by which results are measured (metrics/diversity.py), which so stays held out.

    Args:
        path: of a `Clip`.
    """

    differentiable = True
    needs_prompt = False
    groupwise = True
    unit = "1 - cosine"
    typical_range = (0.0, 1.0)
    input_size: int | None = None  # its CLIP's
    licence = "that of its weights"

    @staticmethod
    def check(path: str, **_: Any) -> None:
        locate(path)

    @staticmethod
    def missing(path: str, **_: Any) -> list[str]:
        return to_fetch(path)

    def __init__(self, path: str) -> None:
        self.clip = Clip(path)
        self.input_size = self.clip.size[0]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[n] from the n >= 2 images of one prompt."""
        embeddings = self.clip.images(images)
        apart = 1 - embeddings @ embeddings.T
        return (apart.sum(1) - apart.diagonal()) / (len(images) - 1)

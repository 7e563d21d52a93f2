"""An aesthetic rating in the form of LAION's predictor: a small head on the image embedding of a CLIP
(Schuhmann et al. 2022)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignlab.rewards.heads import folder_of, load, mlp_of, to_fetch


class Aesthetic:
    """A rating, 1 to 10 on the images that the head was trained on; unbounded beyond them. Differentiable.
    Looks at no prompt.

    Args:
        path: a folder that `python -m alignlab.train_reward kind=aesthetic` wrote, or the name of one shipped
            ("emoji_aesthetic").

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is of another kind.
    """

    differentiable = True
    unit = "rating of 10"
    needs_prompt = False
    typical_range = (1.0, 10.0)
    input_size: int | None = None  # its CLIP's
    licence = "that of its weights"

    @staticmethod
    def check(path: str, **_: Any) -> None:
        folder_of(path, "aesthetic")

    @staticmethod
    def missing(path: str, **_: Any) -> list[str]:
        return to_fetch(folder_of(path, "aesthetic"))

    def __init__(self, path: str) -> None:
        self.clip, state, about = load(folder_of(path, "aesthetic"))
        self.input_size = self.clip.size[0]
        if not isinstance(about.get("relu"), bool) and len(state) > 2:  # a layer has a weight and a bias
            raise ValueError(
                f"path={path}: reward.json does not say whether ReLU stands between the layers; write "
                '"relu": true or false'
            )
        self.head = mlp_of(state, relu=bool(about.get("relu"))).eval().requires_grad_(False)
        if self.head.layers[0].in_features != self.clip.width:
            raise ValueError(
                f"path={path}: its head does not fit {about['clip']}, whose embeddings have "
                f"{self.clip.width} numbers"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head.to(images.device)(self.clip.images(images))

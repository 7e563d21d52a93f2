"""Which of two images of a prompt people would choose, in PickScore's form (Kirstain et al. 2023, arXiv
2305.01569, section 3)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignlab.rewards.heads import Agreement, fill, folder_of, load, to_fetch


class Preference:
    """exp(logit_scale) times the cosine of image and prompt. The difference of two images' scores is the
    log-odds that the first is chosen (Bradley-Terry). Differentiable.

    Args:
        path: a folder that `python -m alignlab.train_reward kind=preference` wrote, or the name of one
            shipped ("emoji_preference").

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is of another kind.
    """

    differentiable = True
    unit = "log-odds"
    needs_prompt = True
    typical_range = (-100.0, 100.0)
    input_size: int | None = None  # its CLIP's
    licence = "that of its weights"

    @staticmethod
    def check(path: str, **_: Any) -> None:
        folder_of(path, "preference")

    @staticmethod
    def missing(path: str, **_: Any) -> list[str]:
        return to_fetch(folder_of(path, "preference"))

    def __init__(self, path: str) -> None:
        folder = folder_of(path, "preference")
        self.clip, state, _ = load(folder)
        self.input_size = self.clip.size[0]
        self.head = Agreement(self.clip.width)
        fill(self.head, state, folder)
        self.typical_range = (-float(self.head.logit_scale.exp()), float(self.head.logit_scale.exp()))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head.to(images.device)(self.clip.images(images), self.clip.texts(prompts, images.device))

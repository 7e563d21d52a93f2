"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): a CLIP tuned on people's
rankings."""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from alignlab.rewards.clip import Clip
from alignlab.rewards.preprocessing import Preprocessing
from alignlab.rewards.weights import fetched, look, to_fetch


class FloatPreprocessing(Preprocessing):
    """What hpsv2's own transform does: it turns a picture into a float tensor first, and resizes that.

    So bicubic interpolation overshoots at edges, and nothing brings it back to [0, 1]. The longer side fits,
    the rest is padded.
    """

    def resized(self, images: Tensor) -> Tensor:
        scale = self.size[0] / max(images.shape[-2:])
        new = tuple(round(side * scale) for side in images.shape[-2:])
        if images.shape[-2:] == new:
            return images
        return F.interpolate(images, new, mode=self.interpolation, antialias=True)


class HPSv2:
    """The cosine of image and prompt, as published; 0.2 to 0.3 as a rule. v2 and v2.1 do not compare, nor do
    prompts with each other. Images that are not square are padded with black, not cut. Differentiable.

    Args:
        path: the published file, a folder with it, or a repository of the Hugging Face hub.
        file: its name there; HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
        architecture: what it is the state dict of, by open_clip's name.
        revision: a commit of the hub's repository; null takes the newest.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is of another architecture.
    """

    differentiable = True
    needs_prompt = True
    unit = "cosine"
    typical_range = (0.1, 0.4)
    input_size = 224
    licence = "Apache-2.0"

    @staticmethod
    def check(path: str, *, file: str, architecture: str = "ViT-H-14", revision: str | None = None) -> None:
        look(path, file, revision=revision)

    @staticmethod
    def missing(path: str, *, file: str, revision: str | None = None, **_: Any) -> list[str]:
        return to_fetch(path, file, revision=revision)

    def __init__(
        self, path: str, *, file: str, architecture: str = "ViT-H-14", revision: str | None = None
    ) -> None:
        weights = fetched(path, file, revision)
        try:
            self.clip = Clip(architecture, weights=weights)
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, UnpicklingError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(
                f"path={path}: {weights.name} is no state dict of open_clip's {architecture} ({why})"
            ) from None
        self.input_size = self.clip.size[0]
        self.clip.preprocess = FloatPreprocessing(
            size=self.clip.size, mean=self.clip.preprocess.mean, std=self.clip.preprocess.std
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.clip.images(images) * self.clip.texts(prompts, images.device)).sum(-1)

"""LAION's aesthetic predictors, in the files they were published in: a head on the image embedding of
OpenAI's ViT-L/14.

    v2   sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor:
         768-1024-128-64-16-1 without activations
    v1   sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor: 768-1

Both are affine maps, so the score of an image is not bounded by the ratings that they were fitted to. The
same authors published ava+logos-l14-reluMSE.pth too, which has ReLU between its layers. A file holds weights
alone, so nothing in it says that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from alignlab.rewards.clip import Clip, locate
from alignlab.rewards.clip import to_fetch as clip_to_fetch
from alignlab.rewards.heads import AFFINE, Mlp, layer_numbers, mlp_of
from alignlab.rewards.weights import at_hand, fetched, look, on_hub, tensors, to_fetch


class LaionAesthetic:
    """A rating, nominally 1 to 10; Stable Diffusion 1.5 is rated a little above 5. Differentiable. Looks at
    no prompt.

    Args:
        path: the published file, a folder with it, or a repository of the Hugging Face hub.
        file: its name in the folder or repository.
        clip: what it stands on, as `rewards.clip.Clip` finds it.
        relu: whether ReLU stands between the layers. None: there is none, for a file that numbers its layers
            as the published ones without ReLU do; any other file is refused.
        interpolation: of the resize to the CLIP's size. Published is bicubic; AlignProp's own code has
            bilinear.
        revision: a commit of the hub's repository; null takes the newest.

    Raises:
        FileNotFoundError, ValueError: if there is none, it is no head for this CLIP, or `relu` has to be
            said.
    """

    differentiable = True
    needs_prompt = False
    unit = "rating of 10"
    typical_range = (1.0, 10.0)
    input_size = 224
    licence = "Apache-2.0"

    @staticmethod
    def check(
        path: str,
        *,
        file: str,
        clip: str = "ViT-L-14/openai",
        relu: bool | None = None,
        interpolation: str = "bicubic",
        revision: str | None = None,
    ) -> None:
        look(path, file, revision=revision)
        here = None if on_hub(path) else at_hand(path, file)
        if here is not None:
            _head(path, here, relu)
        locate(clip, key="clip")

    @staticmethod
    def missing(
        path: str, *, file: str, clip: str = "ViT-L-14/openai", revision: str | None = None, **_: object
    ) -> list[str]:
        return [*to_fetch(path, file, revision=revision), *clip_to_fetch(clip)]

    def __init__(
        self,
        path: str,
        *,
        file: str,
        clip: str = "ViT-L-14/openai",
        relu: bool | None = None,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        revision: str | None = None,
    ) -> None:
        weights = fetched(path, file, revision)
        self.head = _head(path, weights, relu).eval().requires_grad_(False)
        self.clip = Clip(clip, interpolation=interpolation, key="clip")
        self.input_size = self.clip.size[0]
        width = self.head.layers[0].in_features
        if width != self.clip.width:
            raise ValueError(
                f"path={path}: {weights.name} rates embeddings of length {width}, and those of clip={clip} "
                f"have {self.clip.width}"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head.to(images.device)(self.clip.images(images))


class LaionAestheticV1(LaionAesthetic):
    """The first version, a single linear layer."""

    licence = "MIT"


def _head(path: str, file: Path, relu: bool | None) -> Mlp:
    """The head in a file.

    Raises:
        ValueError: if it holds none, or if `relu` is None and it may have ReLU.
    """
    try:
        state = tensors(file)
        head = mlp_of(state, relu=bool(relu))
    except ValueError as error:
        raise ValueError(f"path={path}: {error}") from None
    numbers = layer_numbers(state)
    silent = numbers != AFFINE or "relu" in file.name.lower()
    if relu is None and silent and len(numbers) > 1:
        raise ValueError(
            f"path={path}: {file.name} does not say whether ReLU stands between its layers (their numbers "
            f"are {', '.join(map(str, numbers))}; those of LAION's v2, which has none, are "
            f"{', '.join(map(str, AFFINE))}); set relu=true, as LAION's reluMSE file needs it, or relu=false"
        )
    return head

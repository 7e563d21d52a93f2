"""LAION's aesthetic predictors, in the files they were published in: a head on the image embedding of OpenAI's ViT-L/14.

    v2   sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor: 768-1024-128-64-16-1 without activations
    v1   sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor: 768-1

Both are affine maps, so the score of an image is not bounded by the ratings that they were fitted to.
"""

from collections.abc import Sequence

from torch import Tensor

from alignlab.rewards.clip import Clip, locate
from alignlab.rewards.clip import to_fetch as clip_to_fetch
from alignlab.rewards.heads import mlp_of
from alignlab.rewards.weights import fetched, look, tensors, to_fetch


class LaionAesthetic:
    """A rating, nominally 1 to 10; Stable Diffusion 1.5 is rated a little above 5. Differentiable. Looks at no prompt.

    Args:
        path: the published file, a folder with it, or a repository of the Hugging Face hub.
        file: its name in the folder or repository.
        clip: what it stands on, as `rewards.clip.Clip` finds it.
        revision: a commit of the hub's repository; null takes the newest.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is no head for this CLIP.
    """

    differentiable = True
    needs_prompt = False
    unit = "rating of 10"
    typical_range = (1.0, 10.0)
    input_size = 224
    licence = "Apache-2.0"

    @staticmethod
    def check(path: str, *, file: str, clip: str = "ViT-L-14/openai", revision: str | None = None) -> None:
        look(path, file, revision=revision)
        locate(clip, key="clip")

    @staticmethod
    def missing(path: str, *, file: str, clip: str = "ViT-L-14/openai", revision: str | None = None) -> list[str]:
        return [*to_fetch(path, file, revision=revision), *clip_to_fetch(clip)]

    def __init__(self, path: str, *, file: str, clip: str = "ViT-L-14/openai", revision: str | None = None) -> None:
        found = fetched(path, file, revision)
        try:
            self.head = mlp_of(tensors(found), relu=False).eval().requires_grad_(False)
        except ValueError as error:
            raise ValueError(f"path={path}: {error}") from None
        self.clip = Clip(clip, key="clip")
        self.input_size = self.clip.size[0]
        width = self.head.layers[0].in_features
        if width != self.clip.width:
            raise ValueError(
                f"path={path}: {found.name} rates embeddings of length {width}, and those of clip={clip} have {self.clip.width}"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head.to(images.device)(self.clip.images(images))


class LaionAestheticV1(LaionAesthetic):
    """The first version, a single linear layer."""

    licence = "MIT"

"""Size as JPEG: DDPO's compressibility and incompressibility (arXiv 2305.13301, section 5.1)."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def check(sign: int, quality: int) -> None:
    """The arguments of the size and of its estimate (jpeg_differentiable.py).

    Raises:
        ValueError: for a sign or a quality that there is not.
    """
    if sign not in (-1, 1) or not 1 <= quality <= 95:
        raise ValueError(f"sign={sign} must be -1 or 1, and quality={quality} within 1..95")


class JpegSize:
    """sign times the file size in kB (1000 bytes). Not differentiable; typically 1 to 3 kB at 48 px, 50 to
    150 kB at 512 px.

    Args:
        sign: -1 rewards small files (compressibility), 1 large ones. [-1 or 1]
        quality: of the encoder, 1..95. [JPEG quality]
    """

    differentiable = False
    unit = "kB"
    needs_prompt = False
    typical_range = (-150.0, 150.0)
    input_size = None
    licence = "none needed"

    def __init__(self, sign: int = -1, quality: int = 95) -> None:
        check(sign, quality)
        self.sign, self.quality = sign, quality

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        sizes = []
        for picture in pixels:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="JPEG", quality=self.quality)
            sizes.append(self.sign * buffer.tell() / 1000)
        return torch.tensor(sizes, device=images.device)

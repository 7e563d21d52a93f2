"""Images and prompts as bytes, for a reward on another machine. Never pickle.

    png           JSON {"images": [base64, ...], "prompts": [...]}: 8 bits a channel, so scores are those of the rounded images
    safetensors   "images" float32 [B, 3, H, W], exact, and "prompts" uint8: a JSON list in UTF-8

The answer is JSON in both: {"reward": name, "digest": text, "scores": [B numbers]}, whose decimals give the same float32 back.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

TYPES = {"png": "application/json", "safetensors": "application/x-safetensors"}
"""The forms of a request, and their content types."""
PICTURES = ("PNG", "JPEG", "WEBP")
"""What PIL is allowed to decode. Its other decoders see no stranger's bytes."""
EIGHT_BITS = ("L", "P", "RGB", "RGBA")


class WireError(ValueError):
    """Bytes that are no images with prompts; one sentence."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    megabytes: float = 64
    """Of the body, in units of 2^20 bytes."""
    megapixels: float = 64
    """Of all its images together, decoded, in units of 2^20 pixels: 64 images of 1024 px."""


def pack(images: Tensor, prompts: Sequence[str], form: str) -> bytes:
    """The body of a request: images [B, 3, H, W] in [0, 1] on the CPU, and their prompts."""
    if form == "safetensors":
        from safetensors.torch import save

        text = torch.frombuffer(bytearray(json.dumps(list(prompts)).encode()), dtype=torch.uint8)
        return bytes(save({"images": images.float().contiguous(), "prompts": text}))
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return json.dumps({"images": [_png(picture) for picture in pixels], "prompts": list(prompts)}).encode()


def unpack(body: bytes, content_type: str, limits: Limits) -> tuple[Tensor, list[str]]:
    """Images [B, 3, H, W] float32 in [0, 1] and prompts of a stranger's request.

    Raises:
        WireError: if it is neither form, or decodes to more than the limits.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == TYPES["safetensors"]:
        images, prompts = _from_safetensors(body, limits)
    elif kind == TYPES["png"]:
        images, prompts = _from_json(body, limits)
    else:
        raise WireError(f"Content-Type {kind!r} is not one of {', '.join(TYPES.values())}")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError("prompts must be a list of texts")
    if not 0 < len(images) == len(prompts):
        raise WireError(
            f"{len(images)} images came with {len(prompts)} prompts; send one prompt for each image, and at least one"
        )
    return images, prompts


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _from_json(body: bytes, limits: Limits) -> tuple[Tensor, Any]:
    try:
        message = json.loads(body)
        coded, prompts = message["images"], message["prompts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WireError('the body is no JSON object with "images" and "prompts"') from None
    if not isinstance(coded, list) or not coded or not all(isinstance(item, str) for item in coded):
        raise WireError("images must be a list of base64 texts, at least one")
    pictures: list[Image.Image] = []
    pixels = 0
    for number, item in enumerate(coded):
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(item, validate=True)), formats=PICTURES)  # reads the header only
        except Exception:  # of as many kinds as there are decoders
            raise WireError(f"image {number} is no base64 of a {', '.join(PICTURES)} file") from None
        pixels += picture.width * picture.height
        _check_pixels(pixels, limits)
        if picture.mode not in EIGHT_BITS:
            raise WireError(f"image {number} is of mode {picture.mode}; send 8-bit RGB")
        if pictures and picture.size != pictures[0].size:
            raise WireError(f"image {number} is {picture.size}, image 0 {pictures[0].size}; send images of one size together")
        pictures.append(picture)
    return torch.stack([_decoded(number, picture) for number, picture in enumerate(pictures)]), prompts


def _decoded(number: int, picture: Image.Image) -> Tensor:
    try:
        pixels = bytearray(picture.convert("RGB").tobytes())
    except Exception:
        raise WireError(f"image {number} is damaged") from None
    flat = torch.frombuffer(pixels, dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255


def _from_safetensors(body: bytes, limits: Limits) -> tuple[Tensor, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        images, text = tensors["images"], tensors["prompts"]
        prompts = json.loads(text.numpy().tobytes() if text.dtype == torch.uint8 else b"")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise WireError('the body is no safetensors file with "images" and "prompts" (uint8, a JSON list)') from None
    if images.dtype != torch.float32 or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise WireError(f"images are {images.dtype} {tuple(images.shape)}; send float32 [B, 3, H, W]")
    _check_pixels(images.numel() // 3, limits)
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise WireError("images hold values outside [0, 1]")
    return images, prompts


def _check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.megapixels * 2**20:
        raise WireError(f"the images hold more than {limits.megapixels:g} megapixels together; send fewer at once (batch_size)")

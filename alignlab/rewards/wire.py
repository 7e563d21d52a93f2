"""Images and prompts as bytes, for a reward on another machine. Never pickle.

    png           JSON {"images": [base64, ...], "prompts": [...]}: 8 bits a channel, so scores
                  are those of the rounded images
    safetensors   "images" float32 [B, 3, H, W], exact, and "prompts" uint8: a JSON list in UTF-8

The answer is JSON in both: {"reward": name, "digest": text, "scores": [B numbers]}, whose decimals give the
same float32 back.
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
LONGEST = 8192
"""Letters of a prompt. No model reads as many, and some tokenizers need time that grows with the square of a
word's length."""
NARROWEST = 32
"""How many times longer than the other one side of an image may be: where a reward resizes the short side,
the long one grows too."""
EIGHT_BITS = ("L", "P", "RGB", "RGBA")


class WireError(ValueError):
    """Bytes that are no images with prompts; one sentence."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    megabytes: float = 64
    """Of the body, in units of 2^20 bytes."""
    megapixels: float = 64
    """Of all its images together, in units of 2^20 pixels: 64 images of 1024 px. They count as they are sent,
    or as the reward resizes them where that is more."""
    images: int = 64
    """However small they are."""


def pack(images: Tensor, prompts: Sequence[str], form: str) -> bytes:
    """The body of a request: images [B, 3, H, W] in [0, 1] on the CPU, and their prompts."""
    if form == "safetensors":
        from safetensors.torch import save

        text = torch.frombuffer(bytearray(json.dumps(list(prompts)).encode()), dtype=torch.uint8)
        return bytes(save({"images": images.float().contiguous(), "prompts": text}))
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return json.dumps({"images": [_png(picture) for picture in pixels], "prompts": list(prompts)}).encode()


def unpack(
    body: bytes, content_type: str, limits: Limits, side: int | None = None
) -> tuple[Tensor, list[str]]:
    """Images [B, 3, H, W] float32 in [0, 1] and prompts of a stranger's request.

    Args:
        side: pixels of the square to which the reward resizes an image; None if it does not.

    Raises:
        WireError: if it is neither form, or decodes to more than the limits.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == TYPES["safetensors"]:
        return _from_safetensors(body, limits, side)
    if kind == TYPES["png"]:
        return _from_json(body, limits, side)
    raise WireError(f"Content-Type {kind[:80]!r} is not one of {', '.join(TYPES.values())}")


def strict_json(text: bytes) -> Any:
    """JSON in UTF-8, each key once, without the NaN and Infinity that Python would take.

    Raises:
        ValueError, RecursionError: for anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len({*keys}) < len(keys):
            raise WireError("a key stands twice in a JSON object; send each key once")
        return dict(pairs)

    def none(name: str) -> Any:
        raise WireError(f"{name} is no JSON; send finite numbers")

    return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=none)


def _check_number(images: int, prompts: Any, limits: Limits) -> list[str]:
    """The prompts, if they are texts, one for each image, and not too many."""
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError("prompts must be a list of texts")
    if not 0 < images == len(prompts):
        raise WireError(
            f"{images} images came with {len(prompts)} prompts; send one prompt for each image, and at least "
            "one"
        )
    if images > limits.images:
        raise WireError(
            f"{images} images are more than the {limits.images} that are taken; send fewer at once "
            "(batch_size)"
        )
    for number, prompt in enumerate(prompts):
        if len(prompt) > LONGEST:
            raise WireError(f"prompt {number} has {len(prompt)} letters; {LONGEST} are taken")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise WireError(f"prompt {number} holds half of a pair of surrogates, which is no text")
    return prompts


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _from_json(body: bytes, limits: Limits, side: int | None) -> tuple[Tensor, list[str]]:
    try:
        message = strict_json(body)
        coded, prompts = message["images"], message["prompts"]
    except WireError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WireError('the body is no JSON object with "images" and "prompts"') from None
    if not isinstance(coded, list) or not coded or not all(isinstance(item, str) for item in coded):
        raise WireError("images must be a list of base64 texts, at least one")
    prompts = _check_number(len(coded), prompts, limits)
    pictures: list[Image.Image] = []
    for number, item in enumerate(coded):
        try:
            picture = Image.open(
                io.BytesIO(base64.b64decode(item, validate=True)), formats=PICTURES
            )  # reads the header only
        except Exception:  # of as many kinds as there are decoders
            raise WireError(f"image {number} is no base64 of a {', '.join(PICTURES)} file") from None
        _check_pixels(len(pictures) + 1, picture.size, limits, side)
        if picture.mode not in EIGHT_BITS:
            raise WireError(f"image {number} is of mode {picture.mode}; send 8-bit RGB")
        if pictures and picture.size != pictures[0].size:
            raise WireError(
                f"image {number} is {picture.size}, image 0 {pictures[0].size}; send images of one size "
                "together"
            )
        pictures.append(picture)
    _check_pixels(len(pictures), pictures[0].size, limits, side)
    return torch.stack([_decoded(number, picture) for number, picture in enumerate(pictures)]).float().div_(
        255
    ), prompts


def _decoded(number: int, picture: Image.Image) -> Tensor:
    """[3, H, W] uint8."""
    try:
        pixels = bytearray(picture.convert("RGB").tobytes())
    except Exception:
        raise WireError(f"image {number} is damaged") from None
    flat = torch.frombuffer(pixels, dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1)


def _from_safetensors(body: bytes, limits: Limits, side: int | None) -> tuple[Tensor, list[str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        images, text = tensors["images"], tensors["prompts"]
        prompts = strict_json(text.numpy().tobytes() if text.dtype == torch.uint8 else b"")
    except WireError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise WireError(
            'the body is no safetensors file with "images" and "prompts" (uint8, a JSON list)'
        ) from None
    if images.dtype != torch.float32 or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise WireError(f"images are {images.dtype} {tuple(images.shape)}; send float32 [B, 3, H, W]")
    prompts = _check_number(len(images), prompts, limits)
    _check_pixels(len(images), (images.shape[3], images.shape[2]), limits, side)
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise WireError("images hold values outside [0, 1]")
    return images, prompts


def _check_pixels(images: int, size: tuple[int, int], limits: Limits, side: int | None) -> None:
    """Bounds what `images` images of one size cost: as they are, and as the reward resizes them."""
    short, long = sorted(size)
    if long > NARROWEST * short:
        raise WireError(
            f"an image of {size[0]} x {size[1]} pixels is too narrow; no side may be {NARROWEST} times the "
            "other"
        )
    resized = (side or 0) ** 2 * long / short
    if images * max(short * long, resized) > limits.megapixels * 2**20:
        what = f"the images hold more than {limits.megapixels:g} megapixels together"
        why = f" once the reward has resized them to {side} px" if resized > short * long else ""
        raise WireError(f"{what}{why}; send fewer at once (batch_size)")

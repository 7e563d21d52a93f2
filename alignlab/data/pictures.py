"""Reads a picture's file as a viewer shows it. Every picture that is somebody's data goes through here.

    turned      upright, by the orientation that EXIF gives (JPEG, PNG, WEBP, TIFF)
    transparent on a background, which is white unless another colour is asked for
    16 bits     the upper 8 of them (PNG, TIFF, PGM)
    other numbers (signed, 32 bits, float) are refused, since nothing says which one is white
    CMYK        to RGB; JPEGs hold it inverted, as browsers and Pillow take it
    profiles    an embedded ICC profile is applied, unless it is sRGB or cannot be used
    several     the first picture of an animation or of a file with pages

An opaque RGB picture with 8 bits, no orientation and no profile comes out as its stored pixels, bit for bit.
"""

import io
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Of image files. Pillow knows more, and starts another program for some (EPS)."""
PIXELS = 2**26
"""Of one picture, at most: 8192 x 8192. A file of kilobytes can unpack to gigabytes."""
DECODED = 2**28
"""Pixels of one data set that are decoded before a run. Of further pictures the files' ends are looked at."""
SECONDS = 60.0
"""How long the pictures of one data set are looked at before a run."""
END = 2**16
"""Bytes at either end of a file that are looked at. Cameras append things after the end marker."""
THREADS = 8
EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LA", "PA", "RGBA", "La", "RGBa")


@dataclass(frozen=True)
class Span:
    """A picture's file within a larger one."""

    file: Path
    name: str
    """Of the picture in there."""
    offset: int
    size: int

    def read(self) -> bytes:
        """The picture's file.

        Raises:
            ValueError: if the larger file ends before it does, or is gone.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.file} cannot be read ({error.strerror}); mend or remove it") from None
        if len(content) < self.size:
            raise ValueError(f"{self.file} ends within {self.name}; copy it again, or remove it")
        return content


Source = Path | bytes | Span
"""Where a picture's bytes are."""


def decoded(source: Source, background: str | None = None) -> Image.Image:
    """The picture as a viewer shows it: RGB, 8 bits, upright, without transparency.

    Args:
        background: the colour behind what is transparent, by its name or as #rrggbb; None is white.

    Raises:
        ValueError, OSError, SyntaxError: if it is no picture of FORMATS, is broken, has more than PIXELS, or
            holds numbers of which nothing says what is white. Pillow's readers may raise others.
    """
    if source == b"" or (isinstance(source, Path) and not source.stat().st_size):
        raise ValueError("the file is empty")
    with _opened(source.read() if isinstance(source, Span) else source) as picture:
        bounded(picture.size)
        depth, inverted = _depth(picture), _white_is_zero(picture)
        picture.load()
        if picture.format != "TIFF":  # Pillow has turned those, and some versions of it leave the tag there
            _turn(picture)
        shown = _profiled(_in_8_bits(picture, depth, inverted), picture.info.get("icc_profile"))
        return _on(shown, colour(background))


def _turn(picture: Image.Image) -> None:
    """Turns a picture upright, in place. A broken EXIF block says nothing; the picture is then as it is
    stored."""
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # its readers fail in any way
        pass


def bounded(size: tuple[int, int]) -> None:
    """Raises a ValueError for a picture of (width, height) with too many pixels."""
    if size[0] * size[1] > PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {PIXELS}")


def colour(name: str | None) -> tuple[int, int, int]:
    """Red, green and blue of a colour by its name or as #rrggbb; None is white.

    Raises:
        ValueError: if there is no such colour.
    """
    try:
        return ImageColor.getrgb("white" if name is None else name)[:3]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"background={name} is no colour; write a name such as black, or '#rrggbb'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Pillow does not warn of what is bounded or mended here. Only one thread may enter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(data: Path | bytes) -> Image.Image:
    """The picture's header."""
    try:
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"Pillow cannot identify it as one of {', '.join(FORMATS)}") from None


# -- numbers and colours


def _depth(picture: Image.Image) -> int:
    """Bits of a number in the file; the mode does not say it. To be asked before the pixels are loaded."""
    tags = getattr(picture, "tag_v2", {})
    if 258 in tags:
        return int(tags[258][0])
    tiles = getattr(picture, "tile", None)
    how = tiles[0][3] if tiles else None
    said = re.search(r";(\d+)", how) if isinstance(how, str) else None  # Pillow's "L;4", "RGB;16B"
    return int(said[1]) if said else 16 if picture.mode.startswith("I") else 8


def _white_is_zero(picture: Image.Image) -> bool:
    """Whether a gray TIFF counts from white to black. Pillow turns 8 bits round, and not 16."""
    return getattr(picture, "tag_v2", {}).get(262) == 0


def _in_8_bits(picture: Image.Image, depth: int, inverted: bool) -> Image.Image:
    """In RGB, RGBA, L, LA or CMYK.

    Args:
        depth: bits of a number in the file.
        inverted: 0 is white there.

    Raises:
        ValueError: if nothing says which number is white.
    """
    mode, key = picture.mode, picture.info.get("transparency")
    if mode.startswith("I;16") or (
        mode == "I" and picture.format in ("PNG", "PPM")
    ):  # these two scale to 16 bits
        numbers = np.asarray(picture).astype(np.int64)
        values = (numbers >> (depth - 8)).clip(0, 255).astype(np.uint8)
        gray = Image.fromarray(255 - values if inverted else values)
        return _without(gray, numbers == key) if isinstance(key, int) else gray
    if mode not in EIGHT_BITS:
        raise ValueError(
            f"it holds numbers of the kind {mode}, and nothing says which is white; save it with 8 bits"
        )
    if mode in ("L", "RGB") and key is not None:
        pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
        return _without(picture, (pixels == _as_loaded(key, depth)).all(-1))
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return picture
    return picture.convert("RGBA" if key is not None or mode in ("PA", "La", "RGBa") else "RGB")


def _as_loaded(key: Any, depth: int) -> list[int]:
    """The transparent colour in the 8 bits of the loaded pixels. Pillow hands it on in the bits of the
    file."""
    numbers = key if isinstance(key, tuple) else (key,)
    return [number >> 8 if depth == 16 else number * 255 // (2**depth - 1) for number in numbers]


def _without(picture: Image.Image, transparent: NDArray[np.bool_]) -> Image.Image:
    """With an alpha channel that is 0 where `transparent` [height, width] says so."""
    shown = picture.copy()
    shown.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    return shown


def _profiled(shown: Image.Image, profile: bytes | None) -> Image.Image:
    """In sRGB, if an embedded profile is of another space; as it is, if the profile cannot be used."""
    bands = shown.mode.removesuffix("A")
    to_srgb = _transform(profile, bands) if profile else None
    if to_srgb is None:
        return shown
    out = to_srgb.apply(shown if bands == shown.mode else shown.convert(bands))
    if bands != shown.mode:
        out.putalpha(shown.getchannel("A"))
    return out


@lru_cache(maxsize=16)
def _transform(profile: bytes, bands: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's space to sRGB; None if it is sRGB, broken, or not for these bands (L, RGB, CMYK)."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != {"L": "GRAY"}.get(bands, bands) or "sRGB" in (source.profile.profile_description or ""):
            return None
        return ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), bands, "RGB"
        )
    except (ImportError, OSError, ValueError, TypeError):
        return None


def _on(shown: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB, in front of a colour."""
    if shown.mode not in ("LA", "RGBA"):
        return shown if shown.mode == "RGB" else shown.convert("RGB")
    canvas = Image.new("RGB", shown.size, background)
    canvas.paste(shown.convert("RGB"), mask=shown.getchannel("A"))
    return canvas


# -- before a run


@dataclass
class Looked:
    """What a look at the pictures of a data set found."""

    count: int = 0
    """How many were looked at before the time was up."""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Which of them are broken, and why."""


def look(pictures: Iterable[Callable[[], Source]]) -> Looked:
    """Looks for broken pictures, in parallel and for SECONDS at most.

    Pictures are decoded until DECODED pixels are spent. Of every further one, the header and the end of the
    file are read; it is decoded only if those look wrong, so that what is odd and whole is not refused.
    """
    looked, left, lock, began = Looked(), [DECODED], Lock(), time.monotonic()

    def trouble(read: Callable[[], Source]) -> str | None:
        try:
            source = read()
            size, whole = _ends(source)
            with lock:
                left[0] -= size[0] * size[1]
                affordable = left[0] >= 0
            bounded(size)
            if affordable or not whole:
                decoded(source)
        except Exception as error:  # Pillow's readers fail in any way on what is broken
            return reason(error)
        return None

    coming = iter(pictures)
    with quiet(), ThreadPoolExecutor(THREADS) as pool:
        while some := list(islice(coming, 16 * THREADS)):
            for number, said in enumerate(pool.map(trouble, some), looked.count):
                looked.broken += [] if said is None else [(number, said)]
            looked.count += len(some)
            if time.monotonic() - began > SECONDS:
                break
    return looked


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _ends(source: Source) -> tuple[tuple[int, int], bool]:
    """Width and height by the header, and whether the file ends with the marker of its format."""
    head, tail, length = _edges(source)
    try:
        with _opened(head) as picture:
            size, kind = picture.size, picture.format
    except Exception:  # a header longer than its part that was read
        return (0, 0), False
    if kind == "WEBP":
        return size, int.from_bytes(head[4:8], "little") + 8 <= length
    if kind == "GIF":
        return size, tail.rstrip(b"\0")[-1:] == b";"
    if kind in ("JPEG", "MPO"):
        if tail.endswith(bytes(16)) and not _has_end(_whole(source)):  # libjpeg takes zeros for data
            raise ValueError("its end is missing, zeros are in its place; copy it again")
        return size, _has_end(tail)
    return size, kind == "PNG" and b"IEND\xaeB`\x82" in tail


def _has_end(jpeg: bytes) -> bool:
    """Whether the end of a JPEG is there. That of a thumbnail lies in the header, before the picture's own
    data."""
    return jpeg.rfind(b"\xff\xd9") > jpeg.rfind(b"\xff\xda")


def _whole(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    return source.read_bytes() if isinstance(source, Path) else source.read()


def _edges(source: Source) -> tuple[bytes, bytes, int]:
    """The first and the last END bytes of a picture's file, and its length."""
    if isinstance(source, bytes):
        return source[:END], source[-END:], len(source)
    file, offset = (source.file, source.offset) if isinstance(source, Span) else (source, 0)
    length = source.size if isinstance(source, Span) else file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(offset)
        head = opened.read(min(END, length))
        opened.seek(offset + max(0, length - END))
        return head, opened.read(min(END, length)), length

"""Pictures as bytes."""

import io

from PIL import Image


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(out, format="PNG")
    return out.getvalue()

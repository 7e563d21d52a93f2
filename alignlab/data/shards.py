"""Pictures with captions in webdataset shards: .tar files with NAME.jpg and NAME.txt or NAME.json, in any
order.

Nothing is unpacked to the disk. A shard's table of contents is read once (links, devices and folders in it
are passed over), captions with it; a picture is read from its place in the shard when it is asked for, by its
offset and size. Shards must not be compressed.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.data.left_out import LeftOut, of_the_system
from alignlab.data.pictures import Span

PICTURES = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""Ends of the names of pictures."""
TEXTS = ("txt", "caption", "json")
"""Of captions, in the order in which they are looked for."""
UNREAD = frozenset("avif heic heif jxl jp2 svg tga exr psd ico dng cr2 nef tar tgz gz zip".split())
"""Of pictures, and of what may hold some, that are left out."""
CAPTION = 2**20
"""Bytes of a .txt or .json, at most."""
PICTURE = 2**28
"""Bytes of a picture's file, at most."""


@dataclass(frozen=True)
class Member:
    """A picture in a shard, with its caption."""

    picture: Span
    caption: str


@dataclass
class _Example:
    """What a shard has of an example so far."""

    picture: Span | None = None
    texts: dict[str, str] = field(default_factory=dict)

    def member(self) -> Member | None:
        caption = next((self.texts[kind] for kind in TEXTS if kind in self.texts), None)
        return None if self.picture is None or caption is None else Member(self.picture, caption)


def members(shard: Path, columns: Sequence[str], left: LeftOut) -> Iterator[Member]:
    """The pictures of a shard that have a caption, in order. A .txt comes before a .json.

    An example is whole when a file of another name follows. What is not whole by then waits until the shard's
    end, since some shards have all texts before all pictures.

    Args:
        columns: names of the caption in a .json, the first that is there counts.
        left: counts what has no caption, no picture, or is of another kind.

    Raises:
        ValueError: if it is no uncompressed .tar, or a caption cannot be read.
    """
    waiting: dict[str, _Example] = {}
    before, parts = "", _Example()
    try:
        # ":" refuses a compressed shard, which could unpack to any size.
        with tarfile.open(shard, mode="r:") as tar:
            whole = shard.stat().st_size
            for entry in tar:
                stem, kind = _named(entry.name)
                if kind not in (*PICTURES, *TEXTS, *UNREAD) or entry.isdir():
                    continue
                if kind in TEXTS and of_the_system(entry.name):
                    continue
                if (why := _passed_over(entry, kind)) is not None:
                    left.add(why, entry.name)
                    continue
                if stem != before:
                    if (member := parts.member()) is not None:
                        yield member
                    elif before:
                        waiting[before] = parts
                    before, parts = stem, waiting.pop(stem, _Example())
                if entry.offset_data + entry.size > whole:
                    raise tarfile.ReadError("unexpected end of data")
                if kind in TEXTS:
                    parts.texts |= _text(tar, entry, columns, shard)
                elif parts.picture is not None:
                    left.add("second pictures of an example", entry.name)
                elif entry.size > PICTURE:
                    raise ValueError(
                        f"data: {entry.name} in {shard} has {entry.size} bytes, more than {PICTURE}; remove "
                        "it"
                    )
                else:
                    parts.picture = Span(shard, entry.name, entry.offset_data, entry.size)
            if (member := parts.member()) is not None:
                yield member
            else:
                waiting[before] = parts
    except (tarfile.TarError, OSError, EOFError, UnicodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data: {shard} is no uncompressed .tar ({reason}); copy it again, or unpack its compression"
        ) from None
    _leave_out_halves(waiting, left)


def _leave_out_halves(waiting: dict[str, _Example], left: LeftOut) -> None:
    """Counts the pictures whose caption never came, and the captions whose picture never came."""
    for stem, example in waiting.items():
        if example.picture is not None:
            left.add("without a caption", example.picture.name)
        elif example.texts:
            left.add("without a picture", stem)


def _passed_over(entry: tarfile.TarInfo, kind: str) -> str | None:
    """Why a member is left out, whatever its example is."""
    if of_the_system(entry.name):
        return "put there by a system"
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
        return "that are links or no regular files"
    return "of a kind that is not read" if kind in UNREAD else None


def _text(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, columns: Sequence[str], shard: Path
) -> dict[str, str]:
    """The caption of a member under its kind; nothing of a .json without one."""
    kind = _named(entry.name)[1]
    stream = tar.extractfile(entry) if entry.size <= CAPTION else None
    text = None if stream is None else caption_in(stream.read(), kind, columns)
    if text is None and kind != "json":
        raise ValueError(
            f"data: {entry.name} in {shard} is no caption (UTF-8, at most {CAPTION} bytes); mend or remove it"
        )
    return {} if text is None else {kind: text}


def _named(name: str) -> tuple[str, str]:
    """What files of one example share, and the end in which they differ: a/b.c.png is a/b.c and png."""
    stem, _, kind = name.removeprefix("./").rpartition(".")
    return stem, kind.lower()


def caption_in(text: bytes, kind: str, columns: Sequence[str]) -> str | None:
    """The caption that a file of TEXTS holds; None if it is no UTF-8, or a .json without one."""
    try:
        content = text.decode("utf-8-sig")
        if kind != "json":
            return content.strip()
        data = json.loads(content)
    except (ValueError, RecursionError):
        return None
    captions = (
        [data[name] for name in columns if isinstance(data.get(name), str)] if isinstance(data, dict) else []
    )
    return captions[0] if captions else None

"""Pictures with captions in webdataset shards: .tar files that hold NAME.jpg beside NAME.txt or NAME.json.

Nothing is unpacked to the disk. A shard's table of contents is read once (links, devices and folders in it are passed over), captions
with it; a picture is read from its place in the shard when it is asked for, by its offset and size. Shards must not be compressed.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm")
CAPTION = 2**20
"""Bytes of a .txt or .json, at most."""
PICTURE = 2**28
"""Bytes of a picture's file, at most."""


@dataclass(frozen=True)
class Member:
    """A picture in a shard, with its caption."""

    shard: Path
    name: str
    """In the shard."""
    caption: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The picture's file.

        Raises:
            ValueError: if the shard ends before it does, or is gone.
        """
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                found = file.read(self.size)
        except OSError as error:
            raise ValueError(f"data: {self.shard} cannot be read ({error.strerror}); mend or remove it") from None
        if len(found) < self.size:
            raise ValueError(f"data: {self.shard} ends within {self.name}; copy it again, or remove it")
        return found


def members(shard: Path, columns: Sequence[str]) -> Iterator[Member]:
    """The pictures of a shard that have a caption, in order. A .txt beside the picture comes before a .json.

    Args:
        columns: names of the caption in a .json, the first that is there counts.

    Raises:
        ValueError: if it is no uncompressed .tar, or a caption cannot be read.
    """
    picture: tuple[str, int, int] | None = None
    texts: dict[str, str] = {}
    before = ""
    try:
        with tarfile.open(shard, mode="r:") as tar:  # ":" takes no compressed one, which could unpack to any size
            whole = shard.stat().st_size
            for entry in tar:
                stem, kind = _parts(entry.name)
                if stem != before:
                    yield from _joined(shard, picture, texts)
                    picture, texts, before = None, {}, stem
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
                    continue
                if entry.offset_data + entry.size > whole:
                    raise tarfile.ReadError("unexpected end of data")
                if kind in PICTURES and picture is None:
                    if entry.size > PICTURE:
                        raise ValueError(f"data: {entry.name} in {shard} has {entry.size} bytes, more than {PICTURE}; remove it")
                    picture = entry.name, entry.offset_data, entry.size
                elif kind in ("txt", "json"):
                    found = tar.extractfile(entry) if entry.size <= CAPTION else None
                    text = None if found is None else _caption(found.read(), kind, columns)
                    if text is None and kind == "txt":
                        raise ValueError(
                            f"data: {entry.name} in {shard} is no caption (UTF-8, at most {CAPTION} bytes); mend or remove it"
                        )
                    texts |= {} if text is None else {kind: text}
            yield from _joined(shard, picture, texts)
    except (tarfile.TarError, OSError, EOFError, UnicodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data: {shard} is no uncompressed .tar ({reason}); copy it again, or unpack its compression") from None


def _parts(name: str) -> tuple[str, str]:
    """What files of one example share, and what they differ in: a/b.seg.png is a/b and seg.png, as webdataset takes it."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def _caption(text: bytes, kind: str, columns: Sequence[str]) -> str | None:
    try:
        said = text.decode("utf-8-sig")
        if kind == "txt":
            return said.strip()
        its = json.loads(said)
    except (ValueError, RecursionError):
        return None
    found = [its[name] for name in columns if isinstance(its.get(name), str)] if isinstance(its, dict) else []
    return found[0] if found else None


def _joined(shard: Path, picture: tuple[str, int, int] | None, texts: dict[str, str]) -> Iterator[Member]:
    if picture is not None and texts:
        name, offset, size = picture
        yield Member(shard=shard, name=name, caption=texts.get("txt", texts.get("json", "")), offset=offset, size=size)

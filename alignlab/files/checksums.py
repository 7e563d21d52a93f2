"""Files that can be told whole from torn, truncated or flipped ones: a folder's checksums.json holds the size
and the BLAKE2b of each of its files, and tensors have a digest of their own."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "checksums.json"


class Damaged(Exception):
    """What was read is not what was written; half a sentence says how."""


def seal(folder: Path) -> None:
    """Writes the checksums of a folder's files, and brings all of it to the disk."""
    sums = {
        path.name: {"bytes": path.stat().st_size, "blake2b": digest_of_file(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n")
    for path in (*folder.iterdir(), folder):
        sync(path)


def check(folder: Path, *, spare: str = "") -> None:
    """Reads a sealed folder through. One without checksums, as earlier versions left them, passes. The file
    `spare` is not looked at.

    Raises:
        Damaged: with the first file that is not what it was.
    """
    if not (folder / MANIFEST).is_file():
        return
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["blake2b"]) for name, entry in sums.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} cannot be read") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        if name == spare:
            continue
        try:
            if path.stat().st_size != size:
                raise Damaged(f"{name} has {path.stat().st_size} of its {size} bytes")
            if digest_of_file(path) != digest:
                raise Damaged(f"the checksum of {name} is wrong")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None


def whole(folder: Path, name: str) -> bytes | None:
    """The content of one file of a sealed folder; None if it is not what was sealed, or if nothing says what
    that was."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())[name]["blake2b"]
        content = (folder / name).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if hashlib.blake2b(content, digest_size=16).hexdigest() == expected else None


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    """BLAKE2b of named tensors: their names, shapes, types and bits, and of a header's texts, if there is
    one."""
    seen = hashlib.blake2b(digest_size=16)
    if header:
        seen.update(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()


def digest_of_json(node: Any) -> str:
    """BLAKE2b of what a JSON file holds, however it is written."""
    plain = json.loads(json.dumps(node))
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of_file(path: Path) -> str:
    """BLAKE2b of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

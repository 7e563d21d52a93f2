"""Disks that are full, and files that a disk damages."""

import contextlib
from pathlib import Path


def fill(place: Path) -> None:
    """Leaves not one byte."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def flip(path: Path) -> None:
    """One bit in the middle, by the disk's own doing: neither size nor time tell."""
    bits = bytearray(path.read_bytes())
    bits[len(bits) // 2] ^= 1
    path.write_bytes(bits)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tear(path: Path) -> None:
    """Its length is there, its end is zeros: the page was never written."""
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(path.stat().st_size - half))

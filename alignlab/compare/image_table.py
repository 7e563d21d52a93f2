"""The measured images of one model as tables on the disk: a line for each image, and one for each prompt of
the diversity set."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS: dict[str, Callable[[str], Any]] = {"set": str, "prompt": str, "image": int}
"""Of the columns that say which image it is; all others are numbers."""
PLACE = tuple(KINDS)
TABLES = ("images.csv", "images_diversity.json", "base.csv", "base_diversity.json")
"""The files of an evaluation, of the tuned model and of the base model."""


@dataclass(frozen=True)
class Images:
    """What one model drew, and what it earned."""

    rows: list[dict[str, Any]]
    """Each with its set, prompt and number, each reward, and each image statistic ("image/..."), to six
    digits, as on the disk: so that equal images tie."""
    prompts: list[dict[str, Any]]
    """Each with a prompt of the diversity set, its lpips and its vendi (None without features)."""
    pictures: Tensor | None = None
    """[n, 3, H, W] uint8, those of the set "train"."""

    @property
    def columns(self) -> list[str]:
        return [name for name in self.rows[0] if name not in PLACE]

    @cached_property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(row["set"] for row in self.rows))

    def values(self, where: str, column: str) -> NDArray[np.float64]:
        """[prompts, images] of one set."""
        rows = [row for row in self.rows if row["set"] == where]
        count = len(dict.fromkeys(row["prompt"] for row in rows))
        return np.array([row[column] for row in rows]).reshape(count, -1)


def six_digits(value: Tensor) -> float:
    return float(f"{value.item():.6g}")


def write_images(folder: Path, images: Images, name: str = "images", *, pictures: bool = False) -> None:
    """folder/NAME.csv, folder/NAME_diversity.json and, if asked, folder/NAME.safetensors with the pictures.
    The folder is there."""
    (folder / f"{name}_diversity.json").write_text(json.dumps(images.prompts))
    if pictures and images.pictures is not None:
        save_file({"pictures": images.pictures.contiguous()}, folder / f"{name}.safetensors")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*PLACE, *images.columns])
        for row in images.rows:
            table.writerow(
                [*(row[key] for key in PLACE), *(f"{row[column]:.6g}" for column in images.columns)]
            )


def read_images(folder: Path, name: str = "images") -> Images:
    """What `write_images` wrote.

    Raises:
        ValueError: with half a sentence that names the file, if one of them is not there or was damaged.
    """
    table, spread, kept = (
        folder / f"{name}{ending}" for ending in (".csv", "_diversity.json", ".safetensors")
    )
    path = table
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [
                {k: KINDS.get(k, float)(v) for k, v in row.items()}
                for row in csv.DictReader(file, strict=True)
            ]
        path = spread
        prompts = json.loads(spread.read_text(encoding="utf-8"))
        path = kept
        pictures = load_file(kept)["pictures"] if kept.is_file() else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error, SafetensorError):
        raise ValueError(f"{path} was damaged") from None
    if not rows or not all(_is_row(row, rows[0]) for row in rows) or not _are_whole(rows):
        raise ValueError(f"{table} was damaged: it lacks lines or columns, or has numbers that are none")
    if not isinstance(prompts, list) or not all(map(_is_spread, prompts)):
        raise ValueError(f"{spread} was damaged: it has prompts without their numbers")
    return Images(rows, prompts, pictures)


def _is_row(row: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether a line has the columns of the first one, and a finite number in each."""
    finite = all(math.isfinite(value) for column, value in row.items() if column not in PLACE)
    return {*PLACE} <= row.keys() == first.keys() and finite


def _are_whole(rows: list[dict[str, Any]]) -> bool:
    """Whether the images of each prompt are counted from 0, and every prompt of a set has as many."""
    images: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        images.setdefault(row["set"], {}).setdefault(row["prompt"], []).append(row["image"])
    counted = [list(prompts.values()) for prompts in images.values()]
    return all(numbers == list(range(len(prompts[0]))) for prompts in counted for numbers in prompts)


def _is_spread(row: Any) -> bool:
    """Whether it is a prompt of the diversity set with its numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        return False
    return (
        all(isinstance(row.get(key), int | float | None) for key in ("lpips", "vendi"))
        and row.get("lpips") is not None
    )

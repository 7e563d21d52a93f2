"""The measured images of one model as tables on the disk: a line for each image, and one for each prompt of the diversity set."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS: dict[str, Callable[[str], Any]] = {"set": str, "prompt": str, "image": int}
"""Of the columns that say which image it is; all others are numbers."""
PLACE = tuple(KINDS)


@dataclass(frozen=True)
class Images:
    """What one model drew, and what it earned."""

    rows: list[dict[str, Any]]
    """Each with its set, prompt and number, each reward, and each image statistic ("image/..."), to six digits, as on the disk: so that
    equal images tie."""
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
    """folder/NAME.csv, folder/NAME_diversity.json and, if asked, folder/NAME.safetensors with the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_diversity.json").write_text(json.dumps(images.prompts))
    if pictures and images.pictures is not None:
        save_file({"pictures": images.pictures.contiguous()}, folder / f"{name}.safetensors")
    aside = folder / f".{name}.csv"
    with aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*PLACE, *images.columns])
        for row in images.rows:
            table.writerow([*(row[key] for key in PLACE), *(f"{row[column]:.6g}" for column in images.columns)])
    aside.replace(folder / f"{name}.csv")  # last: where the table is, the rest is


def read_images(folder: Path, name: str = "images") -> Images:
    """What `write_images` wrote."""
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: KINDS.get(k, float)(v) for k, v in row.items()} for row in csv.DictReader(file)]
    kept = folder / f"{name}.safetensors"
    pictures = load_file(kept)["pictures"] if kept.is_file() else None
    return Images(rows, json.loads((folder / f"{name}_diversity.json").read_text()), pictures)

"""The measured images of one model as tables on the disk: a line for each image, and one for each prompt of the diversity set."""

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

PLACE = ("set", "prompt", "image")


@dataclass(frozen=True)
class Images:
    """What one model drew, and what it earned."""

    rows: list[dict[str, Any]]
    """Each with its set, prompt and number, each reward, and each image statistic ("image/...")."""
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


def write_images(folder: Path, images: Images, name: str = "images") -> None:
    """folder/NAME.csv with six digits, folder/NAME_diversity.json; a cache (the default name) keeps the pictures too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_diversity.json").write_text(json.dumps(images.prompts))
    if images.pictures is not None and name == "images":
        save_file({"pictures": images.pictures.contiguous()}, folder / "pictures.safetensors")
    aside = folder / f".{name}.csv"
    with aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*PLACE, *images.columns])
        for row in images.rows:
            table.writerow([*(row[key] for key in PLACE), *(f"{row[column]:.6g}" for column in images.columns)])
    aside.replace(folder / f"{name}.csv")  # last: where the table is, the rest is


def read_images(folder: Path, name: str = "images") -> Images:
    """What `write_images` wrote; the pictures only where they were kept."""
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v if k in PLACE[:2] else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    kept = folder / "pictures.safetensors"
    pictures = load_file(kept)["pictures"] if kept.is_file() and name == "images" else None
    return Images(rows, json.loads((folder / f"{name}_diversity.json").read_text()), pictures)

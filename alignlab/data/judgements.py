"""What people said of images: ratings of one image, choices between two. Tables beside image files, or with images inside.

    ratings   image, rating            or AVA's form: image, 1, 2, ... 10 (votes for each mark)
    pairs     caption, jpg_0, jpg_1, label_0     Pick-a-Pic's columns: label_0 is 1 if the first was chosen, 0 if not, 0.5 for a tie

A table is a .csv whose image columns hold paths relative to it, or a .parquet file (Pick-a-Pic's shards) whose image columns
hold the files' bytes. `data` may name the table or a folder with one or several.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

PAIR = ("caption", "jpg_0", "jpg_1", "label_0")
"""The columns of a pair, as Pick-a-Pic calls them."""


class Ratings(Dataset[tuple[Tensor, float]]):
    """Images with their ratings.

    Args:
        data: a table, or a folder with one.
        size: (height, width) to which images are resized.
    """

    def __init__(self, data: str, size: tuple[int, int]) -> None:
        self.rows, self.size = read_table(data, needs="ratings", columns=["image"]), size
        self.ratings = [self._rating(k, row) for k, row in enumerate(self.rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Tensor, float]:
        return image(self.rows[k], "image", self.size), self.ratings[k]

    @staticmethod
    def _rating(k: int, row: dict[str, Any]) -> float:
        try:
            if row.get("rating") not in (None, ""):
                return float(row["rating"])
            votes = np.array([float(row[str(mark)]) for mark in range(1, 11)])
            return float(votes @ np.arange(1, 11) / votes.sum())
        except (KeyError, ValueError):
            raise ValueError(
                f"data: row {k + 1} of {row['_table']} has neither a number in column rating nor votes in columns 1 to 10; mend or remove it"
            ) from None


class Pairs(Dataset[tuple[Tensor, Tensor, str, float]]):
    """Two images of one caption, and how often the first was chosen.

    Args:
        data: a table, or a folder with one.
        size: (height, width) to which images are resized.
    """

    def __init__(self, data: str, size: tuple[int, int]) -> None:
        self.rows, self.size = read_table(data, needs="pairs", columns=PAIR), size
        self.labels = [choice(k, row) for k, row in enumerate(self.rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, str, float]:
        row = self.rows[k]
        return image(row, "jpg_0", self.size), image(row, "jpg_1", self.size), row["caption"], self.labels[k]


def choice(k: int, row: dict[str, Any]) -> float:
    """How often the first image of a pair was chosen: 0, 0.5 or 1.

    Raises:
        ValueError: if row k says something else.
    """
    label = {"0": 0.0, "0.0": 0.0, "0.5": 0.5, "1": 1.0, "1.0": 1.0}.get(str(row["label_0"]))
    if label is None:
        raise ValueError(
            f"data: label_0={row['label_0']!r} in row {k + 1} of {row['_table']} is not 0, 0.5 or 1; mend or remove it"
        )
    return label


def read_table(data: str, *, needs: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one table or of all in a folder, each with the table's path under "_table".

    Raises:
        ValueError: if there is none, a column is missing, or it is empty.
    """
    path = Path(data)
    tables = sorted(p for kind in ("*.csv", "*.parquet") for p in path.glob(kind)) if path.is_dir() else [path]
    if not tables or not all(t.is_file() for t in tables):
        raise ValueError(f"data={data}: there is no .csv or .parquet table of {needs} there; give one, or a folder with one")
    rows: list[dict[str, Any]] = []
    for table in tables:
        found = _parquet(table) if table.suffix == ".parquet" else _csv(table)
        missing = [c for c in columns if found and c not in found[0]]
        if missing:
            raise ValueError(f"data: {table} has no column {', '.join(missing)}; {needs} need {', '.join(columns)}")
        rows += [{**row, "_table": table} for row in found]
    if not rows:
        raise ValueError(f"data={data} holds no rows; give a table of {needs}")
    return rows


def _csv(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {table} cannot be read as UTF-8 comma-separated text: {error}") from None


def _parquet(table: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"data: {table} needs the package pyarrow; pip install 'alignlab[data]'") from None
    try:
        return pyarrow.parquet.read_table(table).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {table} is no parquet file: {error}") from None


def image(row: dict[str, Any], column: str, size: tuple[int, int]) -> Tensor:
    """[3, height, width] in [0, 1], resized (bicubic, antialiased) and cut to the middle."""
    value = row[column]
    if isinstance(value, dict):  # a `datasets` image
        value = value.get("bytes") or value.get("path")
    source = io.BytesIO(value) if isinstance(value, bytes) else row["_table"].parent / str(value)
    try:
        picture = Image.open(source).convert("RGB")
    except OSError as error:
        raise ValueError(f"data: {column} of a row of {row['_table']} is no image ({error}); mend or remove the row") from None
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    if scale != 1:
        picture = picture.resize(
            (max(width, round(picture.width * scale)), max(height, round(picture.height * scale))), Image.Resampling.BICUBIC
        )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

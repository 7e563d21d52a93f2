"""What people said of images: ratings of one image, choices between two. Tables beside image files, or with images inside.

    ratings   image, rating            or AVA's form: image, 1, 2, ... 10 (votes for each mark)
    pairs     caption, jpg_0, jpg_1, label_0     Pick-a-Pic's columns: label_0 is 1 if the first was chosen, 0 if not, 0.5 for a tie

A table is a .csv whose image columns hold paths relative to it, or a .parquet file (Pick-a-Pic's shards) whose image columns
hold the files' bytes. `data` may name the table or a folder with one or several.

A table may be somebody else's, so its paths lead nowhere but to pictures below its own folder (a link in there may lead on).
"""

import csv
import io
import math
import warnings
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
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Of image files. Pillow knows more, and starts another program for some (EPS)."""
PIXELS = 2**26
"""Of one picture, at most: 8192 x 8192. A file of kilobytes can unpack to gigabytes."""


class Ratings(Dataset[tuple[Tensor, float]]):
    """Images with their ratings.

    Args:
        data: a table, or a folder with one.
        size: (height, width) to which images are resized.
    """

    def __init__(self, data: str, size: tuple[int, int]) -> None:
        self.rows, self.size = read_table(data, needs="ratings", columns=["image"]), size
        self.ratings = [self._rating(k, row) for k, row in enumerate(self.rows)]
        for row in self.rows:
            are_there(row, ["image"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Tensor, float]:
        return image(self.rows[k], "image", self.size), self.ratings[k]

    @staticmethod
    def _rating(k: int, row: dict[str, Any]) -> float:
        try:
            if row.get("rating") not in (None, ""):
                rating = float(row["rating"])
            else:
                votes = np.array([float(row[str(mark)]) for mark in range(1, 11)])
                if (votes < 0).any() or not votes.any():
                    raise ValueError
                rating = float(votes @ np.arange(1, 11) / votes.sum())
            if not math.isfinite(rating):
                raise ValueError
            return rating
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"data: row {k + 1} of {row['_table']} has neither a number in column rating nor votes in columns 1 to 10; mend or remove it"
            ) from None


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


def caption_of(k: int, row: dict[str, Any]) -> str:
    """The prompt of a pair.

    Raises:
        ValueError: if row k has none, or one that is no text.
    """
    caption = row["caption"]
    if not isinstance(caption, str) or "\0" in caption or any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise ValueError(f"data: caption={caption!r} in row {k + 1} of {row['_table']} is no text; mend or remove it")
    return caption


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
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {table} cannot be read as UTF-8 comma-separated text: {error}") from None
    for k, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"data: row {k + 1} of {table} has another number of columns than its first line; mend or remove it")
    return rows


def _parquet(table: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"data: {table} needs the package pyarrow; pip install 'alignlab[data]'") from None
    try:
        return pyarrow.parquet.read_table(table).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"data: {table} is no parquet file: {str(error).splitlines()[0]}") from None


def beside(table: Path, name: Any) -> Path:
    """The file that a table means.

    Raises:
        ValueError: if it is no relative path into the table's folder, or no regular file.
    """
    path = Path(str(name or ""))
    if not str(name or "") or path.is_absolute() or ".." in path.parts or "\0" in str(name):
        raise ValueError(f"{str(name)!r} is no path below the table's folder; put the pictures there, or a link to their folder")
    try:
        there = (table.parent / path).is_file()
    except OSError:  # a name that no file system takes
        there = False
    if not there:
        raise ValueError(f"there is no file {str(table.parent / path)[:300]}")
    return table.parent / path


def are_there(row: dict[str, Any], columns: Sequence[str]) -> None:
    """Pictures that are files of their own are looked for: a run learns of a missing one at its start, not in its third hour.

    Raises:
        ValueError: for the first that is not there, or may not be read.
    """
    for column in columns:
        if not isinstance(row[column], (bytes, dict)):
            try:
                beside(row["_table"], row[column])
            except ValueError as error:
                raise ValueError(f"data: {column} of a row of {row['_table']}: {error}; mend or remove the row") from None


def image(row: dict[str, Any], column: str, size: tuple[int, int]) -> Tensor:
    """[3, height, width] in [0, 1], resized (bicubic, antialiased) and cut to the middle.

    Raises:
        ValueError: if it is no image of FORMATS, has more than PIXELS before or after it is resized, or lies outside of the table's folder.
    """
    value = row[column]
    if isinstance(value, dict):  # a `datasets` image
        value = value.get("bytes") or value.get("path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is ours
            opened = Image.open(io.BytesIO(value) if isinstance(value, bytes) else beside(row["_table"], value), formats=FORMATS)
            height, width = size
            scale = max(height / opened.height, width / opened.width)
            fit = (max(width, round(opened.width * scale)), max(height, round(opened.height * scale)))
            for wide, high in (opened.size, fit):  # a thin strip grows: its shorter side is brought to the size
                if wide * high > PIXELS:
                    raise ValueError(f"{wide} x {high} pixels are more than {PIXELS}")
            picture = opened.convert("RGB")
    except Exception as error:  # Pillow's readers fail in any way on what is broken
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data: {column} of a row of {row['_table']} is no image ({reason}); mend or remove the row") from None
    if scale != 1:
        picture = picture.resize(fit, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

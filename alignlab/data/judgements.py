"""What people said of images: ratings of one image, choices between two. Tables beside image files, or with
images inside.

    ratings   image, rating; or AVA's form: image, 1, 2, ... 10 (votes for each mark)
    pairs     caption, jpg_0, jpg_1, label_0: Pick-a-Pic's columns. label_0 is 1 if the first was chosen, 0 if
              not, 0.5 for a tie

A table is a .csv whose image columns hold paths relative to it, or a .parquet file (Pick-a-Pic's shards)
whose image columns hold the files' bytes. `data` may name the table or a folder with one or several.

A table may be somebody else's, so its paths lead nowhere but to pictures below its own folder (a link in
there may lead on).
"""

import csv
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from alignlab.data.left_out import of_the_system
from alignlab.data.pictures import FORMATS as FORMATS
from alignlab.data.pictures import PIXELS as PIXELS
from alignlab.data.pictures import SECONDS, Source, Span, bounded, decoded, look, quiet, reason

PAIR = ("caption", "jpg_0", "jpg_1", "label_0")
"""The columns of a pair, as Pick-a-Pic calls them."""
LABELS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "0.5": 0.5, "1": 1.0, "1.0": 1.0, "true": 1.0}
"""How a table may write them."""


class Ratings(Dataset[tuple[Tensor, float]]):
    """Images with their ratings.

    Args:
        data: a table, or a folder with one.
        size: (height, width) to which images are resized.
        background: the colour behind what is transparent; None is white.
    """

    def __init__(self, data: str, size: tuple[int, int], background: str | None = None) -> None:
        self.rows, self.size = read_table(data, needs="ratings", columns=["image"]), size
        self.background = background
        self.ratings = [self._rating(k, row) for k, row in enumerate(self.rows)]
        for row in self.rows:
            are_there(row, ["image"])
        are_whole(data, len(self.rows), lambda k: (self.rows[k], "image"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Tensor, float]:
        return image(self.rows[k], "image", self.size, self.background), self.ratings[k]

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
                f"data: row {k + 1} of {row['_table']} has neither a number in column rating nor votes in "
                "columns 1 to 10; mend or remove it"
            ) from None


def choice(k: int, row: dict[str, Any]) -> float:
    """How often the first image of a pair was chosen: 0, 0.5 or 1.

    Raises:
        ValueError: if row k says something else.
    """
    label = LABELS.get(str(row["label_0"]).strip().lower())
    if label is None:
        raise ValueError(
            f"data: label_0={row['label_0']!r} in row {k + 1} of {row['_table']} is not 0, 0.5 or 1; mend or "
            "remove it"
        )
    return label


def unusable(row: dict[str, Any]) -> str | None:
    """Why the label of a pair does not count; None if it does.

    Pick-a-Pic has rows that nobody judged (`has_label` is false, and `label_0` is 0 or null there) and two
    more columns, `label_1` and `are_different`, which must agree with `label_0`.
    """
    if _no(row.get("has_label")) or _absent(row["label_0"]):
        return "without a label"
    label = LABELS.get(str(row["label_0"]).strip().lower())
    if label is None:
        return None  # `choice` refuses it
    if "label_1" in row and LABELS.get(str(row["label_1"]).strip().lower()) != 1 - label:
        return "whose label_0 and label_1 contradict each other"
    if _no(row.get("are_different")) and label != 0.5:
        return "with a winner though are_different is false"
    return None


def _no(value: Any) -> bool:
    return str(value).strip().lower() in ("false", "0", "0.0")


def _absent(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", "none", "null")


def caption_of(k: int, row: dict[str, Any]) -> str:
    """The prompt of a pair.

    Raises:
        ValueError: if row k has none, or one that is no text.
    """
    caption = row["caption"]
    if isinstance(caption, list):
        raise ValueError(
            f"data: the caption in row {k + 1} of {row['_table']} is a list of {len(caption)}; write a row "
            "for each"
        )
    if (
        not isinstance(caption, str)
        or "\0" in caption
        or any("\ud800" <= letter <= "\udfff" for letter in caption)
    ):
        raise ValueError(
            f"data: caption={caption!r} in row {k + 1} of {row['_table']} is no text; mend or remove it"
        )
    return caption


def read_table(data: str, *, needs: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one table or of all in a folder, each with the table's path under "_table".

    Raises:
        ValueError: if there is none, a column is missing, or it is empty.
    """
    path = Path(data)
    tables = tables_of(path, (".csv", ".parquet")) if path.is_dir() else [path]
    if not tables or not all(t.is_file() for t in tables):
        raise ValueError(
            f"data={data}: there is no .csv or .parquet table of {needs} there; give one, or a folder with "
            "one"
        )
    rows: list[dict[str, Any]] = []
    for table in tables:
        lines = _parquet(table) if table.suffix.lower() == ".parquet" else _csv(table)
        missing = [c for c in columns if lines and c not in lines[0]]
        if missing:
            known = ", ".join(str(name) for name in lines[0])
            raise ValueError(
                f"data: {table} has no column {', '.join(missing)}; {needs} need {', '.join(columns)} (its "
                f"columns are {known})"
            )
        rows += [{**row, "_table": table} for row in lines]
    if not rows:
        raise ValueError(f"data={data} holds no rows; give a table of {needs}")
    return rows


def tables_of(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """The files of a folder with these ends, which may be capitals; none that a system put there."""
    return sorted(
        path for path in folder.glob("*") if path.suffix.lower() in kinds and not of_the_system(path.name)
    )


def _csv(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"data: {table} cannot be read as UTF-8 comma-separated text: {error}; save it as UTF-8"
        ) from None
    for k, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(
                f"data: row {k + 1} of {table} has another number of columns than its first line; mend or "
                "remove it"
            )
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
    said = str(name or "")
    for path in (Path(said), Path(said.replace("\\", "/"))):  # a table that was written on Windows
        if not said or path.is_absolute() or ".." in path.parts or "\0" in said:
            raise ValueError(
                f"{said!r} is no path below the table's folder; put the pictures there, or a link to their "
                "folder"
            )
        try:
            if (table.parent / path).is_file():
                return table.parent / path
        except OSError:  # a name that no file system takes
            pass
    raise ValueError(f"there is no file {str(table.parent / said)[:300]}")


def are_there(row: dict[str, Any], columns: Sequence[str]) -> None:
    """Pictures that are files of their own are looked for: a run learns of a missing one at its start, not in
    its third hour.

    Raises:
        ValueError: for the first that is not there, or may not be read.
    """
    for column in columns:
        if not isinstance(row[column], (bytes, dict, Span)):
            try:
                beside(row["_table"], row[column])
            except ValueError as error:
                raise ValueError(
                    f"data: {column} of a row of {row['_table']}: {error}; mend or remove the row"
                ) from None


def image(row: dict[str, Any], column: str, size: tuple[int, int], background: str | None = None) -> Tensor:
    """[3, height, width] in [0, 1], as a viewer shows it (pictures.py), resized (bicubic, antialiased), cut
    to the middle.

    Args:
        background: the colour behind what is transparent; None is white.

    Raises:
        ValueError: if it is no image of FORMATS, has more than PIXELS before or after it is resized, or lies
            outside of the table's folder.
    """
    height, width = size
    try:
        with quiet():
            picture = decoded(_source(row, column), background)
        scale = max(height / picture.height, width / picture.width)
        fit = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        bounded(fit)  # a thin strip grows: its shorter side is brought to the size
    except Exception as error:  # Pillow's readers fail in any way on what is broken
        raise ValueError(_no_image(row, column, reason(error))) from None
    if scale != 1:
        picture = picture.resize(fit, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def are_whole(data: str, count: int, at: Callable[[int], tuple[dict[str, Any], str]]) -> None:
    """Looks at the pictures before a run, which so learns of a broken one at its start, not in its third
    hour.

    Args:
        data: what the user calls it.
        count: how many pictures it has.
        at: the row and the column of picture k.

    Raises:
        ValueError: if some are broken; it names the first few, and says how many there are.
    """
    looked = look(partial(_kth, at, k) for k in range(count))
    if looked.broken:
        (k, why), *others = looked.broken
        names = ", ".join(_name(*at(k)) for k, _ in others[:5])
        more = f" ({len(others)} more broken: {names}{', ...' if len(others) > 5 else ''})" if others else ""
        raise ValueError(f"{_no_image(*at(k), why)}{more}")
    if looked.count < count:
        print(
            f"data={data}: {looked.count} of {count} pictures were looked at in {SECONDS:.0f} seconds, and "
            "none is broken; a broken one among the others ends the run when it is drawn",
            flush=True,
        )


def _kth(at: Callable[[int], tuple[dict[str, Any], str]], k: int) -> Source:
    return _source(*at(k))


def _source(row: dict[str, Any], column: str) -> Source:
    """Where the bytes of a row's picture are.

    Raises:
        ValueError: if there are none, or they lie outside of the table's folder.
    """
    value = row[column]
    if isinstance(value, dict):  # a `datasets` image
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, (bytes, Span)) else beside(row["_table"], value)


def _name(row: dict[str, Any], column: str) -> str:
    return row[column] if isinstance(row[column], str) else str(row["_table"])


def _no_image(row: dict[str, Any], column: str, why: str) -> str:
    name = f": {row[column]}" if isinstance(row[column], str) and row[column] not in why else ""
    return f"data: {column} of a row of {row['_table']} is no image ({why}){name}; mend or remove the row"

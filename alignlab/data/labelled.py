"""Single images that somebody approved of, or did not: what Diffusion-KTO trains on.

    .jsonl            {"prompt": ..., "image": PATH, "label": true} a line, whatever else it holds; paths are
                      relative to the file
    .csv, .parquet    caption, image, label
    pairs             lines and tables of preferences.py: the winner is desirable, the loser undesirable, a
                      tie is left out and counted

A label is true or false, or 1 or 0. `data` may name one such file or a folder with several, of any of these
forms (of what alignlab.make_pairs writes, the folder is its pairs, and labels.jsonl by name its labels).
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from alignlab.data.judgements import PAIR, are_there, caption_of, image, read_table
from alignlab.data.left_out import LeftOut
from alignlab.data.pictures import colour
from alignlab.data.preferences import (
    Told,
    changes,
    each_is_whole,
    given,
    objects,
    pair_of_line,
    pairs_of_rows,
)

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class LabelledImages:
    """The images that have a label. Rows are kept in memory, and images that lie in files of their own are
    read when they are asked for.

    Args:
        data: a .jsonl, .csv or .parquet file, or a folder with some.
        background: the colour behind what is transparent; None is white.

    Raises:
        ValueError: if there is none, it cannot be read, all images have the same label, or one is broken.
    """

    def __init__(self, data: str, background: str | None = None) -> None:
        colour(background)
        self.background, left = background, LeftOut()
        self.rows: list[tuple[dict[str, Any], str]] = []
        """A row, and its column of the image."""
        self.prompts: list[str] = []
        self.desirable: list[bool] = []
        self.ties = 0
        for file in given(data, of="labelled images"):
            for prompt, row, labels in _lines(file) if file.suffix.lower() == ".jsonl" else _rows(file, left):
                are_there(row, [*labels])
                self.ties += not labels
                self.rows += [(row, column) for column in labels]
                self.prompts += [prompt] * len(labels)
                self.desirable += labels.values()
        good = sum(self.desirable)
        if not 0 < good < len(self):
            raise ValueError(
                f"data={data} holds {good} desirable and {len(self) - good} undesirable images, and some of "
                "each are needed; add some (algo=sft learns from good images alone)"
            )
        left.add("tied", count=self.ties)
        left.say(data, len(self.rows), "images and pairs")
        each_is_whole(data, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, k: int, size: tuple[int, int]) -> Tensor:
        """Image k, [3, height, width] in [0, 1], resized (bicubic, antialiased) and cut to the middle.

        Raises:
            ValueError: if it cannot be read.
        """
        row, column = self.rows[k]
        return image(row, column, size, self.background)

    def examples(self) -> Iterator[tuple[Any, ...]]:
        """What each image is known by: prompt, image, label."""
        return (
            (row["caption"], row[column], good)
            for (row, column), good in zip(self.rows, self.desirable, strict=True)
        )


def labelled(data: str, background: str | None = None) -> LabelledImages:
    """`LabelledImages`, read once however often a configuration is checked, and again if a table changed."""
    return _read(data, background, changes(data))


@lru_cache(maxsize=1)
def _read(data: str, background: str | None, _tables: tuple[tuple[str, int], ...]) -> LabelledImages:
    return LabelledImages(data, background)


Labels = tuple[str, dict[str, Any], dict[str, bool]]
"""A prompt, a row, and the labels of its columns of images: of two for a pair, of none for a tie."""


def _lines(file: Path) -> Iterator[Labels]:
    for k, said in objects(file):
        if isinstance(said, dict) and "winner" in said:
            yield _both(pair_of_line(file, k, said))
            continue
        if not isinstance(said, dict) or not all(
            isinstance(said.get(key), str) for key in ("prompt", "image")
        ):
            raise ValueError(
                f"data: line {k + 1} of {file} is no object with the texts prompt and image, or prompt, "
                "winner and loser; mend or remove it"
            )
        row = {"image": said["image"], "caption": said["prompt"], "label": said.get("label"), "_table": file}
        yield caption_of(k, row), row, {"image": _label(k, row)}


def _rows(file: Path, left: LeftOut) -> Iterator[Labels]:
    rows = read_table(str(file), needs="labelled images", columns=["caption"])
    if all(column in rows[0] for column in PAIR):
        yield from map(_both, pairs_of_rows(rows, left))
        return
    missing = [column for column in ("image", "label") if column not in rows[0]]
    if missing:
        raise ValueError(
            f"data: {file} has no column {', '.join(missing)}; labelled images need caption, image and "
            f"label, and pairs {', '.join(PAIR)}"
        )
    yield from ((caption_of(k, row), row, {"image": _label(k, row)}) for k, row in enumerate(rows))


def _both(told: Told) -> Labels:
    return told.prompt, told.row, {} if told.tie else dict(zip(told.ordered, (True, False), strict=True))


def _label(k: int, row: dict[str, Any]) -> bool:
    label = LABELS.get(str(row["label"]).strip().lower())
    if label is None:
        raise ValueError(
            f"data: label={row['label']!r} in row {k + 1} of {row['_table']} is not true, false, 1 or 0; "
            "mend or remove it"
        )
    return label

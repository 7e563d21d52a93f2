"""Pairs of images of one prompt: what DPO trains on, the better one first, and what a preference model is
fitted on.

    .jsonl            {"prompt": ..., "winner": PATH, "loser": PATH} a line, whatever else it holds; paths are
                      relative to the file
    .csv, .parquet    caption, jpg_0, jpg_1, label_0: a table (judgements.py)

`data` may name one such file or a folder with several (alignlab.make_pairs writes one). DPO learns nothing
from a tie (label_0 = 0.5, or a line of .jsonl that names the same file twice): there ties are counted and
left out. So are rows of a table without a label, or with labels that contradict each other.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from alignlab.data.judgements import (
    PAIR,
    are_there,
    are_whole,
    caption_of,
    choice,
    image,
    read_table,
    tables_of,
    unusable,
)
from alignlab.data.left_out import LeftOut
from alignlab.data.pictures import colour

TABLES = (".jsonl", ".csv", ".parquet")
BESIDE = ("candidates.jsonl", "labels.jsonl")
"""What alignlab.make_pairs writes beside its pairs, and is none."""


class Preferences:
    """The pairs that have a winner. Rows are kept in memory, and images that lie in files of their own are
    read when they are asked for.

    Args:
        data: a .jsonl, .csv or .parquet file, or a folder with some.
        background: the colour behind what is transparent; None is white.

    Raises:
        ValueError: if there is none, it cannot be read, holds no pair with a winner, or a broken picture.
    """

    def __init__(self, data: str, background: str | None = None) -> None:
        colour(background)
        self.background, left = background, LeftOut()
        self.rows: list[tuple[dict[str, Any], str, str]] = []
        """A row, and its columns of the winner and of the loser."""
        self.prompts: list[str] = []
        self.ties = 0
        for file in given(data, of="pairs"):
            for told in pairs_of(file, left):
                if told.tie:
                    self.ties += 1
                else:
                    are_there(told.row, told.ordered)
                    self.rows.append((told.row, *told.ordered))
                    self.prompts.append(told.prompt)
        if not self.rows:
            others = f"; left out: {left}" if len(left) else ""
            raise ValueError(f"data={data} holds no pair with a winner ({self.ties} ties{others}); give some")
        left.add("tied", count=self.ties)
        left.say(data, len(self.rows), "pairs")
        each_is_whole(data, [(row, column) for row, *columns in self.rows for column in columns])

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, k: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Winner and loser of pair k, [3, height, width] in [0, 1] each, resized (bicubic, antialiased) and
        cut to the middle.

        Raises:
            ValueError: if one cannot be read.
        """
        row, winner, loser = self.rows[k]
        return image(row, winner, size, self.background), image(row, loser, size, self.background)

    def examples(self) -> Iterator[tuple[Any, ...]]:
        """What each pair is known by: prompt, winner, loser."""
        return ((row["caption"], row[winner], row[loser]) for row, winner, loser in self.rows)


class Choices(Dataset[tuple[Tensor, Tensor, str, float]]):
    """Two images of one prompt, and how often the first was chosen: 0, 0.5 or 1. What a preference model is
    fitted on.

    Args:
        data: a .jsonl, .csv or .parquet file, or a folder with some.
        size: (height, width) to which images are resized.
        background: the colour behind what is transparent; None is white.

    Raises:
        ValueError: if there is none, it cannot be read, or holds a broken picture.
    """

    def __init__(self, data: str, size: tuple[int, int], background: str | None = None) -> None:
        colour(background)
        self.size, self.background, left = size, background, LeftOut()
        self.rows: list[tuple[dict[str, Any], str, str, float]] = []
        """A row, its columns of the two images, and its label."""
        for file in given(data, of="pairs"):
            for _, row, first, second, label in pairs_of(file, left):
                are_there(row, (first, second))
                self.rows.append((row, first, second, label))
        if not self.rows:
            others = f" with a label (left out: {left})" if len(left) else ""
            raise ValueError(f"data={data} holds no rows{others}; give a table of pairs")
        left.say(data, len(self.rows), "pairs")
        each_is_whole(data, [(row, column) for row, *columns, _ in self.rows for column in columns])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, str, float]:
        row, first, second, label = self.rows[k]
        images = (image(row, column, self.size, self.background) for column in (first, second))
        return next(images), next(images), row["caption"], label


def preferences(data: str, background: str | None = None) -> Preferences:
    """`Preferences`, read once however often a configuration is checked, and again if a table changed."""
    return _read(data, background, changes(data))


def each_is_whole(data: str, pictures: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Looks at pictures (row, column) before a run, once at each file however many rows name it.

    Raises:
        ValueError: if one is broken.
    """
    files = {
        (row["_table"], row[column]): (row, column)
        for row, column in pictures
        if isinstance(row[column], str)
    }
    every = [
        *files.values(),
        *((row, column) for row, column in pictures if not isinstance(row[column], str)),
    ]
    are_whole(data, len(every), every.__getitem__)


def given(data: str, *, of: str) -> list[Path]:
    """The file that `data` names, or those of the folder.

    Raises:
        ValueError: if there is none.
    """
    path = Path(data)
    files = tables(path) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix.lower() in TABLES for file in files):
        raise ValueError(
            f"data={data}: there is no .jsonl, .csv or .parquet file of {of} there; give one, or a folder "
            "with one"
        )
    return files


def changes(data: str) -> tuple[tuple[str, int], ...]:
    """The same files, as far as they are there, each with the time when it last changed."""
    path = Path(data).absolute()
    files = tables(path) if path.is_dir() else [path] if path.is_file() else []
    return tuple((str(file), file.stat().st_mtime_ns) for file in files if file.suffix.lower() in TABLES)


def tables(folder: Path) -> list[Path]:
    """The files of a folder that may hold pairs."""
    beside = BESIDE if (folder / "make_pairs.yaml").is_file() else ()
    return [path for path in tables_of(folder, TABLES) if path.name not in beside]


@lru_cache(maxsize=1)
def _read(data: str, background: str | None, _tables: tuple[tuple[str, int], ...]) -> Preferences:
    return Preferences(data, background)


def objects(file: Path, *, torn: bool = False) -> Iterator[tuple[int, Any]]:
    """What stands in the lines of a .jsonl file, with their numbers, from 0; empty ones are passed over.

    Args:
        torn: a last line without an end is passed over too: a killed process was writing it.

    Raises:
        ValueError: for the first that is no JSON, or a file that is no text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {file} cannot be read as UTF-8 text: {error}") from None
    for k, line in enumerate(lines[:-1] if torn else lines):
        if not line.strip():
            continue
        try:
            yield k, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                error.msg
                if isinstance(error, json.JSONDecodeError)
                else "it is nested too deeply, or a number too long"
            )
            raise ValueError(
                f"data: line {k + 1} of {file} is no JSON ({reason}); mend or remove it"
            ) from None


class Told(NamedTuple):
    """What a line or a row says of two images."""

    prompt: str
    row: dict[str, Any]
    first: str
    """Its column of the first image, as is `second` of the second."""
    second: str
    label: float
    """How often the first was chosen: 0, 0.5 or 1."""

    @property
    def tie(self) -> bool:
        return self.label == 0.5

    @property
    def ordered(self) -> tuple[str, str]:
        """The columns of the winner and of the loser."""
        return (self.first, self.second) if self.label == 1 else (self.second, self.first)


def pairs_of(file: Path, left: LeftOut) -> Iterator[Told]:
    """What a file of pairs says. Rows whose label does not count go to `left`.

    Raises:
        ValueError: if it cannot be read, or holds something else.
    """
    if file.suffix.lower() == ".jsonl":
        yield from (pair_of_line(file, k, said) for k, said in objects(file))
    else:
        yield from pairs_of_rows(read_table(str(file), needs="pairs", columns=PAIR), left)


def pairs_of_rows(rows: Sequence[dict[str, Any]], left: LeftOut) -> Iterator[Told]:
    """What the rows of a table with the columns of a pair say. Those whose label does not count go to `left`.

    Raises:
        ValueError: if one is no pair.
    """
    for k, row in enumerate(rows):
        why = unusable(row)
        if why is None:
            yield Told(caption_of(k, row), row, "jpg_0", "jpg_1", choice(k, row))
        else:
            left.add(why, f"row {k + 1} of {row['_table'].name}")


def pair_of_line(file: Path, k: int, said: Any) -> Told:
    """What line k of a .jsonl file says.

    Raises:
        ValueError: if it is no pair.
    """
    if not isinstance(said, dict) or not all(
        isinstance(said.get(key), str) for key in ("prompt", "winner", "loser")
    ):
        raise ValueError(
            f"data: line {k + 1} of {file} is no object with the texts prompt, winner and loser; mend or "
            "remove it"
        )
    row = {"winner": said["winner"], "loser": said["loser"], "caption": said["prompt"], "_table": file}
    return Told(caption_of(k, row), row, "winner", "loser", 0.5 if said["winner"] == said["loser"] else 1.0)

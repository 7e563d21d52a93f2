"""Pictures with captions: what supervised fine-tuning trains on.

    a folder      metadata.jsonl or metadata.csv with file_name and text (or caption, prompt), as diffusers and `datasets` take one;
                  or NAME.png (.jpg, .webp, ...) beside NAME.txt
    .tar          webdataset's shards, or a folder with some (shards.py)
    pairs         .jsonl, .csv or .parquet (preferences.py): the winners; ties are counted and left out
    datasets      owner/name of the Hugging Face hub, a folder of .parquet files, or one that `save_to_disk` wrote (hub.py)

A folder may have its splits as folders within it (train/, test/). Paths lead to pictures below their table's folder, and pictures are
bounded (judgements.py).
"""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.data.hub import Table, is_saved, opened
from alignlab.data.judgements import PAIR, are_there, caption_of, image, read_table
from alignlab.data.preferences import Preferences, objects, tables
from alignlab.data.shards import PICTURES, Member, members

IMAGES = ("file_name", "image", "image_path", "jpg", "png")
"""Names of the picture's column, in the order in which they are looked for."""
CAPTIONS = ("text", "caption", "prompt")
"""Of the caption's."""


@dataclass(frozen=True)
class Captioned:
    """One example."""

    key: str
    """Its name within the data, the same in every run, and that of no other example."""
    caption: str
    row: Callable[[], dict[str, Any]] = field(repr=False, compare=False)
    """Reads {"image": a path or bytes, "_table": the file that says so}."""

    def image(self, size: tuple[int, int]) -> Tensor:
        """[3, height, width] in [0, 1], resized (bicubic, antialiased) and cut to the middle.

        Raises:
            ValueError: if it cannot be read.
        """
        return image(self.row(), "image", size)


@dataclass(frozen=True)
class Known:
    """Examples whose number is known."""

    captions: Sequence[str]
    keys: Sequence[str]
    row: Callable[[int], dict[str, Any]]
    ties: int = 0

    @cached_property
    def digest(self) -> str:
        return _digest(zip(self.keys, self.captions, strict=True))

    def __getitem__(self, k: int) -> Captioned:
        return Captioned(self.keys[k], self.captions[k], lambda: self.row(k))


Stream = Callable[[int], Iterator[Captioned]]
"""The examples from the k-th on, once."""


class CaptionedImages:
    """Examples in shuffled passes.

    Args:
        data: a file, a folder, or the name of a dataset on the hub.
        split: of a dataset, or the folder's of that name, if there is one.
        image_column, caption_column: of a table or dataset; None looks for the usual names.
        streaming: read in order instead of knowing all examples at once, for shards and datasets.
        shuffle_buffer: examples of a stream that are read at once, and shuffled among themselves.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """

    def __init__(
        self, data: str, *, split: str = "train", image_column: str | None = None, caption_column: str | None = None,
        streaming: bool = False, shuffle_buffer: int = 1000,
    ) -> None:  # fmt: skip
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1")
        how = (data, split, image_column, caption_column)
        self._source = _stream(*how) if streaming else _known(*how, _stamps(data))
        self.data, self.shuffle_buffer = data, shuffle_buffer
        self._left: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """What the pass (of a stream, the window) has yet to give, in order."""
        self._window: list[Captioned] = []
        self._start = 0
        """Where in its pass the window begins."""
        self._coming: Iterator[Captioned] | None = None

    @property
    def prompts(self) -> Sequence[str]:
        """The captions, where they are known; of a stream, none."""
        return self._source.captions if isinstance(self._source, Known) else ()

    @property
    def size(self) -> int | None:
        """How many examples there are; None for a stream."""
        return len(self._source.captions) if isinstance(self._source, Known) else None

    @property
    def ties(self) -> int:
        """Pairs without a winner, which are left out."""
        return self._source.ties if isinstance(self._source, Known) else 0

    def draw(self, n: int, seed: int) -> list[Captioned]:
        """The next n examples of shuffled passes, in each of which every example comes once. `seed` shuffles the passes that begin
        within this draw: what comes is a pure function of the state before and the seeds.

        Raises:
            ValueError: if a stream ends, or holds what is no example.
        """
        rng, found = np.random.default_rng(seed), list[Captioned]()
        while len(found) < n:
            if not len(self._left):
                self._left = rng.permutation(self._next())
            chosen, self._left = self._left[: n - len(found)], self._left[n - len(found) :]
            source = self._source if isinstance(self._source, Known) else self._window
            found += [source[int(k)] for k in chosen]
        return found

    def _next(self) -> int:
        """How many examples the next pass, or the next window of a stream, has."""
        if isinstance(self._source, Known):
            return len(self._source.captions)
        self._start += len(self._window)
        self._window = self._read(self._start)
        if not self._window and self._start:
            self._start, self._coming = 0, None
            self._window = self._read(0)
        if not self._window:
            raise ValueError(f"data={self.data} holds no example")
        return len(self._window)

    def _read(self, start: int) -> list[Captioned]:
        assert not isinstance(self._source, Known)
        self._coming = self._source(start) if self._coming is None else self._coming
        return list(islice(self._coming, self.shuffle_buffer))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        begun = bool(self._window)
        return {"left": torch.from_numpy(self._left.copy()), "start": self._start, "begun": begun, "seen": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another was. A stream is read again up to there.

        Raises:
            ValueError: if its data were others.
        """
        if not isinstance(self._source, Known):
            self._start, self._coming = state["start"], None
            self._window = self._read(self._start) if state["begun"] else []
        if self._digest() != state["seen"]:
            raise ValueError(
                f"data={self.data} holds other examples than the run began with; give it the same ones, or start anew"
            )
        self._left = state["left"].numpy().copy()

    def _digest(self) -> str:
        """Of the examples that `left` counts."""
        return self._source.digest if isinstance(self._source, Known) else _digest((e.key, e.caption) for e in self._window)


def _digest(examples: Iterable[tuple[str, str]]) -> str:
    """Of keys and captions."""
    digest = hashlib.blake2b(digest_size=16)
    for key, caption in examples:
        digest.update(f"{key}\0{caption}\0".encode())
    return digest.hexdigest()


def captioned(data: str, **how: Any) -> CaptionedImages:
    """`CaptionedImages` at its beginning; what it reads is read once however often a configuration is checked, and again if a file
    changed."""
    return CaptionedImages(data, **how)


# -- where examples come from


def _stamps(data: str) -> tuple[tuple[str, int], ...]:
    """The files that say what there is, with their times."""
    path = Path(data).absolute()
    files = [path, *(p for p in path.rglob("*") if p.suffix.lower().lstrip(".") not in PICTURES)] if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(files) if file.exists())


@lru_cache(maxsize=2)
def _known(data: str, split: str, image_column: str | None, caption_column: str | None, _files: object) -> Known:
    """All examples.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path, columns = (
        _split(data, split),
        ([image_column] if image_column else IMAGES, [caption_column] if caption_column else CAPTIONS),
    )
    shards = _shards(path)
    if shards:
        found = _of_members([m for shard in shards for m in members(shard, columns[1])])
    elif is_saved(path) or not path.exists():
        found = _of_table(opened(data, split), columns)
    else:
        listed = _tables(path)
        if any(_is_pairs(table) for table in listed):
            found = _winners(path)
        elif any(table.suffix == ".parquet" for table in listed):
            found = _of_table(opened(data, split, files=[t for t in listed if t.suffix == ".parquet"]), columns)
        elif listed:
            found = _of_rows([row for table in listed for row in _rows(table, columns)])
        else:
            found = _of_rows(list(_beside(path)))
    if not found.captions:
        raise ValueError(
            f"data={data} holds no picture with a caption; give a folder with metadata.jsonl (file_name, text) or with NAME.png beside "
            "NAME.txt, shards (.tar), a table of pairs, or owner/name of a dataset"
        )
    return found


def _stream(data: str, split: str, image_column: str | None, caption_column: str | None) -> Stream:
    """The same in order, for what can be long.

    Raises:
        ValueError: if it is something else, or its first example is none.
    """
    path, columns = (
        _split(data, split),
        ([image_column] if image_column else IMAGES, [caption_column] if caption_column else CAPTIONS),
    )
    shards = _shards(path)
    whole = bool(shards) or is_saved(path) or not path.exists()
    listed = [] if whole else [t for t in _tables(path) if t.suffix == ".parquet"]
    if shards:

        def examples(start: int) -> Iterator[Captioned]:
            every = (member for shard in shards for member in members(shard, columns[1]))
            return (_example(member) for member in islice(every, start, None))

    elif listed or whole:
        table = opened(data, split, files=listed, streaming=True)
        names = table.named(*columns)

        def examples(start: int) -> Iterator[Captioned]:
            for k, row in enumerate(table.rows(*names, start), start):
                yield Captioned(str(k), caption_of(k, row), lambda row=row: row)  # type: ignore[misc]

    else:
        raise ValueError(
            f"streaming=true is for shards (.tar), .parquet files and datasets, and data={data} is none; set it to false"
        )
    if next(examples(0), None) is None:
        raise ValueError(f"data={data} holds no picture with a caption")
    return examples


def _split(data: str, split: str) -> Path:
    """The folder of the split.

    Raises:
        ValueError: if it is asked for, and not there.
    """
    path = Path(data)
    if path.is_dir() and not is_saved(path):
        if (path / split).is_dir() and split not in ("", ".", ".."):
            return path / split
        if split != "train":
            raise ValueError(
                f"split={split}, but there is no folder of that name in data={data}; leave split at train for all of it"
            )
    return path


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" and path.is_file() else []


def _tables(path: Path) -> list[Path]:
    """metadata.jsonl or metadata.csv, or whatever tables there are.

    Raises:
        ValueError: for a file that is none.
    """
    if path.is_file():
        if path.suffix not in (".jsonl", ".csv", ".parquet"):
            raise ValueError(f"data={path} is no .jsonl, .csv, .parquet or .tar file; give one, or a folder")
        return [path]
    metadata = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
    return metadata[:1] or tables(path)


def _is_pairs(table: Path) -> bool:
    """By its columns."""
    if table.suffix == ".jsonl":
        first = next((said for _, said in objects(table)), None)
        return isinstance(first, dict) and {"winner", "loser"} <= first.keys()
    if table.suffix == ".csv":
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            return {*PAIR} <= {*next(csv.reader(file), [])}
    return {*PAIR} <= {*opened(str(table), "train", files=[table], streaming=True).columns}


def _winners(path: Path) -> Known:
    pairs = Preferences(str(path))

    def row(k: int) -> dict[str, Any]:
        its, winner, _ = pairs.rows[k]
        return {"image": its[winner], "_table": its["_table"]}

    return Known(captions=pairs.prompts, keys=[f"pair {k}" for k in range(len(pairs))], row=row, ties=pairs.ties)


def _rows(table: Path, columns: tuple[Sequence[str], Sequence[str]]) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl or .csv table of pictures."""
    if table.suffix == ".jsonl":
        found = list(objects(table))
    else:
        found = list(enumerate(read_table(str(table), needs="captioned pictures", columns=())))
    for k, said in found:
        names = [next((name for name in wanted if isinstance(said, dict) and name in said), None) for wanted in columns]
        if None in names:
            missing = columns[names.index(None)]
            raise ValueError(f"data: row {k + 1} of {table} has no {' or '.join(missing)}; mend or remove it, or name its column")
        row = {"image": said[names[0]], "caption": said[names[1]], "_table": table}
        if not isinstance(row["image"], str):
            raise ValueError(f"data: {names[0]}={row['image']!r} in row {k + 1} of {table} is no path; mend or remove it")
        caption_of(k, row)
        are_there(row, ["image"])
        yield row


def _beside(folder: Path) -> Iterator[dict[str, Any]]:
    """Pictures with a text of the same name."""
    for picture in sorted(p for p in folder.glob("*") if p.suffix.lower().lstrip(".") in PICTURES):
        text = picture.with_suffix(".txt")
        if text.is_file():
            try:
                caption = text.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"data: {text} cannot be read as UTF-8 text: {error}") from None
            row = {"image": picture.name, "caption": caption, "_table": text}
            caption_of(0, row)
            yield row


def _of_rows(rows: list[dict[str, Any]]) -> Known:
    keys = [row["image"] for row in rows]
    if len({*keys}) < len(keys):  # a picture with several captions
        keys = [f"{key} {k}" for k, key in enumerate(keys)]
    return Known(captions=[row["caption"] for row in rows], keys=keys, row=lambda k: rows[k])


def _of_members(found: list[Member]) -> Known:
    examples = [_example(member) for member in found]
    return Known(captions=[e.caption for e in examples], keys=[e.key for e in examples], row=lambda k: examples[k].row())


def _example(member: Member) -> Captioned:
    caption_of(0, {"caption": member.caption, "_table": f"{member.shard} ({member.name})"})
    key = f"{member.shard.name}:{member.offset}"  # a shard may hold two of one name
    return Captioned(key, member.caption, lambda: {"image": member.read(), "_table": f"{member.shard} ({member.name})"})


def _of_table(table: Table, columns: tuple[Sequence[str], Sequence[str]]) -> Known:
    names = table.named(*columns)
    captions = table.captions(names[1])
    for k, caption in enumerate(captions):
        caption_of(k, {"caption": caption, "_table": table.name})
    return Known(captions=captions, keys=[str(k) for k in range(len(captions))], row=lambda k: table.row(*names, k))

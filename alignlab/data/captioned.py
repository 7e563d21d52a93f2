"""Pictures with captions: what supervised fine-tuning trains on.

    a folder      metadata.jsonl, .csv or .parquet with file_name and text (or caption, prompt), as diffusers
                  and `datasets` take one; or NAME.png (.jpg, .webp, ...) beside NAME.txt (folders.py)
    .tar          webdataset's shards, or a folder with some (shards.py)
    pairs         .jsonl, .csv or .parquet (preferences.py): the winners; ties are counted and left out
    datasets      owner/name of the Hugging Face hub, a folder of .parquet files, or one that
                  `save_to_disk` wrote (hub.py)

A folder may have its splits as folders within it (train/, test/), or as files (train-00000.parquet). Paths
lead to pictures below their table's folder. All pictures are looked at before a run (pictures.py), and what
is left out is counted and said.
"""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.data.folders import Columns, is_of_paths, metadata_in, of_split, rows_of, texts_beside, unnamed
from alignlab.data.hub import Table, is_saved, opened
from alignlab.data.judgements import PAIR, are_whole, caption_of, image, tables_of
from alignlab.data.left_out import LeftOut
from alignlab.data.pictures import colour
from alignlab.data.preferences import TABLES, Preferences, objects, tables
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
    """Reads {"image": a path, bytes or a span, "_table": the file that says so}."""
    background: str | None = field(default=None, repr=False, compare=False)

    def image(self, size: tuple[int, int]) -> Tensor:
        """[3, height, width] in [0, 1], as a viewer shows it, resized (bicubic, antialiased) and cut to the
        middle.

        Raises:
            ValueError: if it cannot be read.
        """
        return image(self.row(), "image", size, self.background)


@dataclass(frozen=True)
class Known:
    """Examples whose number is known."""

    captions: Sequence[str]
    keys: Sequence[str]
    row: Callable[[int], dict[str, Any]]
    ties: int = 0
    looked: bool = False
    """Whether the pictures were looked at."""

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
        background: the colour behind what is transparent; None is white.

    Raises:
        ValueError: if there is none, it cannot be read, or a picture is broken (of a stream, the first).
    """

    def __init__(
        self,
        data: str,
        *,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        background: str | None = None,
    ) -> None:
        colour(background)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1")
        how = (data, split, image_column, caption_column)
        self._source = _stream(*how) if streaming else _known(*how, _stamps(data))
        self.data, self.shuffle_buffer, self.background = data, shuffle_buffer, background
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
        """The next n examples of shuffled passes, in each of which every example comes once. `seed` shuffles
        the passes that begin within this draw: what comes is a pure function of the state before and the
        seeds.

        Raises:
            ValueError: if a stream ends, or holds what is no example.
        """
        rng, examples = np.random.default_rng(seed), list[Captioned]()
        while len(examples) < n:
            if not len(self._left):
                self._left = rng.permutation(self._next())
            chosen, self._left = self._left[: n - len(examples)], self._left[n - len(examples) :]
            source = self._source if isinstance(self._source, Known) else self._window
            examples += [source[int(k)] for k in chosen]
        return [replace(example, background=self.background) for example in examples]

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
        return {
            "left": torch.from_numpy(self._left.copy()),
            "start": self._start,
            "begun": begun,
            "seen": self._digest(),
        }

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
                f"data={self.data} holds other examples than the run began with; give it the same ones, or "
                "start anew"
            )
        self._left = state["left"].numpy().copy()

    def _digest(self) -> str:
        """Of the examples that `left` counts."""
        return (
            self._source.digest
            if isinstance(self._source, Known)
            else _digest((e.key, e.caption) for e in self._window)
        )


def _digest(examples: Iterable[tuple[str, str]]) -> str:
    """Of keys and captions."""
    digest = hashlib.blake2b(digest_size=16)
    for key, caption in examples:
        digest.update(f"{key}\0{caption}\0".encode())
    return digest.hexdigest()


def captioned(data: str, **how: Any) -> CaptionedImages:
    """`CaptionedImages` at its beginning; what it reads is read once however often a configuration is
    checked, and again if a file changed."""
    return CaptionedImages(data, **how)


# -- where examples come from


def _stamps(data: str) -> tuple[tuple[str, int], ...]:
    """The files that say what there is, with their times."""
    path = Path(data).absolute()
    files = (
        [path, *(p for p in path.rglob("*") if p.suffix.lower().lstrip(".") not in PICTURES)]
        if path.is_dir()
        else [path]
    )
    return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(files) if file.exists())


@lru_cache(maxsize=2)
def _known(
    data: str, split: str, image_column: str | None, caption_column: str | None, _files: object
) -> Known:
    """All examples.

    Raises:
        ValueError: if there is none, it cannot be read, or a picture is broken.
    """
    columns, left = _columns(image_column, caption_column), LeftOut()
    known = _examples(data, split, columns, left)
    count = len(known.captions)
    if not count:
        others = f" (left out: {left})" if len(left) else ""
        raise ValueError(
            f"data={data} holds no picture with a caption{others}; give a folder with metadata.jsonl "
            "(file_name, text) or with NAME.png "
            "beside NAME.txt, uncompressed shards (.tar), a table of pairs, or owner/name of a dataset"
        )
    empty = sum(not caption.strip() for caption in known.captions)
    if empty:
        left.note(f"{empty} of {count} captions are empty, and train the model without a prompt")
    left.say(data, count, "pictures")
    if not known.looked:
        are_whole(data, count, lambda k: (known.row(k), "image"))
    return known


def _columns(image_column: str | None, caption_column: str | None) -> Columns:
    return [image_column] if image_column else IMAGES, [caption_column] if caption_column else CAPTIONS


def _examples(data: str, split: str, columns: Columns, left: LeftOut) -> Known:
    """What `data` holds, in the first of the forms that it has."""
    path = _split(data, split)
    if shards := _shards(path, split, left):
        return _of_members([m for shard in shards for m in members(shard, columns[1], left)])
    if is_saved(path) or not path.exists():
        return _of_table(opened(data, split), columns, left)
    listed = _tables(path, split, left)
    if any(map(_is_pairs, listed)):
        return _winners(path)
    if inside := _with_pictures_inside(listed, columns):
        for table in listed:
            if table not in inside:
                left.note(f"{table.name} is not read, since {inside[0].name} holds the pictures")
        return _of_table(opened(data, split, files=inside), columns, left)
    if listed:
        rows = [row for table in listed for row in rows_of(table, columns, left)]
        if metadata_in(path):
            unnamed(listed[0], rows, left)
        return _of_rows(rows)
    rows = texts_beside(path, columns, left)
    above = metadata_in(Path(data)) if path != Path(data) else []
    if rows and above:
        left.note(f"{above[0].name} is not read, since texts lie beside the pictures of {path.name}/")
    if not rows and above:
        left.forget()
        rows = list(rows_of(above[0], columns, left, split=split))
        unnamed(above[0], rows, left, split=split)
    return _of_rows(rows)


def _stream(data: str, split: str, image_column: str | None, caption_column: str | None) -> Stream:
    """The same in order, for what can be long.

    Raises:
        ValueError: if it is something else, or its first example is none.
    """
    path, columns, left = _split(data, split), _columns(image_column, caption_column), LeftOut()
    shards = _shards(path, split, left)
    whole = bool(shards) or is_saved(path) or not path.exists()
    inside = [] if whole else _with_pictures_inside(_tables(path, split, left), columns)
    if shards:

        def examples(start: int) -> Iterator[Captioned]:
            out, count = LeftOut(), 0
            for member in chain.from_iterable(members(shard, columns[1], out) for shard in shards):
                count += 1
                if count > start:
                    yield _example(member)
            if not start:
                out.say(data, count, "pictures")

    elif whole or inside:
        table = opened(data, split, files=inside, streaming=True)
        names = table.named(*columns)

        def examples(start: int) -> Iterator[Captioned]:
            for k, row in enumerate(table.rows(*names, start), start):
                yield Captioned(str(k), caption_of(k, row), lambda row=row: row)  # type: ignore[misc]

    else:
        raise ValueError(
            "streaming=true is for shards (.tar), and for .parquet files and datasets with the pictures "
            f"inside, and data={data} is none; set it to false"
        )
    first = next(examples(0), None)
    if first is None:
        raise ValueError(f"data={data} holds no picture with a caption")
    left.say(data, 0, "pictures")
    are_whole(data, 1, lambda _: (first.row(), "image"))
    return examples


def _split(data: str, split: str) -> Path:
    """The folder of the split.

    Raises:
        ValueError: if it is asked for, and not there.
    """
    path = Path(data)
    if path.is_dir() and not is_saved(path):
        if split not in ("", ".", "..") and (path / split).is_dir():
            return path / split
        parquets = path / "data"  # of a dataset of the hub, as it is downloaded
        if (
            parquets.is_dir()
            and tables_of(parquets, (".parquet",))
            and not tables_of(path, (*TABLES, ".tar"))
        ):
            return parquets
        if split != "train" and not tables_of(path, (".parquet", ".tar")):
            raise ValueError(
                f"split={split}, but there is no folder of that name in data={data}; leave split at train "
                "for all of it"
            )
    return path


def _shards(path: Path, split: str, left: LeftOut) -> list[Path]:
    if path.is_dir():
        return of_split(tables_of(path, (".tar",)), split, left)
    return [path] if path.suffix.lower() == ".tar" and path.is_file() else []


def _tables(path: Path, split: str, left: LeftOut) -> list[Path]:
    """metadata.jsonl, .csv or .parquet, or whatever tables there are.

    Raises:
        ValueError: for a file that is none.
    """
    if path.is_file():
        if path.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
            raise ValueError(f"data={path} is no .jsonl, .csv, .parquet or .tar file; give one, or a folder")
        return [path]
    metadata = metadata_in(path)
    for other in metadata[1:]:
        left.note(f"{other.name} is not read, since {metadata[0].name} is there")
    listed = [table for table in tables(path) if not _is_about_a_folder(table)]
    return metadata[:1] or of_split(listed, split, left)


def _with_pictures_inside(listed: list[Path], columns: Columns) -> list[Path]:
    return [
        table for table in listed if table.suffix.lower() == ".parquet" and not is_of_paths(table, columns)
    ]


def _is_about_a_folder(table: Path) -> bool:
    """Whether it is the 00000.parquet that img2dataset writes beside the folder 00000/ with pictures and
    captions."""
    return table.suffix == ".parquet" and table.stem.isdigit() and table.with_suffix("").is_dir()


def _is_pairs(table: Path) -> bool:
    """By its columns."""
    if table.suffix.lower() == ".jsonl":
        first = next((said for _, said in objects(table)), None)
        return isinstance(first, dict) and {"winner", "loser"} <= first.keys()
    if table.suffix.lower() == ".csv":
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            return {*PAIR} <= {*next(csv.reader(file), [])}
    return {*PAIR} <= {*opened(str(table), "train", files=[table], streaming=True).columns}


def _winners(path: Path) -> Known:
    pairs = Preferences(str(path))

    def row(k: int) -> dict[str, Any]:
        pair, winner, _ = pairs.rows[k]
        return {"image": pair[winner], "_table": pair["_table"]}

    return Known(
        captions=pairs.prompts,
        keys=[f"pair {k}" for k in range(len(pairs))],
        row=row,
        ties=pairs.ties,
        looked=True,
    )


def _of_rows(rows: list[dict[str, Any]]) -> Known:
    keys = [row.get("key", row["image"]) for row in rows]
    if len({*keys}) < len(keys):  # a picture with several captions
        keys = [f"{key} {k}" for k, key in enumerate(keys)]
    return Known(captions=[row["caption"] for row in rows], keys=keys, row=lambda k: rows[k])


def _of_members(read: list[Member]) -> Known:
    examples = [_example(member) for member in read]
    return Known(
        captions=[e.caption for e in examples],
        keys=[e.key for e in examples],
        row=lambda k: examples[k].row(),
    )


def _example(member: Member) -> Captioned:
    picture = member.picture
    row = {"image": picture, "caption": member.caption, "_table": f"{picture.file} ({picture.name})"}
    caption_of(0, row)
    return Captioned(
        f"{picture.file.name}:{picture.offset}", member.caption, lambda: row
    )  # a shard may hold two of one name


def _of_table(table: Table, columns: Columns, left: LeftOut) -> Known:
    names = table.named(*columns)
    captions, filled = table.captions(names[1]), table.filled(names[0])
    left.add("without a picture", table.name, len(captions) - len(filled))
    captions = [captions[k] for k in filled]
    for k, caption in zip(filled, captions, strict=True):
        caption_of(k, {"caption": caption, "_table": table.name})
    return Known(captions=captions, keys=[str(k) for k in filled], row=lambda k: table.row(*names, filled[k]))

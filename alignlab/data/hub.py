"""Tables of pictures that the `datasets` library holds: of the Hugging Face hub, of .parquet files, or saved
to the disk.

Only parquet and arrow are read in this way, with the pictures' bytes inside. Its other readers would follow
paths and addresses that stand in a table, decompress without a bound, or unpickle; what the hub has in
another form can be downloaded, and its folder given.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

READERS = ("parquet", "arrow")
FILES = (".parquet", ".arrow", ".csv", ".jsonl", ".json", ".tar", ".txt", ".zip", ".gz")
"""Ends of names that mean a file."""


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


class Table:
    """A dataset, or a stream of its rows.

    Args:
        held: a `Dataset` or `IterableDataset`.
        name: for sentences.
    """

    def __init__(self, held: Any, name: str) -> None:
        self.held, self.name = held, name
        self.features = held.features or {}
        self.columns: list[str] = list(held.column_names or self.features)

    def named(self, images: Sequence[str], captions: Sequence[str]) -> tuple[str, str]:
        """The columns of pictures and captions: the first of these names that are there. A picture is also
        known by its type.

        From here on the table has no others: `datasets` decodes every column of a row that is read, follows
        the paths that stand in there, and knows no bounds. The picture stays as it is.

        Raises:
            ValueError: if one is not there, or holds something else.
        """
        by_type = [name for name, kind in self.features.items() if type(kind).__name__ == "Image"]
        usual = [name for name in images if name in self.columns]
        pictures = usual or (by_type if len(images) > 1 else [])
        texts = [name for name in captions if name in self.columns]
        for usable, wanted, key in ((pictures, images, "image_column"), (texts, captions, "caption_column")):
            if not usable:
                columns = f"its columns are {', '.join(self.columns)}"
                raise ValueError(
                    f"data={self.name} has no column {' or '.join(wanted)}; set {key}=NAME ({columns})"
                )
        if not usual and len(pictures) > 1:
            pair = "; pairs of pictures go in as a local table" if {"jpg_0", "jpg_1"} <= {*pictures} else ""
            raise ValueError(
                f"data={self.name} has several columns of pictures, {', '.join(pictures)}; set "
                f"image_column=NAME{pair}"
            )
        picture, text = pictures[0], texts[0]
        if not _is_text(self.features.get(text)):
            raise ValueError(
                f"data={self.name}: column {text} holds no texts; set caption_column=NAME to one that does"
            )
        if picture not in by_type and not _is_plain(self.features.get(picture)):
            raise ValueError(
                f"data={self.name}: column {picture} holds no pictures; set image_column=NAME to one that "
                "does"
            )
        self.held = self.held.select_columns(list(dict.fromkeys((picture, text))))
        if picture in by_type:
            from datasets import Image

            self.held = self.held.cast_column(picture, Image(decode=False))
        return picture, text

    def filled(self, picture: str) -> list[int]:
        """The rows of a dataset that have a picture: img2dataset writes a row without one for what it could
        not download."""
        if self.held._indices is not None:  # a selection; a row without a picture is refused when it is read
            return list(range(len(self.held)))
        column = self.held.data.column(picture)
        parts = column.flatten() if str(column.type).startswith("struct") else [column]
        return [
            k
            for k, row in enumerate(zip(*(part.is_valid().to_pylist() for part in parts), strict=True))
            if any(row)
        ]

    def captions(self, column: str) -> list[Any]:
        return list(self.held[column])

    def row(self, picture: str, text: str, k: int) -> dict[str, Any]:
        """{"image": bytes, "caption": ..., "_table": ...}

        Raises:
            ValueError: if it holds no bytes.
        """
        return self._row(self.held.select([k])[0], picture, text, k)

    def rows(self, picture: str, text: str, start: int) -> Iterator[dict[str, Any]]:
        """The same from row `start` on, of a stream.

        Raises:
            ValueError: also if it breaks off.
        """
        coming = iter(self.held.skip(start))
        for k in count(start):
            try:
                said = next(coming)
            except StopIteration:
                return
            except Exception as error:  # of many kinds, as in `opened`
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"data={self.name} cannot be read from row {k + 1} on: {reason}") from None
            yield self._row(said, picture, text, k)

    def _row(self, said: dict[str, Any], picture: str, text: str, k: int) -> dict[str, Any]:
        value = said[picture]
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(
                f"data: {picture} of row {k + 1} of {self.name} holds no picture (its file's bytes); "
                "download it, and give the folder"
            )
        return {"image": value, "caption": said[text], "_table": f"{self.name} (row {k + 1})"}


def _is_text(kind: Any) -> bool:
    """Whether a column of this type holds texts."""
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _is_plain(kind: Any) -> bool:
    """Whether `datasets` hands a column of this type on as it is: values, or structs of values."""
    return all(
        type(part).__name__ == "Value" for part in (kind.values() if isinstance(kind, dict) else [kind])
    )


def opened(data: str, split: str, *, files: Sequence[Path] = (), streaming: bool = False) -> Table:
    """A dataset of the hub by name, that of a folder which `save_to_disk` wrote, or that of .parquet files.

    Raises:
        ValueError: if there is none, or it cannot be loaded.
    """
    path = Path(data)
    name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", data) and path.suffix not in FILES
    if not files and not path.exists() and not name:
        raise ValueError(f"data={data} is no file and no folder here, and no name of a dataset (owner/name)")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data={data} needs the package datasets; pip install 'alignlab[data]'") from None
    try:
        if files:
            names = [str(file) for file in files]
            held = datasets.load_dataset("parquet", data_files=names, split="train", streaming=streaming)
        elif is_saved(path):
            held = datasets.load_from_disk(str(path if (path / "state.json").is_file() else path / split))
            held = held.to_iterable_dataset() if streaming else held
        else:
            kinds = [kind.__module__ for kind in type(datasets.load_dataset_builder(data)).__mro__]
            reader = next(
                (k.split(".")[2] for k in kinds if k.startswith("datasets.packaged_modules.")),
                "another reader",
            )
            if reader not in READERS:
                raise ValueError(
                    f"it is read by {reader}, and only {' and '.join(READERS)} are; download it, and give "
                    "the folder"
                )
            held = datasets.load_dataset(data, split=split, streaming=streaming)
    except Exception as error:  # of many kinds: the hub's, the file system's, the formats'
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"data={data}, split={split}, cannot be loaded: {reason}") from None
    return Table(held, data)

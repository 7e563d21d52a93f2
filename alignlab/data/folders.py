"""Finds captioned pictures in a folder: by a table that names them, or by texts that lie beside them.

    metadata.jsonl, .csv, .parquet   a table of names and captions. It may lie above the folder of the split,
                                     and then names pictures with the split (train/a.png) or without
    NAME.jpg, NAME.txt               a text beside the picture: .txt, .caption, or .json with a caption
    00000/, 10_cat/                  the same in folders within, if there is none at the top, as img2dataset
                                     and kohya's scripts lay them out

Names that macOS, Windows or a notebook left there (._a.png, Thumbs.db) are passed over. What is left out is
counted.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignlab.data.judgements import are_there, beside, caption_of, read_table, tables_of
from alignlab.data.left_out import LeftOut, of_the_system
from alignlab.data.preferences import objects
from alignlab.data.shards import PICTURES, TEXTS, UNREAD, caption_in

Row = dict[str, Any]
Columns = tuple[Sequence[str], Sequence[str]]
"""Names of the picture's column and of the caption's, in the order in which they are looked for."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Splits, and how the names of their files begin."""


def metadata_in(folder: Path) -> list[Path]:
    """The tables of a folder that are called metadata, the one that is read first."""
    names = {path.name.lower(): path for path in tables_of(folder, (".jsonl", ".csv", ".parquet"))}
    return [names[name] for name in METADATA if name in names]


def of_split(files: list[Path], split: str, left: LeftOut) -> list[Path]:
    """Of files called train-00000.parquet, test-00000.parquet ... those of the split.

    If their names do not speak of several splits, all of them are of train. In a folder of the split, all are
    of it.

    Raises:
        ValueError: if there is no file of that split.
    """
    of = {file: _split_of(file) for file in files}
    known = sorted({name for name in of.values() if name})
    wanted = next((name for name, begins in SPLITS.items() if split in begins), split)
    if not files or files[0].parent.name == split or (wanted == "train" and len(known) < 2):
        return files
    chosen = [file for file in files if (of[file] or "train") == wanted]
    if not chosen:
        has = f"are of the splits {', '.join(known)}" if known else "name no split"
        raise ValueError(
            f"split={split}, but the files in {files[0].parent} {has}; set split to one that is there"
        )
    for file in files:
        if file not in chosen:
            left.note(f"{file.name} belongs to another split than {split} and is not read")
    return chosen


def _split_of(file: Path) -> str | None:
    begin = re.match(r"[a-z]+(?=[-_.\d])", file.name.lower())
    return next((name for name, begins in SPLITS.items() if begin and begin[0] in begins), None)


# -- a table beside pictures


def is_of_paths(table: Path, columns: Columns) -> bool:
    """Whether a .parquet file has paths of pictures, where others have the pictures themselves."""
    try:
        import pyarrow.parquet

        schema = pyarrow.parquet.read_schema(table)
    except (ImportError, OSError, ValueError):  # said when it is opened
        return False
    names = [name for name in columns[0] if name in schema.names]
    return bool(names) and str(schema.field(names[0]).type) in ("string", "large_string", "string_view")


def rows_of(table: Path, columns: Columns, left: LeftOut, *, split: str | None = None) -> Iterator[Row]:
    """The rows of a .jsonl, .csv or .parquet table of pictures.

    Args:
        split: the table lies above this folder, and pictures in others are left out.

    Raises:
        ValueError: for the first that is none, or whose picture is not there.
    """
    if table.suffix.lower() == ".jsonl":
        every: list[tuple[int, Any]] = list(objects(table))
    else:
        every = list(enumerate(read_table(str(table), needs="captioned pictures", columns=())))
    for k, entry in every:
        names = [
            next((name for name in wanted if isinstance(entry, dict) and name in entry), None)
            for wanted in columns
        ]
        if None in names:
            missing = " or ".join(columns[names.index(None)])
            known = [name for name in entry if name != "_table"] if isinstance(entry, dict) else []
            has = f" (it has {', '.join(map(str, known))})" if known else ""
            mend = "mend or remove it, or name its column"
            raise ValueError(f"data: row {k + 1} of {table} has no {missing}{has}; {mend}")
        row = {"image": entry[names[0]], "caption": entry[names[1]], "_table": table}
        if not isinstance(row["image"], str):
            said = f"{names[0]}={row['image']!r} in row {k + 1} of {table}"
            raise ValueError(f"data: {said} is no path; mend or remove it")
        row["image"] = _meant(row, split)
        folder = _slashed(row["image"]).split("/")[0]
        if split is not None and folder != split:
            if not any(folder in begins for begins in SPLITS.values()):
                are_there(row, ["image"])
            left.add(f"outside of the split {split}", row["image"])
            continue
        caption_of(k, row)
        are_there(row, ["image"])
        yield row


def _meant(row: Row, split: str | None) -> str:
    """The path of a row's picture from its table.

    A table above the split's folder may leave the split out, and one within that folder may have it.
    """
    table, name = row["_table"], row["image"]
    others = [name, _slashed(name).removeprefix(f"{table.parent.name}/")]
    for other in [f"{split}/{_slashed(name)}", *others] if split else others:
        try:
            beside(table, other)
            return other
        except ValueError:
            pass
    return name


def _slashed(name: str) -> str:
    return name.replace("\\", "/")


def unnamed(table: Path, rows: Sequence[Row], left: LeftOut, *, split: str | None = None) -> None:
    """Counts the pictures in the folder that the rows of a metadata table do not name."""
    folder = table.parent
    named = {(folder / row["image"], folder / _slashed(row["image"])) for row in rows}
    known = {path for both in named for path in both}
    for path in sorted((folder / split if split else folder).rglob("*")):
        if (
            _kind(path) in PICTURES
            and path not in known
            and not of_the_system(path.relative_to(folder).as_posix())
        ):
            left.add(f"not named in {table.name}", path.relative_to(folder))


# -- texts beside pictures


def texts_beside(folder: Path, columns: Columns, left: LeftOut) -> list[Row]:
    """Pictures with a text of the same name: those of the folder, or, if there is none, of all folders
    within.

    Raises:
        ValueError: if a text cannot be read.
    """
    rows = list(_level(folder, folder, columns, left))
    within = list(_within(folder, {folder.resolve()}))
    if rows:
        for path in (
            picture for inner in within for picture in sorted(inner.iterdir()) if _kind(picture) in PICTURES
        ):
            if not of_the_system(path.name):
                left.add("in folders within", path.relative_to(folder))
        return rows
    for inner in within:
        rows += _level(inner, folder, columns, left)
    repeated = next((inner.name for inner in within if re.match(r"\d+_", inner.name)), None)
    if rows and repeated:
        left.note(
            f"the number in the folder's name {repeated} repeats nothing: every picture comes once a pass"
        )
    return rows


def _within(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All folders below, in order; a link that leads back is not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not of_the_system(path.name) and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path
            yield from _within(path, seen)


def _level(folder: Path, root: Path, columns: Columns, left: LeftOut) -> Iterator[Row]:
    """The captioned pictures of one folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    texts = {(path.stem, _kind(path)): path for path in files if _kind(path) in TEXTS}
    pictured = {path.stem for path in files if _kind(path) in PICTURES}
    for path in files:
        kind = _kind(path)
        if of_the_system(path.name):
            if kind in PICTURES:
                left.add("put there by a system", path.name)
        elif kind in UNREAD:
            left.add("of a kind that is not read", path.name)
        elif kind in PICTURES:
            beside_it = [texts[path.stem, ending] for ending in TEXTS if (path.stem, ending) in texts]
            said = next(
                ((text, caption) for text in beside_it if (caption := _caption(text, columns)) is not None),
                None,
            )
            if said is None:
                left.add("without a caption", path.relative_to(root))
                continue
            row = {
                "image": path.name,
                "caption": said[1],
                "_table": said[0],
                "key": path.relative_to(root).as_posix(),
            }
            caption_of(0, row)
            yield row
    for (stem, kind), path in texts.items():
        if stem not in pictured and kind != "json" and not of_the_system(path.name):
            left.add("without a picture", path.relative_to(root))


def _caption(text: Path, columns: Columns) -> str | None:
    """None for a .json without one.

    Raises:
        ValueError: for a text that cannot be read.
    """
    try:
        caption = caption_in(text.read_bytes(), _kind(text), columns[1])
    except OSError as error:
        raise ValueError(f"data: {text} cannot be read: {error.strerror}; mend or remove it") from None
    if caption is None and _kind(text) != "json":
        raise ValueError(f"data: {text} cannot be read as UTF-8 text; save it as UTF-8, or remove it")
    return caption


def _kind(path: Path) -> str:
    return path.suffix.lower().lstrip(".")

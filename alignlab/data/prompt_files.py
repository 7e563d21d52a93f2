"""Reads a file of prompts by its kind, which the end of its name says, in small letters or capitals.

    .txt             a prompt a line; so is a file with no end, or with another end of a text file
    .jsonl, .ndjson  an object a line
    .json, .yaml     a list of texts or objects
    .csv, .tsv       a table whose first line names the columns
    .parquet         a table; only the column of the prompts is read

Objects and rows have the prompt under a key or column, "prompt" unless another is named, and whatever else,
which is kept. Texts are UTF-8, with a byte-order mark or without. What another program must unpack (.gz,
.xlsx ...) is refused.
"""

import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from alignlab.files.bounded_yaml import read_yaml

Prompt = tuple[str, dict[str, Any] | None]
"""A prompt, and what else its object or row says; None in a file of lines."""
FOREIGN = frozenset(
    ".gz .zip .bz2 .xz .zst .7z .rar .tar .tgz .xls .xlsx .ods .doc .docx .odt .rtf .pdf .html .htm .xml "
    ".toml .ini .sqlite .db .arrow .feather .npy .npz .pt .pth .pkl .pickle .safetensors .png .jpg .jpeg "
    ".webp .gif".split()
)
"""Ends of names of what is no text, or not one prompt a line."""
TAKEN = ".txt, .jsonl, .json, .csv, .tsv, .yaml or .parquet"


def read(file: str, column: str = "prompt") -> list[Prompt]:
    """The prompts of a file in order, without blanks around them.

    Args:
        column: key or column of the prompt, of files that have some.

    Raises:
        ValueError: if it cannot be read, is of a kind that is not taken, or holds something else.
    """
    path, kind = Path(file), Path(file).suffix.lower()
    try:
        if kind in FOREIGN:
            raise ValueError(f"a {kind} file is not taken; unpack or save it as {TAKEN}")
        if path.exists() and not path.is_file():  # /dev/zero has no end
            raise ValueError(f"it is no regular file; give one that is {TAKEN}")
        if kind == ".parquet":
            return _parquet(path, column)
        return KINDS.get(kind, _lines)(_text(path), column)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"prompts.file={file} cannot be read: {reason}; give a file that is {TAKEN}"
        ) from None
    except ValueError as error:
        within = str(error).startswith(("line ", "row ", "entry "))
        raise ValueError(f"prompts.file={file}{',' if within else ':'} {error}") from None


def _text(path: Path) -> str:
    """What stands in a text file.

    Raises:
        ValueError: if it is not UTF-8.
    """
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is UTF-16; save it as UTF-8")
    if content[:4] == b"PAR1" or content[:2] in (b"PK", b"\x1f\x8b"):
        raise ValueError(
            f"it is no text but parquet or an archive; give a file that is {TAKEN}, and is called so"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"the byte 0x{content[error.start]:02x} in line {line} is not UTF-8; save it as UTF-8 (it may be "
            "Latin-1)"
        ) from None


# -- kinds


def _lines(text: str, column: str) -> list[Prompt]:
    """A prompt a line; empty lines are skipped."""
    if "\n" not in text:  # other separators may stand inside a prompt, but for this one of old Macs
        text = text.replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    _is_no_json(text, lines)
    return [(line, None) for line in lines]


def _is_no_json(text: str, lines: list[str]) -> None:
    """Raises a ValueError for JSON under a name that says lines of text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return
    for said, kind in ((text, ".json"), (lines[0], ".jsonl")):
        try:
            value = json.loads(said)
        except (ValueError, RecursionError):
            continue
        first = value[0] if isinstance(value, list) and value else None
        if (isinstance(value, dict) and value) or isinstance(first, (str, dict)):
            raise ValueError(f"it holds JSON, not a prompt a line; give it a name that ends in {kind}")


def _json_lines(text: str, column: str) -> list[Prompt]:
    """An object a line; empty lines are skipped."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError):
                raise ValueError(
                    f'line {number}: not an object with a text "{column}"; {_example(column)}'
                ) from None
    return _objects(rows, column)


def _json(text: str, column: str) -> list[Prompt]:
    try:
        return _list(json.loads(text), column)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply; give a list of texts") from None
    except json.JSONDecodeError as error:
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else "; mend that"
        raise ValueError(f"it is no JSON: {error.msg} in line {error.lineno}{hint}") from None


def _yaml(text: str, column: str) -> list[Prompt]:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("its YAML refers to itself with an alias (*name); write every prompt out")
        return _list(read_yaml(text), column)
    except RecursionError:
        raise ValueError("its YAML is nested too deeply; give a list of texts") from None
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())[:200]}; mend that") from None


def _list(value: Any, column: str) -> list[Prompt]:
    """Of a list of texts, or of objects."""
    if not isinstance(value, list):
        raise ValueError(
            f"it holds no list but {_kind(value)}; write a list of texts, or of objects with a text "
            f"{column!r}"
        )
    objects = [{column: entry} if isinstance(entry, str) else entry for entry in value]
    return _objects(
        [(f"entry {k}", entry) for k, entry in enumerate(objects, 1) if entry != {column: ""}], column
    )


def _objects(rows: list[tuple[str, Any]], column: str) -> list[Prompt]:
    """Of objects, each with its place for a sentence."""
    out: list[Prompt] = []
    for place, entry in rows:
        if isinstance(entry, (int, float)):
            raise ValueError(f"{place} is {entry!r}, which is no text; put it in quotes")
        prompt = entry.get(column) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f'{place}: not an object with a text "{column}"{_keys(entry)}; {_example(column)}'
            )
        out.append((prompt.strip(), {key: value for key, value in entry.items() if key != column}))
    return out


def _table(text: str, column: str, delimiter: str = ",") -> list[Prompt]:
    """Of a table whose fields may stand in quotes, with separators, line ends and doubled quotes inside."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        _has(names, column)
        rows = []
        for fields in filter(None, reader):
            if len(fields) != len(names):
                raise ValueError(
                    f"line {reader.line_num} has {len(fields)} fields, but the first line names "
                    f"{len(names)}; put a prompt that holds the separator in quotes"
                )
            rows.append(dict(zip(names, fields, strict=True)))
        return _column(rows, column)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no line of a table ({error}); mend its quotes") from None


def _parquet(path: Path, column: str) -> list[Prompt]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("it needs the package pyarrow; pip install 'alignlab[data]'") from None
    try:
        names = pyarrow.parquet.read_schema(path).names
        rows = pyarrow.parquet.read_table(path, columns=[column] if column in names else []).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"it is no parquet file: {str(error).splitlines()[0]}") from None
    _has(names, column)
    return _column(rows, column)


def _has(names: list[str], column: str) -> None:
    """Raises a ValueError for a table without the column."""
    if column not in names:
        raise ValueError(
            f"it has no column {column!r}, but {', '.join(map(repr, names)) or 'none'} (a table begins with "
            "a line of names); set prompts.column=NAME to the one with the prompts"
        )


def _column(rows: list[dict[str, Any]], column: str) -> list[Prompt]:
    """Of the rows of a table."""
    out: list[Prompt] = []
    for number, row in enumerate(rows, 1):
        prompt = row[column]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"row {number} has no text in column {column!r}; mend or remove it")
        out.append((prompt.strip(), {key: value for key, value in row.items() if key != column}))
    return out


def _keys(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    return f" (its keys are {', '.join(map(str, entry))}; prompts.column=NAME names another)"


def _example(column: str) -> str:
    return f'write {{"{column}": "a lion", ...}}'


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "one text", type(None): "nothing", bool: "a truth value"}
    return names.get(type(value), "a number")


KINDS: dict[str, Callable[[str, str], list[Prompt]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _table,
    ".tsv": partial(_table, delimiter="\t"),
}

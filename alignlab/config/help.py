"""What --help says: the command's keys by group, each with default, unit and meaning, and the options of its
groups, from the source and conf/ (outline.py). Nothing of the command is imported, so it answers at once.
"""

import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from alignlab.config.outline import (
    CONF,
    Command,
    Key,
    Outline,
    about_option,
    command_of,
    module_docstring,
    names,
    options,
    outline,
    own_folders,
    primary_file,
)
from alignlab.config.path_keys import is_path

FLAGS = ("-h", "--help")
WIDTH = 80
"""Columns that no line exceeds but a command, which is to be pasted."""
KINDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "Eta": "number"}
OF_HYDRA = """-m runs a sweep over values with commas. --cfg job shows the composed
configuration. --config-dir FOLDER adds configuration files of your own.
--hydra-help lists what else Hydra takes."""


def wanted(words: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(flag in words for flag in FLAGS)


def early() -> None:
    """Answers `python -m alignlab.COMMAND --help` while Python looks for the module, before torch is loaded,
    and ends the process. Anything else passes."""
    if sys.argv[:1] != ["-m"] or not wanted(sys.argv[1:]):
        return
    module = next((word for word in sys.orig_argv if word.removeprefix("-m").startswith("alignlab.")), "")
    name = module.removeprefix("-m").removeprefix("alignlab.")
    if name in names() or name in names().values():
        show(text(name, sys.argv[1:]))
        sys.exit(0)


def show(said: str) -> None:
    """Prints a text, of which a pager or `head` may read the beginning only."""
    try:
        print(said, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end


def text(name: str, words: Sequence[str] = ()) -> str:
    """The help of a command.

    Args:
        name: as it is typed, or its file's.
        words: of the command line: the keys of the options that they choose are shown.
    """
    its = command_of(names().get(name, name))
    if not its.schema:
        return module_docstring(its).strip()
    folders = own_folders(words)
    whole = outline(its, words, folders)
    sections = [
        "\n".join(_introduction(its)),
        "\n".join(_groups(whole, [CONF, *folders])),
        *("\n".join(section) for section in _sections(whole, [CONF, *folders])),
        OF_HYDRA,
    ]
    return "\n\n".join(section for section in sections if section)


def _introduction(command: Command) -> Iterator[str]:
    """The paragraphs and examples that stand in conf/COMMAND.yaml."""
    template = primary_file(command).get("hydra", {}).get("help", {}).get("template", "")
    remark = ""
    for paragraph in re.split(r"\n\s*\n", template.strip("\n")):
        if remark:
            yield ""
        if not paragraph.lstrip().startswith("python -m"):
            yield from textwrap.wrap(paragraph, WIDTH)
        for line in paragraph.splitlines() if paragraph.lstrip().startswith("python -m") else ():
            example, _, remark = re.sub(r"\s{2,}", "\t", line.strip()).partition("\t")
            yield from textwrap.wrap(remark, WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            yield f"  {example}"
        remark = paragraph


def _groups(whole: Outline, places: Sequence[Any]) -> Iterator[str]:
    """The options of every group, and which is chosen."""
    if not whole.groups:
        return
    yield "GROUPS, each chosen with GROUP=OPTION"
    yield ""
    for group in whole.groups:
        for folder, listed in _by_folder(group, options(group, places)):
            yield from textwrap.wrap(
                f"{folder}: {', '.join(listed)}",
                WIDTH,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    if "experiment" in whole.groups:
        yield ""
        yield from textwrap.wrap(
            "Experiments are typed with their folder: experiment=figure/NAME for the figures' sweeps, "
            "experiment=paper/NAME for a paper's hyperparameters.",
            WIDTH,
        )


def _by_folder(group: str, listed: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    folders = sorted({option.rpartition("/")[0] for option in listed})
    for folder in folders:
        inside = [option.rpartition("/")[2] for option in listed if option.rpartition("/")[0] == folder]
        yield (f"{group}/{folder}" if folder else group), inside


def _sections(whole: Outline, places: Sequence[Any]) -> Iterator[Iterator[str]]:
    """The keys at the top, then those of each group."""
    tables = [key for key in whole.keys if whole.is_table(key)]
    named = {key.name for key in tables}
    yield _section("KEYS", "", [key for key in whole.all_keys() if "." not in key.name], named)
    for table in tables:
        chosen = whole.chosen.get(table.name, [])
        heading = f"{table.name}={chosen[0] if len(chosen) == 1 else chosen}".replace("'", "")
        abouts = [about_option(table.name, option, places) for option in chosen]
        about = " ".join([table.meaning, *(abouts if len(chosen) == 1 else ())]).strip()
        inner = whole.inner(table.name)
        if inner or table.name in whole.groups:
            yield _section(heading if chosen else table.name, about, inner, set())


def _section(heading: str, about: str, keys: Sequence[Key], leave_out: set[str]) -> Iterator[str]:
    yield from textwrap.wrap(heading, WIDTH, subsequent_indent="    ", break_long_words=False)
    yield from textwrap.wrap(about, WIDTH, initial_indent="    ", subsequent_indent="    ")
    for key in keys:
        if key.name not in leave_out:
            yield ""
            yield from _entry(key)


def _entry(key: Key) -> Iterator[str]:
    head = f"  {key.name}={shown(key.default)}"
    kind = f"[{kind_of(key)}]"
    if len(head) + 2 + len(kind) <= WIDTH:
        yield f"{head}  {kind}"
    else:
        yield head
        yield from textwrap.wrap(kind, WIDTH, initial_indent="      ", subsequent_indent="      ")
    yield from textwrap.wrap(key.meaning, WIDTH, initial_indent="      ", subsequent_indent="      ")


def shown(value: Any) -> str:
    """A default as it would be typed; a list of many is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value == "???":
        return "(must be given)"
    if isinstance(value, str):
        return f"(that of {value[2:-1]})" if re.fullmatch(r"\$\{\w+\}", value) else value or '""'
    if isinstance(value, list):
        written = [shown(item) for item in value]
        kept = [item for k, item in enumerate(written) if len(", ".join(written[: k + 1])) < 40]
        return f"[{', '.join([*kept, '...'] if len(kept) < len(written) else kept)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    return str(value)


def kind_of(key: Key) -> str:
    """The words that a key may be, or its unit, or else its type."""
    null = " or null" if "None" in key.kind else ""
    if key.choices:
        return " | ".join(key.choices) + null
    if key.unit:
        return key.unit + null
    if is_path(key.name) and "float" not in key.kind:
        return "path" + null
    plain = key.kind.partition(" | ")[0]
    if plain in KINDS:
        return KINDS[plain] + null
    if re.match(r"(list|tuple|Sequence)\b", plain):
        return "list" + null
    return ("table" if re.match(r"(dict|Mapping)\b", plain) else "value") + null

"""Words of a command line as the user means them: a path or a prompt is taken as it stands, whatever letters
it holds.

Hydra reads `key=value` by a grammar in which = , blanks, brackets, quotes and all letters beyond ASCII mean
something, or nothing at all. So the value of a key that holds a path or a text (path_keys.py) is quoted here,
unless the user quoted it, or wrote a list or (with -m) several values.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from alignlab.config.moved_experiments import present_word
from alignlab.config.path_keys import LIST, PATH, TEXT
from alignlab.runs.pasted import literal, quoted

_QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_IS_QUOTED = re.compile(rf"{_QUOTED}|null", re.IGNORECASE | re.DOTALL)
_ITEM = re.compile(rf"\s*({_QUOTED})\s*(?:,|$)|([^,]*)(?:,|$)", re.DOTALL)
_REFERENCE = re.compile(r"\$\{[^{}]+\}")


def as_meant(word: str, *, sweep: bool) -> str:
    """One word for Hydra; one that needs nothing is returned as it is, but for an old name of an experiment.

    Args:
        word: `key=value`, as the shell handed it on.
        sweep: whether -m was given, and a comma may mean several values.
    """
    word = present_word(word)
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    sweep = sweep and name not in ("output_dir", "output")  # one place for all jobs
    path, text, listed = (kind.fullmatch(name) is not None for kind in (PATH, TEXT, LIST))
    if not equals or not value or not (path or text or listed) or _IS_QUOTED.fullmatch(value):
        return word
    parsed = parse(word)
    several = parsed is not None and parsed.is_sweep_override()
    read = None if parsed is None or several else parsed.value()
    if read == value and isinstance(read, str) and "${" not in value:
        return word
    if path and _is_there(value):
        return f"{key}={quoted(literal(value))}"
    items = _items(value) if listed and parsed is None else None
    if items is not None:
        return f"{key}=[{','.join(_quoted_items(items, name))}]"
    if listed and not (path or text):
        return word
    if sweep and several:
        return word
    if sweep and parsed is None and "," in value:
        return f"{key}={','.join(_quoted_items(_split(value), name))}"
    if isinstance(read, str) and (name != "prompt" or "${" not in value):
        return word  # a reference, or letters that the user made plain with backslashes
    if (path or listed) and isinstance(read, (list, dict)):
        return word  # a list, or what has a sentence of its own
    return f"{key}={_as_it_stands(value, name)}"


def parse(word: str) -> Override | None:
    """A word as Hydra's grammar reads it; None if it does not."""
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):
        return None


def swept(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys to which the overrides of a sweep give several values, and the keys to which they give one."""
    several: list[str] = []
    single: list[str] = []
    for override in filter(None, map(parse, overrides)):
        (several if has_several(override) else single).append(override.get_key_element())
    return several, single


def has_several(override: Override) -> bool:
    """Whether jobs of a sweep differ in it."""
    return override.is_sweep_override() and (
        not override.is_discrete_sweep() or len([*override.sweep_string_iterator()]) > 1
    )


def _as_it_stands(value: str, name: str) -> str:
    """The value quoted. In a prompt `${` is text; elsewhere a whole reference is one."""
    if name == "prompt" or "${" in _REFERENCE.sub("", value):
        value = literal(value)
    return quoted(value)


def _items(value: str) -> list[str] | None:
    """The places of a list without lists in it; None if that is none."""
    if not (value.startswith("[") and value.endswith("]")) or not value[1:-1].strip():
        return None
    items = _split(value[1:-1])
    plain = [item for item in items if not _IS_QUOTED.fullmatch(item)]
    return None if any(re.search(r"[][{}\\]|^\s*$", item) for item in plain) else items


def _split(value: str) -> list[str]:
    """The parts between commas, but for commas between quotes."""
    return [match[1] or match[2] for match in _ITEM.finditer(value) if match.end() > match.start()]


def _quoted_items(items: list[str], name: str) -> Iterator[str]:
    """Each part quoted. Parts that name a place on the disk together, commas and all, are one."""
    rest = items
    while rest:
        whole = (
            k
            for k in range(len(rest), 1, -1)
            if PATH.fullmatch(name) and _is_there(",".join(rest[:k]).strip())
        )
        n = next(whole, 1)
        item = ",".join(rest[:n]).strip()
        yield item if _IS_QUOTED.fullmatch(item) else _as_it_stands(item, name)
        rest = rest[n:]


def _is_there(value: str) -> bool:
    """Whether this is the name of something on the disk, or a pattern of such names with * and ?."""
    try:
        path = Path(value).expanduser()
        return path.exists() or any(glob.iglob(glob.escape(value).replace("[*]", "*").replace("[?]", "?")))
    except (OSError, ValueError, RuntimeError):  # too long, NUL, no such user
        return False

"""Commands that the program prints, written so that they can be pasted into a shell: quoted for Hydra first,
then for the shell."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+@-]*")
"""Values that neither Hydra nor a shell reads in another way."""
_WORDS = re.compile(r"null|true|false|[+-]?(?:inf|nan)|[.\d][\d._]*(?:e[\d._]*)?", re.IGNORECASE)
"""Plain values that Hydra would not take as text."""


def line(command: str, *words: str) -> str:
    """`python -m alignlab.COMMAND WORDS`; the words come from `word`."""
    return " ".join([f"python -m alignlab.{command}", *words])


def resume(folder: Path) -> str:
    """The command that goes on with a run."""
    return line("train", word("resume", folder))


def word(key: str, value: str | Path) -> str:
    """`key=value` for a shell, whatever letters the value holds."""
    text = str(value)
    if isinstance(value, Path) and text.startswith("~"):
        text = f"./{text}"  # a folder of this name, not somebody's home
    return shlex.quote(f"{key}={hydra_value(text)}")


def list_word(key: str, values: Sequence[object]) -> str:
    """`key=[value,value]` for a shell, each value a text."""
    return shlex.quote(f"{key}=[{','.join(quoted(literal(str(value))) for value in values)}]")


def hydra_value(text: str) -> str:
    """A text as Hydra's grammar writes it: as it is where that is unambiguous, else between double quotes."""
    if _PLAIN.fullmatch(text) and not _WORDS.fullmatch(text):
        return text
    return quoted(literal(text))


def literal(text: str) -> str:
    """A text in which `${` begins no reference."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """A text between double quotes, as Hydra's grammar reads it. Backslashes count only in front of a
    quote."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    ended = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f'"{ended}"'

"""Names of a sweep's folders: short, of letters that every shell and file system takes, and the same when the
sweep is typed again.

Only the keys that have several values are named: `kl_coeff-0.25_seed-1`. All overrides of the job stand in
its folder, in overrides.yaml, and tell whose folder it is. Folders of earlier versions have all overrides as
their name, `algo=ddpo,kl_coeff=0.25,seed=1`, and are used.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from alignlab.config.moved_experiments import first_word
from alignlab.files.bounded_yaml import read_yaml

WORDS = "overrides.yaml"
LONGEST = 180
"""Characters of a name."""
LONGEST_VALUE = 40
"""Characters of one value in it."""


def folder_of(
    sweep: Path, overrides: Sequence[str], several: Collection[str], unnamed: Collection[str]
) -> str:
    """The name of a job's folder in its sweep's.

    Args:
        overrides: `key=value`, all of the job's.
        several: the keys in which the sweep's jobs differ.
        unnamed: keys that make no job another one, as output_dir.
    """
    naming = named(overrides, unnamed)
    old = full_name(naming)
    if not old or os.path.isdir(sweep / old):  # Path.is_dir raises where a name is too long
        return old
    kept = [
        path.parent.name
        for path in sorted(sweep.glob(f"*/{WORDS}"))
        if named(read_words(path.parent), unnamed) == naming
    ]
    if kept:
        return kept[0]
    values = dict(override.split("=", 1) for override in naming if "=" in override)
    short = short_name({key: values[key] for key in sorted(values) if key in several} or values)
    if read_words(sweep / short):  # of an earlier sweep, which fixed another value
        return f"{short[: LONGEST - 10]}-{_digest(old)}"
    return short


def write_words(folder: Path, overrides: Sequence[str]) -> None:
    """Writes a job's overrides into its folder, unless the folder's name holds them."""
    if "=" in folder.name:
        return
    with suppress(FileExistsError), (folder / WORDS).open("x", encoding="utf-8") as file:
        file.write(yaml.safe_dump([*overrides], allow_unicode=True))


def read_words(folder: Path) -> list[str]:
    """Reads the overrides of the job whose folder this is; an empty list if they cannot be read."""
    try:
        read = read_yaml((folder / WORDS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    return read if isinstance(read, list) and all(isinstance(word, str) for word in read) else []


def named(overrides: Sequence[str], unnamed: Collection[str]) -> list[str]:
    """Sorts the overrides that make a job what it is. An experiment has its first name, as in folders of
    earlier versions."""
    return sorted(
        first_word(override)
        for override in overrides
        if override.lstrip("+~").partition("=")[0] not in unnamed
    )


def full_name(overrides: Sequence[str]) -> str:
    """The name that earlier versions gave to a job's folder: its overrides, cut where they are too long."""
    name = ",".join(overrides).replace("/", "_")
    return name if len(name) <= LONGEST else f"{name[:160]}-{_digest(name, 6)}"


def short_name(values: Mapping[str, str]) -> str:
    """`key-value` for each, of letters, digits and `.-_+` only; what that loses is told by a digest."""
    parts = []
    for key, value in values.items():
        text = value.strip("'\"")
        safe = re.fullmatch(rf"[A-Za-z0-9._+-]{{1,{LONGEST_VALUE}}}", text)
        plain = text if safe else re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")[:LONGEST_VALUE]
        clear = safe and not any(f"_{other}-" in plain for other in values)
        safe_key = re.sub(r"[^A-Za-z0-9._-]+", "-", key.lstrip("+~"))
        parts.append(f"{safe_key}-{plain}" if clear else f"{safe_key}-{plain}-{_digest(value)}")
    name = "_".join(parts)
    return name if len(name) <= LONGEST else f"{name[:160]}-{_digest(name)}"


def _digest(text: str, size: int = 4) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()

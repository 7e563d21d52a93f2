"""A folder that a command writes in, which may have come from somebody else: looked through for links first,
and locked.

What is written, emptied, removed or copied in such a folder must lie in it. A link there (checkpoints -> a
home directory) would lead the command to files of the user's that are none of its business, and a pipe in
place of a file would let it wait for ever. So each command that writes looks through the parts that it
writes, before it does anything else, and refuses the first link, pipe, socket or device that it meets. The
folder itself may be reached over a link: that is the word of the user who made it or typed it.
"""

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"
STRAY = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|\.nfs.*|.*~|\..*\.sw[a-p]")
"""Files that file managers, editors and network file systems leave anywhere. They count as nothing, and
stay."""


class RunError(Exception):
    """The run folder cannot be used as asked; one sentence."""


def refuse_links(folder: Path, *names: str, inside: bool = True) -> None:
    """Looks through parts of a folder that are to be written, emptied, removed or copied. What is not there
    passes.

    Args:
        folder: may itself be a link.
        names: paths below it; the last part may be a pattern, as in ".new_*".
        inside: whether what lies in the named folders is looked at too.

    Raises:
        RunError: for the first link, or other thing that is neither a file nor a folder.
    """
    for name in names:
        *above, last = Path(name).parts
        home = folder
        for part in above:
            home = home / part
            _refuse(home, folder)
        for path in _matching(home, last):
            _refuse(path, folder)
            if inside and not path.is_symlink() and path.is_dir():
                for entry in _below(path):
                    _refuse(Path(entry.path), folder)


def refuse_devices(folder: Path, *names: str) -> None:
    """Looks through parts of a folder that are only read: a pipe would be waited for, a device read for ever.
    Links are followed.

    Raises:
        RunError: for the first thing that leads to neither a file nor a folder.
    """
    for name in names:
        top = folder / name
        for path in (top, *(Path(entry.path) for entry in _below(top))):
            try:
                mode = path.stat().st_mode
            except OSError:  # not there, or a link that leads nowhere
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunError(f"{path} is a pipe, a socket or a device, which is not read; remove it")


def refuse_led_away(output: Path) -> None:
    """The same as `refuse_links` for an output whose path was typed: where it lies in a run folder, or in a
    folder of pairs, nothing on the way from that folder to it may be a link, nor anything that is in it
    already. Elsewhere a link is the user's own.

    Raises:
        RunError: for the first one.
    """
    whole = output.absolute()
    for folder in reversed(whole.parents):
        if _is_ours(folder):
            refuse_links(folder, str(whole.relative_to(folder)))
            return


def locked(folder: Path, doing: str) -> BinaryIO:
    """Keeps other processes out of a folder, which is made if need be, until this one ends, or the file is
    closed. What was looked at before must be looked at again: another process may have held the lock in
    between.

    Args:
        doing: what the other process does with the folder, as in "being trained".

    Raises:
        RunError: if the lock cannot be written, or another process holds it.
    """
    path = folder / LOCK
    while True:
        refuse_links(folder, LOCK)
        try:  # the file is not emptied: it may be another name of one of the user's
            folder.mkdir(parents=True, exist_ok=True)
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "r+b")
        except OSError as error:
            raise RunError(
                f"{folder} cannot be written ({error.strerror}); choose another output_dir"
            ) from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise RunError(
                f"{folder} is {doing} by another process; wait for it, or choose another output_dir"
            ) from None
        if _is_still(path, file):
            return file
        file.close()  # the process that held it has ended, and removed it


_FRESH: list[Path] = []
"""Folders that this process made only to have their names."""


def fresh(name: str) -> Path:
    """Makes a new folder of that name, or of NAME-2, NAME-3, ... if it is there: commands begun in the same
    second get different ones.

    Raises:
        RunError: if it cannot be made.
    """
    wanted, number = Path(name), 1
    try:
        for parent in reversed(wanted.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                _FRESH.append(parent)
        while True:
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            _FRESH.append(path)
            return path
    except OSError as error:
        raise RunError(
            f"{wanted} cannot be made ({error.strerror}); choose another folder with output_dir"
        ) from None


def give_back() -> None:
    """Removes the folders of `fresh` in which nothing was written: a command that was refused leaves nothing
    behind."""
    while _FRESH:
        try:
            _FRESH.pop().rmdir()
        except OSError:  # it holds something now
            pass


def _refuse(path: Path, folder: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:  # not there
        return
    if stat.S_ISLNK(mode):
        raise RunError(
            f"{path} is a link, and nothing that is written, removed or copied in {folder} may be one; "
            f"put what it leads to in its place, or remove it ({folder} itself may be a link)"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise RunError(f"{path} is neither a file nor a folder but a pipe, a socket or a device; remove it")


def _matching(home: Path, name: str) -> list[Path]:
    """The entries of a folder that a name, or a pattern of names, means."""
    if "*" not in name:
        return [home / name]
    if not home.is_dir():
        return []
    return [home / entry for entry in sorted(os.listdir(home)) if fnmatch(entry, name)]


def _below(top: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder, without following links.

    Raises:
        RunError: if a folder there cannot be read.
    """
    waiting = [str(top)] if top.is_dir() and not top.is_symlink() else []
    while waiting:
        home = waiting.pop()
        try:
            with os.scandir(home) as entries:
                children = list(entries)
        except OSError as error:
            raise RunError(
                f"{home} cannot be read ({error.strerror}); mend that, or choose another folder"
            ) from None
        yield from children
        waiting += [entry.path for entry in children if entry.is_dir(follow_symlinks=False)]


def _is_ours(folder: Path) -> bool:
    """Whether commands of alignlab made this folder."""
    holds = {
        name
        for name in ("config.yaml", "metrics.jsonl", "checkpoints", "model", "make_pairs.yaml")
        if os.path.lexists(folder / name)
    }
    return "make_pairs.yaml" in holds or ("config.yaml" in holds and len(holds) > 1)


def _is_still(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is the one of that name."""
    try:
        on_disk, opened = path.lstat(), os.fstat(file.fileno())
    except OSError:
        return False
    return (on_disk.st_dev, on_disk.st_ino) == (opened.st_dev, opened.st_ino)


def is_stray(path: Path) -> bool:
    """Whether it is a file that a file manager, an editor or a network file system left, and nobody's
    work."""
    return STRAY.fullmatch(path.name) is not None and path.is_file()

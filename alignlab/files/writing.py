"""Files that are whole or not there: appended to, replaced in one step, and one sentence where the disk takes
no more."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from alignlab.files.checksums import sync
from alignlab.files.safe_folder import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk that takes no more."""


def append(path: Path, text: str) -> None:
    """Appends a text to a file, to the disk; what does not fit is taken back.

    Raises:
        OSError: if the disk does not take it.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            left = memoryview(text.encode())
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def write_aside(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old text or the new, never half."""
    with aside_of(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def aside_of(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then takes the place of `path` in one step, synced; nothing is left
    of it if that fails."""
    aside = path.with_name(f".new_{path.name}")
    aside.unlink(missing_ok=True)  # of a killed process, or a link that would lead elsewhere
    try:
        yield aside
        with_usual_permissions(aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside_of(path: Path) -> Iterator[Path]:
    """The same for a new folder: a name that is not there yet, to write a folder under."""
    aside = path.with_name(f".new_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        with_usual_permissions(aside)
        for part in (*aside.rglob("*"), aside):
            sync(part)
        aside.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def all_aside(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write files in that then take the places of those of the same names in `folder`, the file
    `last` after the others. Nothing is changed in `folder` if one of them cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".new_files"
    shutil.rmtree(aside, ignore_errors=True)  # what a killed command was writing
    aside.mkdir()
    try:
        yield aside
        with_usual_permissions(aside)
        files = sorted(aside.iterdir(), key=lambda path: path.name == last)
        for path in files:
            sync(path)
        for path in files:
            path.replace(folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def with_usual_permissions(path: Path) -> None:
    """Gives a file, or all files in a folder, the permissions of one that a program makes here: safetensors
    makes its own for the owner alone, and other members of a group could not read what a run leaves."""
    folder = path if path.is_dir() else path.parent
    usual = folder / f".new_{os.getpid()}"
    try:
        usual.touch()
        mode = stat.S_IMODE(usual.stat().st_mode)
    finally:
        usual.unlink(missing_ok=True)
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def try_to_write(folder: Path) -> None:
    """Makes a file in a folder, and removes it.

    Raises:
        OSError: if that cannot be done.
    """
    trial = folder / f".new_{os.getpid()}"
    trial.touch()
    trial.unlink()


def refuse_unwritable(folder: Path, key: str, *names: str) -> None:
    """Tries to write where results will go, before hours are spent on them. Makes no folder.

    Args:
        key: the key that chooses the folder, for the sentence.
        names: of the files that will be written there.

    Raises:
        RunError: if one of them could not be.
    """
    place = folder
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        if place.is_dir():
            try_to_write(place)
        else:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise RunError(
            f"{place} cannot be written ({error.strerror}); mend that, or choose another {key}"
        ) from None
    for path in (folder / name for name in names):
        if path.is_dir():
            raise RunError(
                f"{path} is a folder, and a file of that name is to be written; move it, or choose another "
                f"{key}"
            )


def type_again(path: Path, reason: str, full: bool, key: str = "output_dir") -> str:
    """The sentence for a path that was not written by a command that can be typed again.

    Args:
        full: whether room on the disk is what is missing.
        key: the key that chooses another place.
    """
    mend = "make room" if full else f"mend that, or choose another {key}"
    return (
        f"{path} cannot be written ({reason}); {mend}, and type the command again: what was written is intact"
    )


@contextmanager
def room_for(path: Path, key: str = "output_dir") -> Iterator[None]:
    """Inside, `path` is written by a command that can be typed again.

    Args:
        key: the key that chooses another place.

    Raises:
        RunError: in place of the library's own error.
    """
    with told(partial(type_again, path, key=key)):
        yield


@contextmanager
def told(said: Callable[[str, bool], str]) -> Iterator[None]:
    """Inside, something is written; where the disk does not take it, a sentence says so.

    Args:
        said: makes the sentence of the reason, and of whether the disk is full.

    Raises:
        RunError: in place of the library's own error.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = unwritten(error)
        if reason is None:
            raise
        raise RunError(said(*reason)) from None


def part_from_other_names(path: Path) -> None:
    """Gives a file that is to be appended to a content of its own, if it shares that with a file of another
    name (a hard link)."""
    if path.is_file() and path.stat().st_nlink > 1:
        with aside_of(path) as aside:
            shutil.copyfile(path, aside)


def unwritten(error: BaseException) -> tuple[str, bool] | None:
    """Why the disk did not take something, and whether it is full; None if the error is of another kind.
    safetensors, torch.save and shutil.copytree have errors of their own."""
    if isinstance(error, (SafetensorError, shutil.Error)):
        said = (
            str(error).rpartition("I/O error: ")[2]
            if isinstance(error, SafetensorError)
            else str(error.args[0][0][2])
        )
        number = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", said)
        code = int(number[1] or number[2]) if number else 0
        return os.strerror(code) if code else said, code in FULL
    if isinstance(error, RuntimeError):  # torch.save's, raised while it handled the one of the system
        return unwritten(error.__context__) if isinstance(error.__context__, OSError) else None
    return (error.strerror or str(error), error.errno in FULL) if isinstance(error, OSError) else None

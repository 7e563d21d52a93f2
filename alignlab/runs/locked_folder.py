"""A folder that a command fills over hours, one process at a time, and goes on filling after it was killed.

A run (folder.py) and candidates for pairs (candidates.py) are such folders. What holds for both stands here:

- Nothing in it may be a link when it is opened for writing: the folder may be somebody else's.
- What was looked at before the lock is looked at again after it: another process may have held it in between.
- What a killed process was writing is removed. What it had written stays: a file is replaced in one step, or
  appended to and on the disk before it counts.
- Where the disk refuses, one sentence says so, and what to type.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

from alignlab.files.safe_folder import RunError, locked, refuse_links
from alignlab.files.writing import append, part_from_other_names, told, write_aside


class LockedFolder(ABC):
    """A folder of ours.

    Args:
        folder: looked at only, until `_enter`.

    Raises:
        RunError: if it cannot be filled, as `_look` says.
    """

    verb: ClassVar[str]
    """What a process does with it, as in "trained by another process"."""
    parts: ClassVar[tuple[str, ...]]
    """All that is written in it; names, or patterns of names."""
    folders: ClassVar[tuple[str, ...]]
    """Those of the parts that are made at the beginning."""
    grows: ClassVar[str]
    """The one that is appended to."""
    unfinished: ClassVar[tuple[str, ...]]
    """Patterns of what a killed process may have been writing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen = self._look()

    @abstractmethod
    def _look(self) -> object:
        """How far the folder has come.

        Raises:
            RunError: if it holds links, or anything else than what is to be filled.
        """

    @abstractmethod
    def _refusal(self, path: Path, reason: str, full: bool) -> str:
        """The sentence for the folder that cannot be made, or for a part of it that cannot be written.

        Args:
            full: whether room on the disk is what is missing.
        """

    def _enter(self) -> None:
        """Creates the folder, and keeps other processes out of it until this one ends.

        Raises:
            RunError: if it cannot be written, holds links, or another process fills it, or did so since it
                was looked at.
        """
        refuse_links(self.folder, *self.parts)  # before a folder is made or a lock written
        with told(partial(self._refusal, self.folder)):
            for name in self.folders:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder, f"being {self.verb}")
        if self._look() != self._seen:
            raise RunError(
                f"{self.folder} was {self.verb} by another process while this one began; type the command "
                "again"
            )
        part_from_other_names(self.folder / self.grows)

    def _tidy(self) -> None:
        """Removes what a killed process was writing."""
        for left in [path for pattern in self.unfinished for path in self.folder.glob(pattern)]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    @contextmanager
    def room_for(self, part: str) -> Iterator[None]:
        """Inside, a part of the folder is written; where the disk does not take it, a sentence says so.

        Raises:
            RunError: in place of the library's own error, and for a link where that is written.
        """
        refuse_links(self.folder, part)
        with told(partial(self._refusal, self.folder / part)):
            yield

    def _replace(self, part: str, text: str) -> None:
        with self.room_for(part):
            write_aside(self.folder / part, text)

    def _append(self, text: str) -> None:
        """To the file that grows; what does not fit is taken back."""
        with self.room_for(self.grows):
            append(self.folder / self.grows, text)

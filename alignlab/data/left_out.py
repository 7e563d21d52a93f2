"""Counts what of a data set is left out, and says it: nobody should train on half of the data without
knowing."""

import os
from pathlib import PurePosixPath

SYSTEM = ("__MACOSX", "Thumbs.db", "desktop.ini")
"""Names of what systems put beside files. Names with a dot in front (._x, .DS_Store) are such names too."""


class LeftOut:
    """Reasons, each with how often it came and what it was the first time."""

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[int, str]] = {}
        self._notes: list[str] = []

    def add(self, why: str, first: object = "", count: int = 1) -> None:
        """Counts `count` more that are left out.

        Args:
            why: what is said after the count: "without a caption".
            first: the name of this one, said if it is the first.
        """
        before, name = self._reasons.get(why, (0, str(first)))
        if before + count:
            self._reasons[why] = before + count, name

    def forget(self) -> None:
        """Counts from anew: the data have another form than it seemed."""
        self._reasons.clear()
        self._notes.clear()

    def note(self, sentence: str) -> None:
        """Something else that is said with it."""
        self._notes.append(sentence)

    def __len__(self) -> int:
        return sum(count for count, _ in self._reasons.values())

    def __str__(self) -> str:
        reasons = self._reasons.items()
        return ", ".join(f"{count} {why}" + (f" ({name})" if name else "") for why, (count, name) in reasons)

    def say(self, data: str, kept: int, of: str) -> None:
        """Prints the line and the notes, if there is something to say; of several processes, the first does.

        Args:
            kept: how many are not left out.
            of: what they are, in the plural.
        """
        counted = [f"{len(self)} of {kept + len(self)} {of} left out: {self}"] if len(self) else []
        if os.environ.get("RANK", "0") == "0":
            for sentence in (*counted, *self._notes):
                print(f"data={data}: {sentence}", flush=True)


def of_the_system(name: str) -> bool:
    """Whether a path is something that macOS, Windows or a notebook put there."""
    parts = PurePosixPath(name).parts
    return any(part in SYSTEM or (part.startswith(".") and part.strip(".")) for part in parts)

"""A run's folder and one of candidates keep the same rules, which stand in one base."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.files.safe_folder import RunError
from alignlab.runs.candidates import CANDIDATES, Candidates
from alignlab.runs.folder import Run
from alignlab.runs.layout import METRICS
from alignlab.runs.stored_config import LATER_KEYS


def training(folder: Path) -> Callable[[], None]:
    """Begins a run, and returns what appends a line to its metrics.jsonl."""
    run = Run(folder, {**LATER_KEYS, "seed": 0})
    run.begin()
    return lambda: run.log({"step": 1})


def filling(folder: Path) -> Callable[[], None]:
    """The same for candidates and candidates.jsonl."""
    out = Candidates(folder, {"seed": 0}, ["cat"], 2)
    out.begin({"weights": None, "prompts": "those"})
    return lambda: out.log(0, 1, 0, {"bright": [0.1, 0.2]})


BOTH = pytest.mark.parametrize(
    ("begin", "grows", "below"), [(training, METRICS, "samples"), (filling, CANDIDATES, "images")]
)


@BOTH
def test_a_link_that_appears_later_is_not_written_through(
    begin: Callable[[Path], Callable[[], None]], grows: str, below: str, tmp_path: Path
) -> None:
    """The file that grows is opened anew for each line, so it is looked at anew."""
    append = begin(tmp_path / "folder")
    (tmp_path / "mine").write_text("of the user\n")
    (tmp_path / "folder" / grows).symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match=f"{grows} is a link"):
        append()
    assert (tmp_path / "mine").read_text() == "of the user\n"


@BOTH
def test_what_grows_has_no_other_name(
    begin: Callable[[Path], Callable[[], None]], grows: str, below: str, tmp_path: Path
) -> None:
    """A hard link is no other file: what is appended does not reach the file of the other name."""
    begin(tmp_path / "folder")()
    os.link(tmp_path / "folder" / grows, tmp_path / "copy")
    before = (tmp_path / "copy").read_bytes()
    begin(tmp_path / "folder")()
    assert (tmp_path / "copy").read_bytes() == before
    assert (tmp_path / "folder" / grows).read_bytes() == 2 * before


@BOTH
def test_what_a_killed_process_was_writing_is_removed(
    begin: Callable[[Path], Callable[[], None]], grows: str, below: str, tmp_path: Path
) -> None:
    begin(tmp_path / "folder")
    (tmp_path / "folder" / ".new_half").write_text("ha")
    (tmp_path / "folder" / below / ".new_half").mkdir()
    begin(tmp_path / "folder")
    assert not [*(tmp_path / "folder").rglob(".new_*")]

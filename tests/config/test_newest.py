"""`run=last` and its like: the newest folder that fits."""

import os
from pathlib import Path

import pytest

from alignlab.config.build import ConfigError
from alignlab.config.newest import named
from tests.runs_on_disk import held, made_run


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished runs, the job of a sweep that is newer, and a newest one that was stopped."""
    monkeypatch.chdir(tmp_path)
    folders = ["runs/old", "multirun/sweep/seed-1", "runs/new", "runs/stopped"]
    for age, folder in zip((400, 300, 200, 100), folders, strict=True):
        run = made_run(tmp_path / folder)
        if folder == "runs/stopped":
            (run / "summary.json").unlink()
        for path in [*run.rglob("*"), run]:
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    return tmp_path


@pytest.mark.parametrize("key", ["run", "runs", "init_from"])
def test_the_newest_finished_run(key: str, desk: Path) -> None:
    """One that is not finished has nothing to be read."""
    assert named(f"{key}=last") == (f"{key}=runs/new", f"{key}=last is {key}=runs/new")


def test_resume_takes_the_newest_that_is_not_finished(desk: Path) -> None:
    """But none that another process trains."""
    assert named("resume=last")[0] == "resume=runs/stopped"
    with held(desk / "runs" / "busy"):
        assert named("resume=last")[0] == "resume=runs/stopped"


def test_a_folder_of_that_name_goes_first(desk: Path) -> None:
    """`last` is then a path like any other."""
    (desk / "last").mkdir()
    assert named("run=last") == ("run=last", None)


@pytest.mark.parametrize("word", ["seed=last", "run=runs/last", "runs=[last]", "last"])
def test_other_words_stay(word: str, desk: Path) -> None:
    """Only the whole value of a key that takes a run folder is read."""
    assert named(word) == (word, None)


def test_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says where was looked."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="run=last: there is no finished run in runs or multirun; give its folder"
    ):
        named("run=last")

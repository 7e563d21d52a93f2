"""`alignlab ls`: what it says of runs, and that no folder makes it fail."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from alignlab import ls
from alignlab.runs.folder import Run
from alignlab.train import train
from tests.running import configured, tiny
from tests.runs_on_disk import held, made_run


def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of the table."""
    monkeypatch.setattr(sys, "argv", ["alignlab ls", *words])
    ls.main()
    return capsys.readouterr().out.splitlines()


def test_a_row_says_what_a_run_did(tmp_path: Path, monkeypatch, capsys) -> None:
    """State, epochs, algorithm, reward, the base model's value and the last one, age, and the folder as a
    shell takes it."""
    made_run(tmp_path / "my runs" / "one")
    heading, home, row = listed(monkeypatch, capsys, str(tmp_path / "my runs"))
    assert heading.split() == [
        "state",
        "epoch",
        "algorithm",
        "reward",
        "base",
        ">",
        "last",
        "age",
        "ETA",
        "folder",
    ]
    assert home == f"'{tmp_path}/my runs': 1 of 1 finished"
    assert row.split()[:7] == ["finished", "20/20", "DRaFT", "bright", "1", ">", "2"]
    assert row.rstrip().endswith(f"'{tmp_path}/my runs/one'")


def test_states(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Finished, stopped, failed and running are told apart by files and the lock."""
    home = tmp_path / "runs"
    c = configured(*tiny(tiny_sd, "algo=draft", "steps=2"))
    train(c, home / "finished")
    stopped = shutil.copytree(home / "finished", home / "stopped")
    (stopped / "summary.json").unlink()
    failed = shutil.copytree(stopped, home / "failed")
    shutil.rmtree(failed / "checkpoints" / "step_000002")
    capsys.readouterr()
    with held(home / "running"):
        table = listed(monkeypatch, capsys, str(home))[2:]
    rows = {line.split()[-1].rpartition("/")[2]: line.split()[0] for line in table}
    assert rows == {name: name for name in ("finished", "stopped", "failed", "running")}


def test_a_sweep_says_how_many_are_finished(tmp_path: Path, monkeypatch, capsys) -> None:
    """In a heading of its own."""
    for seed in (0, 1, 2):
        run = made_run(tmp_path / "sweep" / f"seed-{seed}", seed=seed)
        if seed == 2:
            (run / "summary.json").unlink()
    lines = listed(monkeypatch, capsys, str(tmp_path))
    assert f"{tmp_path}/sweep: 2 of 3 finished" in lines[1] and len(lines) == 5


def test_hostile_folders(tmp_path: Path, monkeypatch, capsys) -> None:
    """Damaged files, links, devices, folders in the place of files and letters that a terminal obeys: each
    run has a row, nothing is written, and nothing of the letters reaches the terminal."""
    home = tmp_path / "runs"
    for name, text in {"config.yaml": "{", "metrics.jsonl": "null\n[]\n{", "summary.json": "\0"}.items():
        (made_run(home / f"bad {name}") / name).write_text(text)
    nasty = made_run(home / "evil\x1b[31m", {"algo._target_": "\x1b]0;owned\x07"})
    os.mkfifo(made_run(home / "pipe") / "fifo")
    (made_run(home / "folder") / "overrides.yaml").mkdir()
    linked = made_run(home / "linked")
    (linked / "metrics.jsonl").unlink()
    (linked / "metrics.jsonl").symlink_to("/dev/zero")
    (home / "loop").symlink_to(home)
    before = {path: path.lstat().st_mtime_ns for path in home.rglob("*")}
    out = "\n".join(listed(monkeypatch, capsys, str(home)))
    assert "\x1b" not in out and "\x07" not in out and "\\x1b" in out and nasty.is_dir()
    assert all(name in out for name in ("bad config.yaml", "bad metrics.jsonl", "pipe", "folder", "linked"))
    assert before == {path: path.lstat().st_mtime_ns for path in home.rglob("*")}


def test_many_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    """The newest hundred, and how many are left out; --all lists them."""
    one = made_run(tmp_path / "runs" / "run-0")
    shutil.rmtree(one / "samples", ignore_errors=True)
    for number in range(1, 130):
        (tmp_path / "runs" / f"run-{number}").mkdir()
        shutil.copy(one / "config.yaml", tmp_path / "runs" / f"run-{number}")
    lines = listed(monkeypatch, capsys, str(tmp_path / "runs"))
    assert len(lines) == 102 and "30 older ones are left out, --all lists them" in lines[1]
    assert len(listed(monkeypatch, capsys, "--all", str(tmp_path / "runs"))) == 132


def test_mistakes(tmp_path: Path, monkeypatch, capsys) -> None:
    """A word that is no folder, and an option that there is not."""
    monkeypatch.chdir(tmp_path)
    for word, mend in {"nowhere": "is no folder", "--everything": "is no option; there is --all"}.items():
        monkeypatch.setattr(sys, "argv", ["alignlab ls", word])
        with pytest.raises(SystemExit) as end:
            ls.main()
        assert end.value.code == 2 and f"error: {word} {mend}" in capsys.readouterr().err
    assert listed(monkeypatch, capsys) == ["no runs in runs or multirun; alignlab train makes one"]


def test_a_time_is_in_its_largest_unit() -> None:
    """From two of it on."""
    assert [ls.span(s) for s in (-3, 59, 119, 120, 7199, 7200, 172799, 172800)] == [
        "0s",
        "59s",
        "119s",
        "2m",
        "120m",
        "2h",
        "48h",
        "2d",
    ]


def test_reading_does_not_take_the_lock(tmp_path: Path, monkeypatch, capsys) -> None:
    """A run can begin in a folder that was just listed."""
    run = Run(tmp_path / "runs" / "one", {"steps": 1})
    (tmp_path / "runs" / "one").mkdir(parents=True)
    listed(monkeypatch, capsys, str(tmp_path / "runs"))
    run.begin()
    assert (tmp_path / "runs" / "one" / "config.yaml").is_file()

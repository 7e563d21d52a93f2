"""Two commands on one folder, and two that begin in the same second: none overwrites what the other wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignlab import make_pairs, stages, train, train_reward
from alignlab.config import jobs
from alignlab.files.safe_folder import RunError, fresh, give_back, locked
from alignlab.runs.candidates import Candidates
from alignlab.runs.folder import Run
from alignlab.runs.stored_config import LATER_KEYS
from tests.running import command_line, pairs, tiny

EMPTY = {
    **LATER_KEYS,
    **{key: {} for key in ("model", "algo", "reward", "prompts", "policy", "eval_rewards")},
}
SMALL = [
    "algo=ddpo",
    "algo.statistics.min_count=2",
    "steps=1",
    "eval_every=1",
    "evaluation.prompts=1",
    "evaluation.final_images=1",
]


def ended(run: Run) -> None:
    """As if its process had ended: its lock is free."""
    run._lock.close()


def test_a_second_run_does_not_take_the_folder_of_the_first(tmp_path: Path) -> None:
    """Both looked before either had the lock: the second is refused, and the first's configuration stays."""
    first, second = Run(tmp_path / "run", EMPTY), Run(tmp_path / "run", {**EMPTY, "algo": {"k": 2}})
    first.begin()
    ended(first)
    with pytest.raises(RunError, match=r"holds a run with algo\.k=None, but algo\.k=2 was asked for"):
        second.begin()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algo"] == {}


def test_a_second_process_of_the_same_run_begins_anew(tmp_path: Path) -> None:
    """The same configuration: what the first did since is not known to the second, which would begin from
    nothing."""
    first, second = Run(tmp_path / "run", EMPTY), Run(tmp_path / "run", EMPTY)
    first.begin()
    first.save_checkpoint(0, {}, {})
    ended(first)
    with pytest.raises(
        RunError, match="was trained by another process while this one began; type the command again"
    ):
        second.begin()
    Run(tmp_path / "run", EMPTY).begin()


def test_a_second_filling_looks_again(tmp_path: Path) -> None:
    about = {"weights": None, "prompts": "x"}
    first, second = (Candidates(tmp_path / "pairs", {"seed": seed}, ["cat"], 2) for seed in (0, 1))
    same = Candidates(tmp_path / "pairs", {"seed": 0}, ["cat"], 2)
    first.begin(about)
    first._lock.close()
    with pytest.raises(RunError, match="holds candidates with seed=0, but seed=1 was asked for"):
        second.begin(about)
    with pytest.raises(RunError, match="was filled by another process while this one began"):
        same.begin(about)
    assert yaml.safe_load((tmp_path / "pairs" / "make_pairs.yaml").read_text())["config"] == {"seed": 0}


def held(folder: Path) -> "subprocess.Popen[str]":
    """Another process that holds a folder's lock until it is killed."""
    code = (
        "import time; from pathlib import Path; from alignlab.files.safe_folder import locked; f = "
        f"locked(Path({str(folder)!r}), ''); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def test_every_command_waits_for_the_lock(tmp_path: Path, tiny_sd: str, monkeypatch, capsys) -> None:
    """train, train_reward and stages: while another process is in the folder, a sentence."""
    data = pairs(tmp_path / "data")
    monkeypatch.setattr(stages, "run", lambda words, *flags, quiet=False: 0)
    clip = ["data=" + data, "epochs=1", "device=cpu", f"output_dir={tmp_path / 'folder'}"]
    jobs = [
        (train_reward, clip, "written"),
        (stages, ["recipe=rlhf", f"output_dir={tmp_path / 'folder'}"], "filled"),
        (train, [*tiny(tiny_sd, *SMALL), f"output_dir={tmp_path / 'folder'}"], "trained"),
    ]
    process = held(tmp_path / "folder")
    try:
        for command, words, doing in jobs:
            assert command_line(monkeypatch, *words, command=command) == 2
            said = (
                f"error: {tmp_path / 'folder'} is being {doing} by another process; wait for it, or choose "
                "another output_dir\n"
            )
            assert capsys.readouterr().err.endswith(said), command
    finally:
        process.kill()
        process.wait()
    assert {path.name for path in (tmp_path / "folder").iterdir()} <= {".lock", "samples", "checkpoints"}


def test_pairs_are_made_again_where_nobody_fills(tmp_path: Path, monkeypatch, capsys) -> None:
    """again= in place takes the lock of the one that fills the folder."""
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    (folder / "make_pairs.yaml").write_text("config: {}\n")
    for k in range(2):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{k}.png")
    rows = [
        {"prompt": "cat", "image": f"images/{k}.png", "seed": 0, "replica": k, "rewards": {"x": k}}
        for k in range(2)
    ]
    (folder / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = held(folder)
    try:
        assert command_line(monkeypatch, f"again={folder}", "pairing.weights={x: 1}", command=make_pairs) == 2
    finally:
        process.kill()
        process.wait()
    assert (
        "is being filled by another process" in capsys.readouterr().err
        and not (folder / "pairs.jsonl").exists()
    )
    assert command_line(monkeypatch, f"again={folder}", "pairing.weights={x: 1}", command=make_pairs) == 0
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == 1


def test_a_reward_is_looked_at_again(tmp_path: Path, monkeypatch, capsys) -> None:
    """Another process began another reward between the look and the lock."""
    words = [
        "data=" + pairs(tmp_path / "data"),
        "epochs=1",
        "device=cpu",
        f"output_dir={tmp_path / 'reward'}",
    ]
    assert command_line(monkeypatch, *words, command=train_reward) == 0
    kept = (tmp_path / "reward" / "config.yaml").read_bytes()
    looks = []

    def blind(c: dict, folder: Path) -> list[str]:
        looks.append(folder)
        return [] if len(looks) == 1 else list(real(c, folder))

    real = train_reward._taken
    monkeypatch.setattr(train_reward, "_taken", blind)
    monkeypatch.setattr(train_reward, "_finished", lambda folder: {})
    assert command_line(monkeypatch, *words, "seed=1", command=train_reward) == 2
    assert "holds a reward with seed=0, but seed=1 was asked for" in capsys.readouterr().err
    assert (tmp_path / "reward" / "config.yaml").read_bytes() == kept


def test_the_lock_of_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch) -> None:
    """The first process removes its lock as it ends, just after the second opened it: the second takes the
    new file's."""
    (tmp_path / ".lock").touch()
    real, opened = os.open, []

    def late(path, *how):
        number = real(path, *how)
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(number)
        return number

    monkeypatch.setattr("alignlab.files.safe_folder.os.open", late)
    with locked(tmp_path, "being tried") as file:
        assert len(opened) == 2 and os.fstat(file.fileno()).st_ino == (tmp_path / ".lock").stat().st_ino


# -- names of the same second


class _Noon:
    """datetime, at one moment."""

    @staticmethod
    def now() -> "_Noon":
        return _Noon()

    def __format__(self, form: str) -> str:
        return "noon"


def test_runs_of_the_same_second_have_folders_of_their_own(
    tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Two runs, two folders of pairs, two rewards; and a command that is refused leaves no folder behind."""
    monkeypatch.chdir(tmp_path)
    for module in (jobs, make_pairs, train_reward, stages):
        monkeypatch.setattr(module, "datetime", _Noon)
    monkeypatch.setattr(
        train, "train", lambda c, folder: (folder / "config.yaml").touch() or {"final": {"reward": 0.0}}
    )
    monkeypatch.setattr(train, "tell", lambda summary, folder: None)
    for _ in range(2):
        assert command_line(monkeypatch, *tiny(tiny_sd, *SMALL)) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"noon-ddpo", "noon-ddpo-2"}

    def refusing(*given: object) -> None:
        raise RunError("no")

    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(train, "train", refusing)
    monkeypatch.setattr(make_pairs, "fill", refusing)
    monkeypatch.setattr(train_reward, "train_reward", refusing)
    data = pairs(tmp_path / "data")
    for command, words in (
        (train, tiny(tiny_sd, *SMALL)),
        (make_pairs, [f"model.path_or_id={tiny_sd}"]),
        (train_reward, ["data=" + data]),
    ):
        assert command_line(monkeypatch, *words, command=command) == 2
        assert not (tmp_path / "runs").exists(), command


def test_sweeps_of_the_same_second_have_folders_of_their_own(
    tiny_sd: str, tmp_path: Path, monkeypatch
) -> None:
    """Under multirun/, and all jobs of one sweep in one folder; one that was given is taken as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train, "train", lambda c, folder: (folder / "config.yaml").touch() or {"final": {"reward": 0.0}}
    )
    monkeypatch.setattr(train, "tell", lambda summary, folder: None)
    (tmp_path / "conf").mkdir()
    names = ["noon", "noon"]
    monkeypatch.setattr(
        "hydra.core.utils.datetime", type("Clock", (), {"now": staticmethod(lambda: _Clock())})
    )
    for _ in names:
        assert command_line(monkeypatch, "-m", *tiny(tiny_sd, *SMALL), "seed=0,1") == 0
    assert {path.name for path in (tmp_path / "multirun").iterdir()} == {"noon", "noon-2"}
    for sweep in (tmp_path / "multirun").iterdir():
        assert len(list(sweep.glob("*/config.yaml"))) == 2 and (sweep / "multirun.yaml").is_file()
    assert command_line(monkeypatch, "-m", *tiny(tiny_sd, *SMALL), "seed=0,1", "output_dir=mine") == 0
    assert (
        len(list((tmp_path / "mine").glob("*/config.yaml"))) == 2
        and len(list((tmp_path / "multirun").iterdir())) == 2
    )


class _Clock:
    def strftime(self, form: str) -> str:
        return "noon"


def test_names_are_given_once_by_all_processes(tmp_path: Path) -> None:
    """Ten processes that ask for the same name at once get ten folders."""
    code = f"from alignlab.files.safe_folder import fresh; print(fresh({str(tmp_path / 'runs' / 'x')!r}))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(10)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert said == {str(tmp_path / "runs" / name) for name in ("x", *(f"x-{k}" for k in range(2, 11)))}


def test_a_name_that_was_not_used_is_given_back(tmp_path: Path) -> None:
    one, two = fresh(str(tmp_path / "new" / "a")), fresh(str(tmp_path / "new" / "b"))
    (two / "file").touch()
    give_back()
    assert not one.exists() and (two / "file").is_file()
